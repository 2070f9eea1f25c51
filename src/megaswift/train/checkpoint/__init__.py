"""Checkpoints on disk: Megatron-Core's torch_dist format, a manifest beside it, safe reading and atomic publishing."""
