"""Families whose transformers class gives scores: its tensors are those of our list, and a forward pass gives its scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

from megaswift.models import families, parameters_of
from megaswift.models.head import auto_class, labels_of
from megaswift.models.parameters import hf_shapes
from megaswift.proof.parity import compare
from megaswift.weights.convert import Precisions
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.folder_reader import FolderReader
from megaswift.weights.hf.read import HFCheckpoint

NAMES = sorted({family.name for name, family in families().items() if name in KNOWN})
SOME = [name for name in ("gemma2", "mixtral", "qwen3") if name in NAMES]


@pytest.mark.parametrize("name", NAMES if tiny.FAMILIES is tiny.OTHERS else SOME)
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    config = tiny.tiny_config(name, id2label={k: str(k) for k in range(3)}, pad_token_id=0)
    config.architectures = [KNOWN[config.model_type]]
    assert labels_of(config) == 3
    torch.manual_seed(3)
    model = auto_class(config).from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in place else torch.randn_like(parameter) * 0.08)
    model.save_pretrained(tmp_path)
    source, config = HFCheckpoint.open(tmp_path), load_config(tmp_path)
    assert dict(hf_shapes(parameters_of(config))) == {name: source.shape(name) for name in source.names}
    # The folder's own values by way of our list, in our model.
    parity = compare(config, source, FolderReader(config, source), Precisions(torch.float32), tmp_path)
    assert not parity.failed, f"{parity.failed}: {parity.where}"
    assert parity.largest_logit > 0.05 and all(finding.equal for finding in parity.config), [
        f for f in parity.config if not f.equal
    ]
