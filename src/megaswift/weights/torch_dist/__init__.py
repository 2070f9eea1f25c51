"""Megatron-Core's checkpoint format: read, written, and guarded against what a file could do."""
