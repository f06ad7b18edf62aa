"""Suites of experiments: the file, its cells, running them."""
