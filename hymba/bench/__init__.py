"""Measurements: the fast paths checked against the reference, then timed against the machine's limits."""
