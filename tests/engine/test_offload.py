"""Offload to the host: the same bits as without it, less on the device, and clear words where it cannot be had.

The ranks here are on the CPU, where page-locked memory is ordinary memory and copies are copies; test_gpu_offload.py runs the
same functions on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megaswift.commands import sft
from megaswift.config.options import SftArguments
from megaswift.errors import UserError
from megaswift.run.memory import estimate
from megaswift.run.spec import Run
from megaswift.weights.hf.config import load_config
from megaswift.weights.torch_dist.reader import Reader
from tests import tiny
from tests.ranks import RankPool
from tests.runs import changed, resolved_run
from tests.training import Trained, long, tiny_start, train, write_rows

LAYERS, STEPS = 4, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("offload")
    return tiny_start(root, "qwen2", num_hidden_layers=LAYERS), write_rows(root / "rows.jsonl")


@pytest.fixture
def allowed() -> Iterator[None]:
    """Offload on a machine without a GPU."""
    with mock.patch("megaswift.run.problems._device", lambda run: ()):
        yield


def options(model: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict(
        resume_from_checkpoint=str(model[0]), dataset=[str(model[1])], max_steps=4, eval_steps=2, dataset_test_ratio=0.1, save_steps=2
    )  # fmt: skip
    return values | more


def same_checkpoints(one: Trained, other: Trained, step: int) -> None:
    """Weights, master weights and moments, bit for bit."""
    first, second = (Reader(run.directory / f"iter_{step:07d}") for run in (one, other))
    assert set(first.keys) == set(second.keys) and any(key.startswith("optimizer.state.exp_avg_sq") for key in first.keys)
    for key in first.keys:
        assert torch.equal(first.read(key), second.read(key)), key


@pytest.mark.parametrize(
    ("dtype", "optim", "processes", "more"),
    [
        ("fp32", "adamw_torch", 1, {}),
        ("bf16", "adamw_torch", 2, {"async_save": True}),
        pytest.param("bf16", "adamw_bf16", 2, {"gradient_checkpointing": True}, marks=long),
        ("bf16", "adamw_8bit", 2, {"pp": 2}),
    ],
)
def test_a_run_with_its_optimizer_on_the_host(
    dtype: str, optim: str, processes: int, more: dict[str, Any], model: tuple[Path, Path], pool: RankPool, tmp_path: Path, allowed: None
) -> None:  # fmt: skip
    """Losses, norms, checkpoints and a resume equal those of a run without it; each goes on from the other's checkpoint."""
    common = options(model, dtype=dtype, optim=optim, gradient_accumulation_steps=4, deterministic=True, **more)
    plain = train(pool, tmp_path / "plain", processes, **common)
    offloaded = train(pool, tmp_path / "host", processes, optimizer_cpu_offload=True, **common)
    assert (offloaded.losses, offloaded.norms, offloaded.eval_losses) == (plain.losses, plain.norms, plain.eval_losses)
    same_checkpoints(plain, offloaded, 4)
    planned = [json.loads((run.directory / "plan.json").read_text()) for run in (plain, offloaded)]
    assert planned[1]["rank_bytes"]["optimizer"] == 0 and not planned[0]["host_bytes"]
    assert planned[1]["host_bytes"] == {"optimizer": planned[0]["rank_bytes"]["optimizer"]}

    for path in (offloaded.directory, plain.directory):  # both go on from step 2, with the other's setting
        (path / "iter_0000004").rename(path.parent / "iter_0000004")
    for run, on_host in ((offloaded, False), (plain, True)):
        changed = common | {"resume_from_checkpoint": str(run.directory), "optimizer_cpu_offload": on_host}
        again = train(pool, tmp_path / "unused", processes, **changed)
        assert again.directory == run.directory and again.losses == plain.losses
    same_checkpoints(plain, offloaded, 4)


def state_lies_on_the_host(path: str) -> tuple[int, int, int]:
    """On one rank: how many tensors of the optimizer's state lie in page-locked memory, after loading; all; their bytes."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.kernels import pinned
    from megaswift.train.setup import open_batches, restore_trainer, to_device

    job, made = Run.read(Path(path)), []
    original = pinned.PageLocked.__init__

    def init(self: Any, size: int) -> None:
        original(self, size)
        made.append((self.bytes.data_ptr(), size))

    with mock.patch.object(pinned.PageLocked, "__init__", init), ranks.joined(job.parallel, 42) as rank:
        trainer, _ = restore_trainer(job)
        batches, _ = open_batches(job, rank)
        trainer.step(to_device(batches.step(0), rank.device))
        state = []
        for inner in trainer.optimizer.chained_optimizers:
            state += [main for group in inner.shard_fp32_from_float16_groups for main in group]
            state += [tensor for moments in inner.optimizer.state.values() for tensor in moments.values()]
        inside = [any(begin <= one.data_ptr() < begin + size for begin, size in made) for one in state]
        trainer.close()
        return sum(inside), len(state), sum(one.nbytes for one in state)


def job_of(model: tuple[Path, Path], folder: Path, processes: int, **more: Any) -> Run:
    """What `swift sft` would give its ranks."""
    found: list[Run] = []
    values = options(model, output_dir=str(folder), dataloader_num_workers=0, max_length=128, learning_rate=1e-3, **more)
    with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(processes)}):
        with mock.patch.object(sft, "_start", lambda run_dir, job, place, stop: found.append(job)):
            sft.sft_main(SftArguments(**values))
    return found[0]


@pytest.mark.parametrize(("dtype", "optim"), [("bf16", "adamw_8bit"), ("bf16", "adamw_torch"), ("fp32", "adamw_torch")])
def test_where_the_state_lies(
    dtype: str, optim: str, model: tuple[Path, Path], pool: RankPool, tmp_path: Path, allowed: None
) -> None:
    job = job_of(model, tmp_path, 1, dtype=dtype, optim=optim, optimizer_cpu_offload=True)
    job.write(tmp_path / "run.json")
    [(inside, tensors, size)] = pool.run(1, state_lies_on_the_host, str(tmp_path / "run.json"))
    assert inside == tensors > 50
    planned = estimate(job, load_config(Path(job.model.directory))).host["optimizer"]
    assert planned <= size < 1.2 * planned  # scales of 8-bit moments come on top


class LateStream:
    """A copy stream as slow as a GPU's may be: what it was given happens only when somebody waits for it."""

    now: LateStream | None = None  # that copies are given to

    def __init__(self) -> None:
        self.queue: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        """The computation is always done at once."""

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        LateStream.now = self
        yield
        LateStream.now = None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """To be done later; both ends must be alive then, else the memory would have other owners."""
        ends = weakref.ref(target.untyped_storage()), weakref.ref(source.untyped_storage())
        count = source.numel()  # bytes, from the beginning of either

        def run() -> None:
            storages = [end() for end in ends]
            assert all(storage is not None for storage in storages), "memory was given away before its copy was made"
            _COPY(*(torch.empty(0, dtype=torch.uint8).set_(storage)[:count] for storage in storages))

        self.queue.append(run)


class LateEvent:
    def record(self, stream: LateStream) -> None:
        self.stream, self.place = stream, len(stream.queue)

    def wait(self) -> None:
        for index in range(self.place):
            run, self.stream.queue[index] = self.stream.queue[index], None
            if run is not None:
                run()


_COPY = torch.Tensor.copy_


@contextlib.contextmanager
def late_copies() -> Iterator[None]:
    """Copies of the offload are made at the last moment that its events allow."""

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if LateStream.now is None:
            return _COPY(target, source, non_blocking)
        LateStream.now.copy(target, source)
        return target

    compute = SimpleNamespace(wait_event=lambda event: event.wait(), wait_stream=lambda other: None)
    with (
        mock.patch.object(torch.cuda, "Stream", LateStream),
        mock.patch.object(torch.cuda, "Event", LateEvent),
        mock.patch.object(torch.cuda, "stream", lambda stream: stream.current()),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: compute),
        mock.patch.object(torch.Tensor, "copy_", copy),
    ):
        yield


def late_passes(path: str, layers: int, recompute: str) -> dict[str, Any]:
    """`passes` with copies that come as late as they may."""
    return passes(path, layers, recompute, late=True)


def passes(path: str, layers: int, recompute: str, late: bool = False) -> dict[str, Any]:
    """On one rank: gradients of a few steps, weights after them, and what autograd kept on the device in between."""
    from megaswift.megatron import process_groups as ranks
    from megaswift.megatron.kernels import activation_offload
    from megaswift.train.determinism import deterministic
    from megaswift.train.setup import open_batches, restore_trainer, to_device

    activation_offload.SMALLEST = 2048
    how = {"recompute": "layers"} if recompute == "full" else {}
    job = changed(Run.read(Path(path)), offloaded_layers=layers, **how)
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic(job.precision.deterministic))
        rank = stack.enter_context(ranks.joined(job.parallel, 42))
        if late:
            stack.enter_context(late_copies())
        trainer, _ = restore_trainer(job)
        blocks = [chunk.decoder for chunk in trainer.chunks]
        for layer in (layer for block in blocks for layer in block.layers):
            layer.self_attention.checkpoint_core_attention = recompute == "selective"
        offloads = [block.offload for block in blocks if isinstance(block, activation_offload.OffloadingBlock)]
        batches, validation = open_batches(job, rank)
        gradients, made = [], []
        with kept_bytes(trainer) as kept:
            for _ in range(STEPS):
                sums = trainer.gradients(to_device(batches.step(0), rank.device))
                gradients.append([float(sums[0]), *(p.main_grad.clone().cpu() for p in trainer.bare_model.parameters())])
                trainer.update(sums)
                made.append(sum(offload.pool.made for offload in offloads))
        assert sum(offload.layers for offload in offloads) == layers
        assert not any(offload._waiting or offload._leaving for offload in offloads)
        assert sum(len(offload.pool._free) for offload in offloads) == made[-1], "every buffer came back"
        loss = trainer.evaluate(iter([to_device(validation.step(0), rank.device)])) if validation is not None else None
        weights = [p.detach().clone().cpu() for p in trainer.bare_model.parameters()]
        trainer.close()
        return {"gradients": gradients, "weights": weights, "kept": kept[0], "made": made, "loss": loss}


@contextlib.contextmanager
def kept_bytes(trainer: Any) -> Iterator[list[int]]:
    """Bytes of floating-point storages that autograd keeps on the device from the block's forward passes, parameters left out."""
    from megaswift.megatron.kernels.activation_offload import ActivationOffload

    total, alive, forward = [0], set(), [False]  # what is recomputed later does not count
    parameters = {p.untyped_storage().data_ptr() for p in trainer.bare_model.parameters()}
    pack = ActivationOffload._pack

    def count(tensor: Any) -> Any:
        if forward[0] and isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            place = tensor.untyped_storage().data_ptr()
            if place not in parameters and (place, tensor._version) not in alive:
                alive.add((place, tensor._version))
                total[0] += tensor.untyped_storage().nbytes()
        return tensor

    def begin(*_: Any) -> None:
        alive.clear()
        forward[0] = True

    blocks = [chunk.decoder for chunk in trainer.chunks]
    hooks = [block.register_forward_pre_hook(begin) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: forward.__setitem__(0, False)) for block in blocks]
    with (
        mock.patch.object(ActivationOffload, "_pack", lambda self, tensor: count(pack(self, tensor))),
        saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        yield total
    for hook in hooks:
        hook.remove()


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, gradients of all parameters, and weights, bit for bit."""
    assert one["loss"] == other["loss"]
    for first, second in zip(one["gradients"], other["gradients"], strict=True):
        assert first[0] == second[0]
        assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))


@pytest.mark.parametrize(
    ("name", "processes", "recompute", "layers", "more"),
    [
        ("end to end", 1, "none", (1, LAYERS - 1, LAYERS), {"batch_size": 4}),
        ("padded", 1, "none", (LAYERS - 1,), {"batch_size": 4, "padding_free": False}),
        ("packed", 1, "full", (1, LAYERS), {"packing": True}),
        pytest.param("padded", 1, "full", (LAYERS - 1,), {"batch_size": 4, "padding_free": False}, marks=long),
        ("padded", 1, "selective", (LAYERS - 1,), {"batch_size": 4, "padding_free": False}),
        ("end to end", 2, "none", (1, 2), {"pp": 2}),
        ("end to end", 2, "none", (1, 2), {"pp": 2, "vpp": 2}),
        pytest.param("end to end", 2, "full", (1, 2), {"pp": 2, "vpp": 2}, marks=long),
        pytest.param("end to end", 2, "full", (1, 2), {"pp": 2}, marks=long),
        pytest.param("end to end", 2, "none", (2,), {"cp": 2, "batch_size": 4}, marks=long),
        ("end to end", 2, "none", (3,), {"tp": 2, "sequence_parallel": True, "batch_size": 4}),
    ],
    ids=str,
)
def test_activations_on_the_host(
    name: str, processes: int, recompute: str, layers: tuple[int, ...], more: dict[str, Any], model: tuple[Path, Path],
    pool: RankPool, tmp_path: Path,
) -> None:  # fmt: skip
    """Gradients and weights bit for bit, less kept on the device, and buffers that are used again."""
    accumulation = 4 // processes  # 4 micro batches a step, also in a pipeline
    job = job_of(model, tmp_path, processes, gradient_accumulation_steps=accumulation, **more)
    job.write(tmp_path / "run.json")
    plain = pool.run(processes, passes, str(tmp_path / "run.json"), 0, recompute)
    kept = [rank["kept"] for rank in plain]
    for number in layers:
        offloaded = pool.run(processes, passes, str(tmp_path / "run.json"), number, recompute)
        for rank, (one, other) in enumerate(zip(plain, offloaded, strict=True)):
            equal(one, other)
            assert other["kept"] < kept[rank], f"{number} layers"
            assert other["made"][1] == other["made"][2] > 0  # rows of four lengths settle in the second step
        kept = [rank["kept"] for rank in offloaded]


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays the part of a GPU's streams")
@pytest.mark.parametrize(("recompute", "vpp"), [("none", 1), ("full", 1), ("none", 2), pytest.param("full", 2, marks=long)])
def test_copies_may_be_late(recompute: str, vpp: int, model: tuple[Path, Path], pool: RankPool, tmp_path: Path) -> None:
    """Nothing is read, overwritten or given away before the copy that it waits for."""
    job = job_of(model, tmp_path, 2, gradient_accumulation_steps=2, pp=2, vpp=vpp)
    job.write(tmp_path / "run.json")
    plain = pool.run(2, passes, str(tmp_path / "run.json"), 0, recompute)
    for layers in (1, LAYERS // 2):
        late = pool.run(2, late_passes, str(tmp_path / "run.json"), layers, recompute)
        for one, other in zip(plain, late, strict=True):
            equal(one, other)
    if recompute == "none" and vpp == 1:
        job = job_of(model, tmp_path / "one", 1, gradient_accumulation_steps=4)
        job.write(tmp_path / "run.json")
        [one], [other] = (
            pool.run(1, run, str(tmp_path / "run.json"), n, recompute) for run, n in ((passes, 0), (late_passes, LAYERS - 1))
        )
        equal(one, other)


def test_what_cannot_be_had_is_refused(model: tuple[Path, Path], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        for given in ({"optimizer_cpu_offload": True}, {"cpu_offloading_num_layers": 1}):
            with pytest.raises(UserError, match=f"--{next(iter(given))} needs a GPU: this run is on the CPU"):
                sft.sft_main(SftArguments(**options(model, output_dir=str(tmp_path / "run"), **given)))
    assert not (tmp_path / "run").exists()
    config = tiny.tiny_config("llama", num_hidden_layers=LAYERS)
    for pp, wanted in ((1, LAYERS + 1), (2, LAYERS // 2 + 1)):
        with pytest.raises(UserError, match=f"is not between 0 and the {LAYERS // pp} layers of a process") as caught:
            resolved_run(config=config, on_gpu=True, pp=pp, cpu_offloading_num_layers=wanted)
        assert caught.value.fix == f"use at most {LAYERS // pp}"
    resolved_run(config=config, on_gpu=True, pp=2, cpu_offloading_num_layers=LAYERS // 2)
    with pytest.raises(UserError, match="--optimizer_cpu_offload true does not work with fp16"):
        resolved_run(dtype="fp16", on_gpu=True, optimizer_cpu_offload=True)


def test_bytes_of_activations() -> None:
    """What the plan says is what the documentation's formula says, for the micro batches that a pipeline has in flight."""
    config = tiny.tiny_config("llama")
    hidden, ffn, heads, groups = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    qkv = (heads + 2 * groups) * hidden // heads
    tokens = 64 * 2  # max_length x batch_size
    made = resolved_run(config=config, on_gpu=True, batch_size=2, cpu_offloading_num_layers=2, dtype="bf16")
    assert estimate(made, config).host == {"activations": 2 * 2 * tokens * (5 * hidden + qkv + 3 * ffn)}
    made = resolved_run(
        config=config, on_gpu=True, batch_size=2, cpu_offloading_num_layers=1, pp=2, gradient_checkpointing=True
    )
    assert estimate(made, config).host == {"activations": 4 * 2 * tokens * hidden}
