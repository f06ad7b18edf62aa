"""A campaign of faults: kills, disks, bytes, processes and numbers. `make campaign` runs it."""
