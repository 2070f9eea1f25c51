"""What the server that forks ranks imports once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megatron.core.dist_checkpointing  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.configuration_llama  # noqa: F401

import megaswift.checkpoint.load
import megaswift.engine.loop
import megaswift.engine.model
import megaswift.engine.step  # noqa: F401
