"""What happens to a gradient between backward and update."""
