"""Samples to grades: the answer of a text, and whether it is the same as the gold one."""
