"""Random weights for a config, drawn by transformers itself, as a Hugging Face folder in the cache: what training from nothing begins from.

They are drawn once, by one process, before any rank starts, so they are the same at every layout.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from megaswift.store.cache import cache_root, published
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder import side_files
from megaswift.weights.hf.tokenizer import quiet_transformers
from megaswift.weights.torch_dtypes import TORCH_DTYPES


def random_folder(folder: Path, seed: int, dtype: str) -> Path:
    """A folder with the config and tokenizer of `folder`, and weights that transformers draws for a model of that config.

    Args:
        seed: of torch's generator on the host.
        dtype: of the weights, which are drawn in fp32.

    The host must hold the model once, in fp32. Raises what `load_config` raises.
    """
    import torch
    import transformers

    files = side_files(folder)
    key = hashlib.sha256(json.dumps([seed, dtype, torch.__version__, transformers.__version__]).encode())
    key.update(Path(__file__).read_bytes())  # other code may draw others
    for file in files:
        key.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    target = cache_root() / "random" / key.hexdigest()[:32]
    if target.is_dir():
        return target
    config = load_config(folder)
    with published(target) as directory, quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.to(TORCH_DTYPES[dtype]).save_pretrained(directory)
        for file in files:  # config.json included: it stays as it was given
            shutil.copyfile(file, directory / file.name)
    return target
