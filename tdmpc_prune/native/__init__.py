"""The planner in C (planner.h, planner.c), compiled for this machine and called from Python."""
