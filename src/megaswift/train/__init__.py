"""Training: the loop of one rank, its step, what it logs and saves."""
