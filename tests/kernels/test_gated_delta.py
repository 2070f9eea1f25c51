"""The gated delta rule and the convolution before it: by their definitions in fp64, as transformers has them, and anew for each sample."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.megatron.kernels import flash_linear_attention as fla
from megaswift.megatron.kernels.causal_conv import causal_conv
from megaswift.megatron.kernels.gated_delta import CHUNK, gated_delta, gated_norm, step_by_step

# Shorter than a chunk, one and several of them, and one more token; in an order in which no sample stands by its length.
LENGTHS = [3, 2 * CHUNK + 1, 1, CHUNK, CHUNK + 6]


def inputs(
    lengths: list[int], heads: tuple[int, int] = (2, 4), sizes: tuple[int, int] = (8, 6), dtype=torch.float64
) -> list[Tensor]:
    """Query, key, value, decay and rate; states fade by a third in ten tokens, so that one sample would be seen in the next."""
    generator = torch.Generator().manual_seed(0)
    (groups, count), (key, value), t = heads, sizes, sum(lengths)

    def made(*shape: int) -> Tensor:
        return torch.randn(t, *shape, generator=generator, dtype=torch.float64)

    found = [made(groups, key), made(groups, key), made(count, value), -made(count).abs() * 0.05, made(count).sigmoid()]
    return [one.to(dtype).requires_grad_() for one in found]


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(output, leaves, grad.to(output.dtype)))


@pytest.mark.parametrize("heads", [(2, 4), (3, 3), (1, 4)], ids=str)
def test_is_the_recurrence(heads: tuple[int, int]) -> None:
    leaves = inputs(LENGTHS, heads)
    chunked, steps = (rule(*leaves, LENGTHS) for rule in (gated_delta, step_by_step))
    assert (chunked - steps).abs().max() < 1e-13
    for one, other in zip(gradients(chunked, leaves), gradients(steps, leaves), strict=True):
        assert (one - other).abs().max() < 1e-12


def test_keys_that_are_alike_and_states_that_stay() -> None:
    """The hardest system to solve: every token replaces what the one before it wrote."""
    query, key, value, decay, beta = inputs([3 * CHUNK])
    leaves = [query, (key[:1] + 0.01 * key).detach().requires_grad_(), value, (0.0 * decay).detach().requires_grad_(), beta]
    chunked, steps = (rule(*leaves, [3 * CHUNK]) for rule in (gated_delta, step_by_step))
    assert (chunked - steps).abs().max() < 1e-12
    for one, other in zip(gradients(chunked, leaves), gradients(steps, leaves), strict=True):
        assert (one - other).abs().max() < 1e-10 * other.abs().max().clamp_min(1)


def test_states_that_fade_at_once() -> None:
    """Decays of e^-1000: nothing overflows, and tokens read what they wrote themselves."""
    query, key, value, decay, beta = inputs([CHUNK + 2], dtype=torch.float32)
    leaves = [query, key, value, (decay * 0 - 1000).detach().requires_grad_(), beta]
    chunked, steps = (rule(*leaves, [CHUNK + 2]) for rule in (gated_delta, step_by_step))
    assert (chunked - steps).abs().max() < 1e-6
    assert all(one.isfinite().all() for one in gradients(chunked, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    plain = inspect.unwrap(torch_chunk_gated_delta_rule)  # where the package is installed, its kernels stand in its place
    leaves = inputs([150], dtype=torch.float32)
    q, k, v, g, beta = (one.to(dtype) if n != 3 else one for n, one in enumerate(leaves))
    ours = gated_delta(q, k, v, g, beta, [150])
    q, k = (one.repeat_interleave(2, dim=1) for one in (q, k))
    theirs, _ = plain(*(one[None] for one in (q, k, v)), g=g[None], beta=beta[None], use_qk_l2norm_in_kernel=True)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert ours.dtype == dtype and (ours - theirs[0]).abs().max() < limit * theirs.abs().max()
    for one, other in zip(gradients(ours, leaves), gradients(theirs[0], leaves), strict=True):
        assert (one - other).abs().max() < 5 * limit * other.abs().max()


def test_samples_begin_anew() -> None:
    """A sample's result is that of the sample alone, to the bit, whatever stands before it."""
    leaves = inputs(LENGTHS, dtype=torch.float32)
    packed = gated_delta(*leaves, LENGTHS).split(LENGTHS)
    apart = zip(*(one.split(LENGTHS) for one in leaves), strict=True)
    assert all(torch.equal(one, gated_delta(*sample, [len(one)])) for one, sample in zip(packed, apart, strict=True))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution(width: int) -> None:
    """Beside torch's own, sample by sample; samples shorter than it, too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, width, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = causal_conv(x, weight, LENGTHS)

    def alone(sample: Tensor) -> Tensor:
        return F.conv1d(sample.t()[None], weight.unsqueeze(1), padding=width - 1, groups=5)[0, :, : len(sample)].t()

    wanted = torch.cat([alone(sample) for sample in x.split(LENGTHS)])
    assert (ours - wanted).abs().max() < 1e-13
    for one, other in zip(gradients(ours, [x, weight]), gradients(wanted, [x, weight]), strict=True):
        assert (one - other).abs().max() < 1e-11


def test_gated_norm_is_that_of_transformers() -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    for dtype in (torch.float32, torch.bfloat16):
        norm = Qwen3_5RMSNormGated(6).to(dtype)
        x, gate = (torch.randn(7, 6, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (0, 1))
        torch.nn.init.uniform_(norm.weight, -1, 1)
        assert torch.equal(gated_norm(x, gate, norm.weight, norm.variance_epsilon), norm(x, gate))


def packaged(query, key, value, decay, beta, *, cu_seqlens, use_qk_l2norm_in_kernel):
    """The package's function, played by ours: rows of one, and where samples begin."""
    assert use_qk_l2norm_in_kernel and len(query) == 1
    return gated_delta(*(one[0] for one in (query, key, value, decay, beta)), cu_seqlens.diff().tolist())[None], None


WRONG = {
    "": packaged,
    "its result is off": lambda *rows, cu_seqlens, **more: packaged(*rows, cu_seqlens=cu_seqlens[[0, -1]], **more),
    "its gradient of the decay is off": lambda q, k, v, g, beta, **more: packaged(q, k, v, g.detach() + 0 * g, beta, **more),
    "RuntimeError: no such instruction": None,
}


@pytest.mark.parametrize("found", WRONG)
def test_a_package_is_used_if_it_gives_what_ours_gives(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor, **__: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fla, "_interface", lambda: (WRONG[found] or broken, ""))
    said = fla._probed.__wrapped__(torch.device("cpu"), torch.float32, 2, 4, 16, 8)
    assert said.startswith(found) and bool(said) == bool(found)


@pytest.mark.parametrize(("triton", "tilelang"), [("3.6", False), ("3.6", True), ("3.7.1", False)])
def test_what_the_package_itself_refuses_is_not_compiled_first(
    triton: str, tilelang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper GPUs its backward pass raises with some versions of Triton, unless another compiler is there."""
    chunk_o, common = ModuleType("chunk_o"), ModuleType("fla.ops.common")
    chunk_o.IS_NVIDIA_HOPPER, chunk_o.TRITON_ABOVE_3_4_0, chunk_o.TRITON_ABOVE_3_7_1 = True, True, triton == "3.7.1"  # type: ignore[attr-defined]
    common.chunk_o = chunk_o  # type: ignore[attr-defined]
    for name, module in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.common", common)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: object() if tilelang else None)
    calls: list[int] = []
    monkeypatch.setattr(fla, "_interface", lambda: (lambda *rows, **more: calls.append(1) or packaged(*rows, **more), ""))
    said = fla._probed.__wrapped__(torch.device("cpu"), torch.float32, 2, 4, 16, 8)
    refused = triton == "3.6" and not tilelang
    assert bool(said) == refused == (not calls) and ("tilelang" in said) == refused


def test_a_package_that_is_not_there_is_not_missed() -> None:
    leaves = inputs([9], dtype=torch.float32)
    assert fla.refusal(leaves[0], leaves[2]) == "" and "the slow way" in fla.describe(leaves[0], leaves[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("heads", [(2, 4), (16, 32)], ids=str)
def test_on_a_gpu(heads: tuple[int, int]) -> None:
    """Ours there is ours here; the package, where it is installed and has no objection to this GPU itself, gives the same."""
    leaves = inputs(LENGTHS, heads, (128, 128), torch.float32)
    here = gated_delta(*leaves, LENGTHS)
    moved = [one.detach().cuda().requires_grad_() for one in leaves]
    there = gated_delta(*moved, LENGTHS)
    assert (here - there.cpu()).abs().max() < 1e-5
    half = [one if n == 3 else one.to(torch.bfloat16) for n, one in enumerate(moved)]
    reason = fla.refusal(half[0], half[2])
    print(fla.describe(half[0], half[2]))
    assert reason in (None, "") or "Triton" in reason, reason
    if reason is None:
        got = fla.flash_linear_attention(*half, LENGTHS)
        assert (got.float() - there).norm() < 2e-2 * there.norm()
