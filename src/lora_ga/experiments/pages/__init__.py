"""Pages and pictures of runs and of suites."""
