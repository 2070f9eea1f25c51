"""Every family against transformers: round trip, strict names, logits, loss and gradients, at every layout."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.models import family_of, parameters_of
from megaswift.models.whole import text_of
from megaswift.run.spec import Parallel, Precision
from megaswift.weights.carried import carried_names
from megaswift.weights.convert import Precisions, hf_to_megatron, planned_hf_tensors, verify_round_trip
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.read import HFCheckpoint
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.ranks import RankPool
from tests.training import long

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
SOME, WHOLE = (
    [(1, 1), (2, 1), (2, 2)],
    ("llama", "qwen2"),
)  # of most families in the default suite; and whose layouts it walks all
LENGTHS = (19, 7, 14)


def cases() -> list[Any]:
    """Whether a model with experts ties its embedding is left to `make test-long`: tests/engine/test_experts.py has more of these."""
    dense = tiny.dense_families()
    return [
        pytest.param(name, tied, id=f"{name}-{'tied' if tied else 'untied'}", marks=() if name in dense or not tied else long)
        for name in tiny.FAMILIES
        for tied in (False, True)
    ]


def sample(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of 40 tokens, and labels of which some carry no loss."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (1, sum(LENGTHS)), generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[:, ::5] = -100
    labels[:, -1] = -100
    return tokens, labels


def reference(folder: Path, grads: Path) -> tuple[torch.Tensor, float]:
    """Logits and summed loss of transformers; its gradients are written as a Hugging Face folder."""
    model = tiny.loaded(folder)
    tokens, labels = sample(text_of(model.config).vocab_size)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:  # a bias of a choice has none
                parameter.copy_(parameter.grad)
    model.save_pretrained(grads)
    return logits.detach(), float(loss.detach())


def run_layout(folder: str, release: str, gradients: str, tp: int, pp: int) -> dict[str, Any]:
    """On one rank: logits, loss, and the largest relative error of its gradients against the reference's."""
    from megaswift.megatron import process_groups as ranks

    config = load_config(Path(folder))
    tokens, labels = sample(config.vocab_size)
    parallel = Parallel(tp=tp, pp=pp, sequence_parallel=tp > 1)
    with ranks.joined(parallel, seed=0):
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megaswift.data.batches import MicroBatch
        from megaswift.megatron.model import build
        from megaswift.train.checkpoint.load import load_weights
        from megaswift.train.objectives import SupervisedTokens
        from megaswift.train.trainer import forward_step

        model, expected = (build(config, parallel, Precision()) for _ in range(2))
        load_weights(model, Path(release))
        load_weights(expected, Path(gradients))
        for parameter in model.parameters():
            parameter.main_grad = None
        positions = torch.arange(tokens.shape[1])[None]
        batch = MicroBatch(tokens, labels, positions, None, (0,))
        logits = None
        if pp == 1:
            with torch.no_grad():
                logits = model(tokens, positions)
        wrapped = _wrapped(model)
        model.config.finalize_model_grads_func = lambda chunks, total=None, **kwargs: finalize_model_grads(
            chunks, None, **kwargs
        )
        reports = get_forward_backward_func()(
            forward_step_func=partial(forward_step, SupervisedTokens()), data_iterator=iter([batch]), model=[wrapped], num_microbatches=1,
            seq_length=tokens.shape[1], micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        errors = {}
        for (name, parameter), wanted in zip(model.named_parameters(), expected.parameters()):
            largest = wanted.detach().abs().max()  # of all parts: those of a few heads may be near zero
            torch.distributed.all_reduce(
                largest, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group()
            )
            errors[name] = float((parameter.main_grad - wanted).abs().max() / largest.clamp_min(1e-3))
        worst = max(errors, key=lambda name: errors[name])
        wrapped.grad_accs.clear()  # its hooks hold the wrapper, and with it the process groups
        return {
            "logits": logits,
            "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
            "loss": float(reports[0]["sums"][0]) if reports else None,
            "worst": (errors[worst], worst),
        }


def _wrapped(model: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    # Whole gradients on every rank: experts have several data-parallel ranks where others have none.
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=False, grad_reduce_in_fp32=True), model
    )
    wrapped.zero_grad_buffer()
    return wrapped


@pytest.mark.parametrize(("name", "tied"), cases())
def test_family(name: str, tied: bool, tiny_folders: Any, pool: RankPool, tmp_path: Path) -> None:
    folder, release = tiny_folders(name, tie_word_embeddings=tied)
    config = load_config(folder)
    source, reader = HFCheckpoint.open(folder), Reader(release)

    # Round trip, bit for bit, and exactly the names that transformers wrote.
    back = {planned.name: planned.produce() for planned in planned_hf_tensors(reader, config, Precisions(torch.float32))}
    assert set(back) == set(source.names) - set(carried_names(source, config))
    assert all(torch.equal(back[key], source.tensor(key)) for key in back)

    logits, loss = reference(folder, tmp_path / "grads")
    delta = any(
        kind.delta for kind in family_of(config.model_type).layers(config)
    )  # transformers' own are 1e-5 from fp64 there
    gradients = tiny.to_megatron(tmp_path / "grads", tmp_path / "grads_megatron")
    for tp, pp in LAYOUTS if name in WHOLE or "MEGASWIFT_LONG" in os.environ or "MEGASWIFT_FAMILIES" in os.environ else SOME:
        results = pool.run(tp * pp, run_layout, str(folder), str(release), str(gradients), tp, pp)
        if pp == 1:
            whole = torch.cat([result["logits"] for result in results], dim=-1)[..., : config.vocab_size]
            assert (whole - logits).abs().max() < (2e-5 if delta else 5e-6), f"tp {tp}"
        losses = [result["loss"] for result in results if result["loss"] is not None]
        assert losses and all(abs(value - loss) / loss < 1e-6 for value in losses), f"tp {tp} pp {pp}: {losses} {loss}"
        error, parameter = max(result["worst"] for result in results)
        assert error < 2e-5, f"tp {tp} pp {pp}: gradient of {parameter} is off by {error}"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tensor_parallel_cut_and_merge(name: str, tiny_folders: Any) -> None:
    """A parameter's shards put together are the tensor, whose rows are those that `rows` says, and it unpacks to its sources."""
    source = HFCheckpoint.open(tiny_folders(name, tie_word_embeddings=False, vocab_size=128)[0])
    for parameter in parameters_of(load_config(source.path)):
        arrangement, parts = parameter.arrangement, [part.of(source.tensor(part.name)) for part in parameter.hf]
        whole = arrangement.pack(parts)
        assert tuple(whole.shape) == parameter.shape
        for tp in (1, 2, 4):
            assert torch.equal(arrangement.merge(arrangement.shard(whole, tp)), whole)
        for first, last in ((0, len(whole)), (1, len(whole) // 2), (len(whole) // 3, len(whole) - 1)):
            rows = [parts[piece.tensor][piece.first : piece.last : piece.step] for piece in arrangement.rows(first, last)]
            assert torch.equal(torch.cat([whole[:0], *rows]), whole[first:last])
        for part, value in zip(parts, arrangement.unpack(whole), strict=True):
            assert torch.equal(value, part)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_conversion_casts(dtype: str, tiny_folders: Any, tmp_path: Path) -> None:
    """A cast on the way is the cast that torch makes, and the digests are those of the cast values."""
    folder, _ = tiny_folders("qwen2", tie_word_embeddings=True)
    config = load_config(folder)
    (tmp_path / "out").mkdir()
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    done = hf_to_megatron(HFCheckpoint.open(folder), config, tmp_path / "out", Precisions(wanted))
    reader = Reader(tmp_path / "out")
    assert verify_round_trip(reader, config, done.tensors, Precisions(wanted)) == len(done.tensors)
    for planned in planned_hf_tensors(reader, config, Precisions(wanted)):
        assert torch.equal(planned.produce(), HFCheckpoint.open(folder).tensor(planned.name).to(wanted))
