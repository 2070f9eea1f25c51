"""From files and hubs to token ids with a loss mask, packed and batched."""
