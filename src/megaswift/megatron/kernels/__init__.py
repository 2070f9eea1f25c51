"""The fast parts of a training step: each file holds one operation, its GPU kernel and its plain PyTorch twin."""
