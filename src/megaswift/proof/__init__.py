"""Proof that a Megatron checkpoint is the Hugging Face model: config audit, logits against transformers, and who made what from what."""
