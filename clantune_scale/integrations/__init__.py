"""Clans on the line in other people's loops; each framework is a module or folder of its own."""
