"""Records of runs and of suites."""
