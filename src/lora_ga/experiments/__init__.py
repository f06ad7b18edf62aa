"""Experiments as grids: a file says tasks, methods and settings; every cell runs once and leaves one record."""
