"""Runs: the one loop, what learns in it, how it is started, what it tells."""
