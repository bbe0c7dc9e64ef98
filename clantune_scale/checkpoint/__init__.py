"""Rounds on disk: committed whole or not at all, and continued from to the last bit."""
