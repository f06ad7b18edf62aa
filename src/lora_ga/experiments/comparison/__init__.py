"""Comparing runs, and the results of a suite."""
