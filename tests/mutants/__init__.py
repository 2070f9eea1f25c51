"""Planted faults, and a command that shows which test sees each: `python -m tests.mutants`."""
