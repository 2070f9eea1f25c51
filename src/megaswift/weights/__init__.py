"""Tensors on disk: Hugging Face folders, torch_dist and classic checkpoints, and the way between them."""
