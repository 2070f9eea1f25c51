"""Families with experts against transformers: loss, gradient norm and the update of every weight, however tokens and experts are spread."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megaswift.errors import UserError
from megaswift.models import families, family_of
from megaswift.models.experts import has_experts
from megaswift.models.whole import text_of
from megaswift.run.experts import expert_layout_problems
from megaswift.run.problems import refuse
from megaswift.run.spec import Parallel, Routing, Run
from megaswift.weights.hf.config import load_config
from tests import tiny
from tests.ranks import RankPool
from tests.runs import changed, resolved_run

NAMES = tuple(name for name in tiny.FAMILIES if any(has_experts(kind) for kind in next(
    family for family in families().values() if family.name == name).layers(tiny.tiny_config(name))))  # fmt: skip
# Adam's first step is nearly linear in the gradient where eps is far above it.
RATE, EPS, LENGTH = 1e-1, 1.0, 40
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {},
    "dp2": {"world": 2},
    "ep2": {"world": 2, "ep": 2},
    "tp2, sp": {"world": 2, "tp": 2, "sp": 1},
    "tp2": {"world": 2, "tp": 2},
    "tp2, etp2, sp": {"world": 2, "tp": 2, "etp": 2, "sp": 1},
    "tp2, etp2": {"world": 2, "tp": 2, "etp": 2},
    "tp2, ep2, sp": {"world": 2, "tp": 2, "ep": 2, "sp": 1},
    "tp2, ep2": {"world": 2, "tp": 2, "ep": 2},
    "tp2, ep2, etp2, sp": {"world": 4, "tp": 2, "ep": 2, "etp": 2, "sp": 1},
    "pp2, ep2": {"world": 4, "pp": 2, "ep": 2},
    "pp2, vpp2, ep2": {"world": 4, "pp": 2, "vpp": 2, "ep": 2},
    "cp2": {"world": 2, "cp": 2},
    "cp2, ep2": {"world": 2, "cp": 2, "ep": 2},
    "ep2, dp4": {"world": 4, "ep": 2},
    "tp2, pp2, ep2, sp": {"world": 4, "tp": 2, "pp": 2, "ep": 2, "sp": 1},
}  # fmt: skip


def rows(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of tokens, and labels of which some carry no loss."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (4, LENGTH), generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[:, ::5] = labels[:, -1] = -100
    labels[0, :9] = -100
    return tokens, labels


def run_of(layout: dict[str, int]) -> Run:
    """Of one step with Adam and without clipping, in a layout."""
    names = ("tp", "pp", "vpp", "cp", "ep", "etp")
    sizes: dict[str, Any] = {name: layout.get(name, 1) for name in names} | {"sequence_parallel": bool(layout.get("sp"))}
    return changed(
        resolved_run(world_size=layout.get("world", 1), learning_rate=RATE, min_lr=RATE, lr_scheduler_type="constant", warmup_ratio=0.0),
        parallel=Parallel(world_size=layout.get("world", 1), **sizes),
        routing=Routing(balance_loss=layout.get("balance", 0) / 100, z_loss=layout.get("z", 0) / 100),
        recompute="layers" if layout.get("recompute") else "none", weight_decay=0.0, max_grad_norm=0.0, beta1=0.9, beta2=0.95,
        epsilon=EPS, max_length=LENGTH,
    )  # fmt: skip


def router_losses(logits: tuple[torch.Tensor, ...], chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balancing and z loss of a micro batch, summed over layers, by hand."""
    balance, z_loss = torch.zeros(()), torch.zeros(())
    for layer in logits:
        scores = layer.softmax(-1)
        share = torch.nn.functional.one_hot(scores.topk(chosen, -1).indices, scores.shape[-1]).sum((0, 1)) / len(scores)
        balance = balance + scores.shape[-1] / chosen * (share * scores.mean(0)).sum()
        z_loss = z_loss + layer.logsumexp(-1).square().mean()
    return balance, z_loss


def reference(folder: Path, updated: Path, balance: float = 0.0, z_loss: float = 0.0) -> tuple[float, float]:
    """Loss and gradient norm of transformers; the weights after a step of torch's AdamW are written as a folder.

    Args:
        balance, z_loss: coefficients of losses of the routers; each row is a micro batch.
    """
    model = tiny.loaded(Path(folder))
    config = text_of(model.config)
    tokens, labels = rows(config.vocab_size)
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    more: Any = 0.0
    for row, label in zip(tokens, labels) if balance or z_loss else ():
        found = model(row[None], use_cache=False, output_router_logits=True).router_logits
        parts = router_losses(found, config.num_experts_per_tok)
        more = more + (balance * parts[0] + z_loss * parts[1]) * (label != -100).sum() / (labels != -100).sum()
    (loss + more).backward()
    norm = math.sqrt(
        sum(float(parameter.grad.double().square().sum()) for parameter in model.parameters() if parameter.grad is not None)
    )
    torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=EPS, weight_decay=0.0).step()
    model.save_pretrained(updated)
    return float(loss.detach()), norm


def cannot_be_cut(folder: str) -> bool:
    """Whether experts have biases, which each part of them would add: etp is then refused."""
    config = load_config(Path(folder))
    if not any(kind.experts and kind.experts.biases for kind in family_of(config.model_type).layers(config)):
        return False
    with pytest.raises(UserError, match="experts have biases"):
        refuse(expert_layout_problems(config, Parallel(world_size=2, tp=2, etp=2)))
    return True


def built(folder: str, release: str, layout: dict[str, int]) -> Any:
    """On one rank: the model of a layout with the weights of a checkpoint."""
    from megaswift.megatron.model import build
    from megaswift.train.checkpoint.load import load_weights

    run = run_of(layout)
    model = build(load_config(Path(folder)), run.parallel, run.precision, run.memory, run.routing)
    load_weights(model, Path(release))
    return model


def join(layout: dict[str, int]) -> Any:
    from megaswift.megatron import process_groups

    return process_groups.joined(run_of(layout).parallel, seed=0)


def one_step(folder: str, release: str, updated: str, layout: dict[str, int]) -> dict[str, Any]:
    """On one rank: loss, gradient norm, and the largest error of an update in parts of the largest update of its weight."""
    with join(layout) as rank:
        from megaswift.data.batches import MicroBatch
        from megaswift.train.objectives import SupervisedTokens
        from megaswift.train.trainer import Trainer

        model, wanted = built(folder, release, layout), built(folder, updated, layout)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        tokens, labels = rows(load_config(Path(folder)).vocab_size)
        positions = torch.arange(LENGTH)[None]
        trainer = Trainer(model, run_of(layout), SupervisedTokens())
        mine = range(rank.dp_rank, len(tokens), rank.dp)
        step = trainer.step([MicroBatch(tokens[k : k + 1], labels[k : k + 1], positions, None, (k,)) for k in mine])
        errors = {
            # A weight's own last digit is no error of its update.
            name: float(
                ((new - goal).abs() - 2**-23 * goal.abs()).max().clamp_min(0) / (goal - old).abs().max().clamp_min(1e-6)
            )
            for (name, new), goal, old in zip(model.named_parameters(), wanted.parameters(), before, strict=True)
        }
        trainer.close()
    worst = max(errors, key=lambda name: errors[name])
    return {"loss": step.loss, "norm": step.grad_norm, "worst": (errors[worst], worst)}


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tiny_folders: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, checkpoint, checkpoint after transformers' step, its loss and its gradient norm."""
    root = tmp_path_factory.mktemp(request.param)
    folder, release = tiny_folders(request.param, tie_word_embeddings=False)
    loss, norm = reference(folder, root / "updated")
    return str(folder), str(release), str(tiny.to_megatron(root / "updated", root / "megatron")), loss, norm


# Families whose layers share all their code with another's take a part of the layouts in the default suite.
ALIKE, FEW = ("mixtral", "olmoe", "granitemoe"), ("one", "ep2", "tp2, ep2, etp2, sp")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_that_of_transformers(name: str, family: Any, pool: RankPool) -> None:
    folder, release, updated, loss, norm = family
    if "MEGASWIFT_FAMILIES" not in os.environ and name not in FEW and load_config(Path(folder)).model_type in ALIKE:
        pytest.skip("a part of make test-families")
    layout = LAYOUTS[name]
    if layout.get("etp", 1) > 1 and cannot_be_cut(folder):
        return
    for result in pool.run(layout.get("world", 1), one_step, folder, release, updated, layout):
        assert result["loss"] == pytest.approx(loss, abs=2e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
        assert result["worst"][0] < 5e-4, result["worst"]


def test_experts_recomputed_with_their_layers(tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    """Tokens are sent anew in the backward pass, by all ranks alike."""
    folder, release = tiny_folders("qwen3_moe", tie_word_embeddings=False)
    loss, norm = reference(folder, tmp_path / "updated")
    updated = tiny.to_megatron(tmp_path / "updated", tmp_path / "megatron")
    for result in pool.run(2, one_step, str(folder), str(release), str(updated), {"ep": 2, "recompute": 1}):
        assert result["loss"] == pytest.approx(loss, abs=2e-6) and result["norm"] == pytest.approx(norm, rel=1e-5)
        assert result["worst"][0] < 5e-4, result["worst"]


def test_a_stage_without_experts(pool: RankPool, tmp_path: Path) -> None:
    """Its ranks hold no expert, but take part in what those of the other stage do with theirs."""
    tiny.save_tiny(tmp_path / "hf", "qwen3_moe", tie_word_embeddings=False, mlp_only_layers=[0, 1])
    release = tiny.to_megatron(tmp_path / "hf", tmp_path / "release")
    loss, norm = reference(tmp_path / "hf", tmp_path / "updated")
    updated = tiny.to_megatron(tmp_path / "updated", tmp_path / "megatron")
    for result in pool.run(4, one_step, str(tmp_path / "hf"), str(release), str(updated), {"pp": 2, "ep": 2}):
        assert result["loss"] == pytest.approx(loss, abs=2e-6) and result["norm"] == pytest.approx(norm, rel=1e-5)
        assert result["worst"][0] < 5e-4, result["worst"]


def marked_by_ep(*arguments: Any) -> dict[str, Any]:
    """A step with weights marked as Megatron-Core's linear layers mark them: for the common data-parallel group where ep is 1."""
    from megaswift.megatron import experts

    made = experts.StackedExperts.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        for module in (self.linear_fc1, self.linear_fc2):
            module.weight.allreduce = self.ep.size() == 1

    with mock.patch.object(experts.StackedExperts, "__init__", init):
        return one_step(*arguments)


def test_the_trap_of_ep_1_with_etp_below_tp(tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    """Gradients of experts summed over the wrong group leave the loss as it is; the checks above see it by norm and updates."""
    folder, release = tiny_folders("qwen3_moe", tie_word_embeddings=False)
    loss, norm = reference(folder, tmp_path / "updated")
    updated = tiny.to_megatron(tmp_path / "updated", tmp_path / "megatron")
    result = pool.run(2, marked_by_ep, str(folder), str(release), str(updated), {"tp": 2, "sp": 1})[0]
    assert result["loss"] == pytest.approx(loss, abs=2e-6)
    assert abs(result["norm"] / norm - 1) > 1e-4 and result["worst"][0] > 0.1


@pytest.mark.parametrize(
    "layout",
    [{}, {"world": 2, "ep": 2}, {"world": 2, "tp": 2, "sp": 1}, {"world": 2, "tp": 2}, {"world": 2, "cp": 2, "recompute": 1}],
    ids=str,
)
def test_losses_of_the_routers(layout: dict[str, int], tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    """Balancing and z loss: their gradients are the same at every layout, and they are no part of the loss that is shown."""
    folder, release = tiny_folders("qwen3_moe", tie_word_embeddings=False)
    loss, norm = reference(folder, tmp_path / "updated", balance=0.5, z_loss=0.02)
    updated = tiny.to_megatron(tmp_path / "updated", tmp_path / "megatron")
    options = {**layout, "balance": 50, "z": 2}
    for result in pool.run(layout.get("world", 1), one_step, str(folder), str(release), str(updated), options):
        assert result["loss"] == pytest.approx(loss, abs=2e-6) and result["norm"] == pytest.approx(norm, rel=1e-5)
        assert result["worst"][0] < 5e-4, result["worst"]


def direct(folder: str, release: str, layout: dict[str, int]) -> list[str]:
    """On one rank: parameters that differ between the folder itself and what it was converted to."""
    from megaswift.weights.load_hf import load_hf_weights

    with join(layout):
        model, converted = built(folder, release, layout), built(folder, release, layout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_hf_weights(model, Path(folder))
        pairs = zip(model.named_parameters(), converted.parameters(), strict=True)
        return [name for (name, left), right in pairs if not torch.equal(left, right) or not left.abs().sum()]


@pytest.mark.parametrize("name", ["ep2", "tp2, ep2, etp2, sp", "pp2, ep2"])
def test_a_folder_gives_each_rank_its_experts(name: str, tiny_folders: Any, pool: RankPool) -> None:
    for family in ("qwen2_moe", "granitemoe"):
        folder, release = tiny_folders(family, tie_word_embeddings=False)
        assert (
            pool.run(LAYOUTS[name].get("world", 1), direct, str(folder), str(release), LAYOUTS[name])
            == [[]] * LAYOUTS[name]["world"]
        )


def saved_gradients(folder: str, release: str, target: str, layout: dict[str, int]) -> None:
    """On one rank: the gradients of a step as a checkpoint."""
    with join(layout) as rank:
        from megaswift.data.batches import MicroBatch
        from megaswift.train.checkpoint.save import save
        from megaswift.train.gradients import Gradients
        from megaswift.train.objectives import SupervisedTokens
        from megaswift.train.trainer import Trainer

        model = built(folder, release, layout)
        tokens, labels = rows(load_config(Path(folder)).vocab_size)
        trainer = Trainer(model, run_of(layout), SupervisedTokens())
        mine = range(rank.dp_rank, len(tokens), rank.dp)
        positions = torch.arange(LENGTH)[None]
        sums = trainer.gradients([MicroBatch(tokens[k : k + 1], labels[k : k + 1], positions, None, (k,)) for k in mine])
        save(Path(target), 1, Gradients(trainer, trainer.gradient_divisor(sums)), only_model=True, extra={}, manifest={})
        trainer.close()


def test_gradients_are_whole_where_experts_are_shared_out(tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    """Over data-parallel ranks, and over tensor-parallel ones, which hold the same experts."""
    from megaswift.weights.torch_dist.reader import Reader

    folder, release = tiny_folders("qwen3_moe", tie_word_embeddings=False)
    found = {}
    for name in ("one", "ep2, dp4", "tp2, sp"):
        target, layout = tmp_path / name, LAYOUTS[name]
        pool.run(layout.get("world", 1), saved_gradients, str(folder), str(release), str(target), layout)
        found[name] = Reader(target / "iter_0000001")
    for name in ("ep2, dp4", "tp2, sp"):
        for key in found["one"].keys:
            wanted, value = found["one"].read(key), found[name].read(key)
            assert (value - wanted).abs().max() < 2e-5 * wanted.abs().max(), (name, key)


def logits_at(folder: str, release: str, layout: dict[str, int]) -> tuple[int, torch.Tensor]:
    """On one rank: its tensor-parallel number, and its part of the logits of all rows."""
    with join(layout), torch.no_grad():
        from megatron.core import parallel_state

        model = built(folder, release, layout)
        model.eval()
        tokens, _ = rows(load_config(Path(folder)).vocab_size)
        parts = [model(tokens[k : k + 1], torch.arange(LENGTH)[None]) for k in range(len(tokens))]
        return parallel_state.get_tensor_model_parallel_rank(), torch.cat(parts)


@pytest.mark.parametrize("name", ["ep2", "tp2, sp", "tp2", "tp2, ep2, etp2, sp"])
def test_logits_are_those_of_transformers(name: str, family: Any, pool: RankPool) -> None:
    folder, release, layout = *family[:2], LAYOUTS[name]
    if layout.get("etp", 1) > 1 and cannot_be_cut(folder):
        return
    model = tiny.loaded(Path(folder))
    config = text_of(model.config)
    with torch.no_grad():
        wanted = model(rows(config.vocab_size)[0], use_cache=False).logits
    parts = dict(pool.run(layout["world"], logits_at, folder, release, layout))
    found = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : config.vocab_size]
    kinds = family_of(config.model_type).layers(config)
    limit = 4e-5 if any(kind.delta for kind in kinds) else 1e-5  # transformers' own are 1e-5 from those in fp64 there
    assert (found - wanted).abs().max() < limit
