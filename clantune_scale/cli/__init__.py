"""The command line: what a run will cost, what it does, what it leaves behind."""
