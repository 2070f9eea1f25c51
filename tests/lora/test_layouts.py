"""LoRA against PEFT at every layout: loss, gradient norm and the gradient of every tensor, packed and padded, with recompute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.data.store import TokenRows
from tests.engine.test_packed import LAYOUTS, job
from tests.lora.adapters import adapted, by_hf_name, lora_of, parameters_of, peft_model, peft_step
from tests.ranks import RankPool
from tests.steps import first_steps, save_gradients
from tests.training import long, tiny_start, write_rows

SAMPLES = 48
SOME = (
    "tp1 pp1 dp1",
    "tp2",
    "tp2 pp2, sequence parallel",
    "cp2",
)  # with one kind of model at all, these tell the others' faults
EVERYWHERE = "MEGASWIFT_LONG" in os.environ


def one_step(jobs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """On one rank: what each job's only step gives; its gradients are saved."""
    result = []
    for trainer, batches, target in first_steps(jobs):
        frozen = {name: value.clone() for name, value in trainer.bare_model.named_parameters() if not value.requires_grad}
        sums = trainer.gradients(batches)
        save_gradients(trainer, sums, target)
        step = trainer.update(sums)
        own = dict(trainer.bare_model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in frozen.items()), "the base does not move"
        buffered = sum(
            buffer.numel_unpadded if hasattr(buffer, "numel_unpadded") else buffer.grad_data.numel()
            for buffer in (buffer for wrapped in trainer.wrapped for buffer in wrapped.buffers)
        )
        result.append({"loss": step.loss, "norm": step.grad_norm, "buffered": buffered})
    return result


CASES: dict[str, dict[str, Any]] = {
    "llama tied": {"family": "llama", "tied": True},
    "qwen2 untied, rsLoRA": {"family": "qwen2", "tied": False, "lora": {"rslora": True}, "layouts": SOME},
    "ernie4_5 tied, q and v and up": {
        "family": "ernie4_5", "tied": True, "words": ["q_proj", "v_proj", "up_proj"], "layouts": SOME,
    },
    "qwen3 untied, some layers, norms and head": {
        "family": "qwen3", "tied": False, "words": [r"model\.layers\.[02]\.self_attn\..*", r".*layers\.1\.mlp\.down_proj", "k_proj"],
        "saved": ["norm", "input_layernorm", "q_norm", "lm_head", "embed_tokens"], "layouts": SOME,
    },
    "deepseek_v3 untied, latent attention": {
        "family": "deepseek_v3", "tied": False, "words": [r".*\.self_attn\..*"], "layouts": ("tp2", "tp2, sequence parallel"),
        "forms": ("padded",),
    },
    "qwen2 tied, DoRA": {"family": "qwen2", "tied": True, "lora": {"dora": True}, "layouts": SOME},
    "qwen2 tied, base in 4 bits, scales in 8, all": {
        "family": "qwen2", "tied": True, "sizes": {"hidden_size": 128, "intermediate_size": 128}, "lora": {"bits": 4, "double": True},
        "layouts": ("tp2 pp2, sequence parallel",),
    },
    "qwen2 tied, base in 4 bits, k and down": {
        "family": "qwen2", "tied": True, "sizes": {"hidden_size": 128, "intermediate_size": 128}, "lora": {"bits": 4},
        "words": ["k_proj", "down_proj"], "layouts": SOME,
    },
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "padded": {"padding_free": False},
    "recomputed": {"padding_free": False, "gradient_checkpointing": True},
}


# Forms that share their way with others: by `make test-lora`.
LATER = ("qwen2 untied, rsLoRA", "ernie4_5 tied, q and v and up")


@pytest.mark.parametrize("case", [pytest.param(case, marks=long if case in LATER else ()) for case in CASES])
def test_gradients_are_those_of_peft(case: str, pool: RankPool, tmp_path: Path) -> None:
    chosen = CASES[case]
    start = tiny_start(tmp_path, chosen["family"], tie_word_embeddings=chosen["tied"], **chosen.get("sizes", {}))
    folder, rows = tmp_path / "hf", write_rows(tmp_path / "rows.jsonl", SAMPLES)
    lora = lora_of(folder, chosen.get("words"), chosen.get("saved"), **chosen.get("lora", {}))
    model = peft_model(folder, lora)
    model.save_pretrained(tmp_path / "adapter")
    parameters, wanted = parameters_of(folder, lora), None
    names = tuple(LAYOUTS) if EVERYWHERE else chosen.get("layouts", tuple(LAYOUTS))
    for number, name in enumerate(names):
        (world, *layout), jobs = LAYOUTS[name], []
        for form, options in ((form, FORMS[form]) for form in chosen.get("forms", FORMS)):
            path = tmp_path / f"{number}-{form}.json"
            with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
                made = job(start, rows, world, *layout, batch=1 if form == "packed" else 2, samples=SAMPLES, **options)
            adapted(made, lora, tmp_path / "adapter").write(path)
            jobs.append((str(path), str(tmp_path / f"{name} {form}")))
        if wanted is None:
            wanted = peft_step(model, lora, TokenRows.open(made.data.train))
        loss, norm, gradients = wanted
        assert set(gradients) == {part.name for parameter in parameters for part in parameter.hf}
        for (_, target), figures in zip(jobs, pool.run(world, one_step, jobs)[0], strict=True):
            what = f"{case}: {Path(target).name}"
            assert figures["loss"] == pytest.approx(loss, abs=2e-6), what
            assert figures["norm"] == pytest.approx(norm, rel=1e-5), what
            found = by_hf_name(Path(target) / "iter_0000001", parameters)
            worst = max((float((found[key] - value).norm() / value.norm()), key) for key, value in gradients.items())
            print(
                f"{what:60} loss {abs(figures['loss'] - loss):.1e} norm {abs(figures['norm'] / norm - 1):.1e} gradient {worst[0]:.1e} {worst[1]}"
            )
            assert worst[0] < 2e-5, f"{what}: {worst}"
