"""The clan as a paper would describe it: no torch, no input or output, pure functions of data and a seed."""
