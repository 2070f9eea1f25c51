"""What later versions of Megatron-Core do differently, each in the form of 0.16.1 and of 0.19; `make test-newest` runs the real one."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaswift.megatron import compat
from megaswift.megatron.optimizer import AdamW


class _Builder:
    """An MLP as 0.19 builds it: by calling what the class gives."""

    @classmethod
    def as_mlp_submodule(cls, submodules: Any, **arguments: Any) -> Any:
        return cls, submodules, arguments


def test_an_mlp_is_built_in_the_way_of_its_class() -> None:
    spec = compat.mlp_spec(torch.nn.Linear, "parts")
    assert (spec.module, spec.submodules) == (torch.nn.Linear, "parts")
    built = compat.mlp_spec(_Builder, "parts")
    assert isinstance(built, partial) and built(config=1) == (_Builder, "parts", {"config": 1})


def test_a_weight_is_marked_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    for _ in range(2):  # the second time as where Megatron-Core has done it
        compat.mark_split(weight, 1)
        assert (weight.tensor_model_parallel, weight.partition_dim) == (True, 1)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="axis 0"):
        compat.mark_split(weight, 0)


@pytest.mark.parametrize("name", ["get_main_grads_for_grad_norm", "get_grads_for_grad_norm"])
def test_gradients_of_the_norm_under_either_name(name: str) -> None:
    grads = [torch.ones(2)]
    assert compat.gradients_for_norm(SimpleNamespace(**{name: lambda: grads})) is grads


@pytest.mark.parametrize("chained", [False, True])
def test_saved_groups_are_found_under_other_rates(chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer.optimizer as theirs

    monkeypatch.setattr(theirs, "param_group_identifier_keys", ("max_lr", "min_lr", *KINDS))
    saved = {"optimizer": {"param_groups": [group(0.0, max_lr=1.0, step=7), group(1.0, max_lr=1.0, step=7)]}}
    inner = SimpleNamespace(param_groups=[group(1.0, max_lr=2.0), group(0.0, max_lr=3.0)])
    compat.let_groups_be_found([saved] if chained else saved, SimpleNamespace(chained_optimizers=[inner]))
    assert saved["optimizer"]["param_groups"] == [group(0.0, max_lr=3.0, step=7), group(1.0, max_lr=2.0, step=7)]


KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def group(decay: float, **more: Any) -> dict[str, Any]:
    return dict(zip(KINDS, (decay, 1.0, False, False))) | more


def test_an_option_of_adam_that_does_nothing_here_is_refused() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    AdamW(weights, capturable=False)
    with pytest.raises(TypeError, match="capturable"):
        AdamW(weights, capturable=True)


def test_an_object_keeps_what_its_class_does() -> None:
    layer = torch.nn.Linear(2, 2)
    ours = type("Ours", (torch.nn.Linear,), {})
    assert compat.become(layer, ours) is layer and type(layer) is ours
    with pytest.raises(TypeError, match="cannot become"):
        compat.become(layer, AdamW)
