"""Tables of runs and of suites."""
