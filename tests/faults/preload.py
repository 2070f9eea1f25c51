"""What the server that forks ranks imports once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import megatron.core.dist_checkpointing  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.configuration_llama  # noqa: F401

import megaswift.megatron.model
import megaswift.train.checkpoint.load
import megaswift.train.loop
import megaswift.train.trainer  # noqa: F401
