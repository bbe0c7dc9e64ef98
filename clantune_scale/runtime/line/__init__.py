"""Members on the line: one model, and the points at which its members lie."""
