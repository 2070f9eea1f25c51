"""Weights in 4 and 8 bits: the nearest values, in bitsandbytes' order of bits, whole, in parts and of many experts."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.conftest import LIMITS, off

from megaswift.megatron.kernels.int8 import pack_int8
from megaswift.megatron.kernels.lora import LoraCall, Parts, lora_linear
from megaswift.megatron.kernels.nf4 import BLOCK, CODE, Packed, pack, small_scales, unpack
from megaswift.megatron.kernels.packed import PACKED_OPS, PackedExperts, dense, joined, rounded
from megaswift.megatron.packed_weights import packed_part
from megaswift.models.parameters import Arrangement, grouped, stacked, whole


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest value of each weight, and the scale of each block, one by one in fp64."""
    blocks = weight.double().reshape(weight.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(-1)
    distance = (blocks / scales.unsqueeze(-1)).unsqueeze(-1) - torch.tensor(CODE, dtype=torch.float64)
    return distance.abs().argmin(-1).reshape(weight.shape), scales


def test_each_is_the_nearest_value() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.05
    packed, (index, scales) = pack(weight), nearest(weight)
    assert packed.data.dtype == torch.uint8 and packed.shape == weight.shape
    assert packed.nbytes == weight.numel() // 2 + 4 * weight.numel() // BLOCK
    assert torch.equal(packed.data >> 4, index[:, ::2].to(torch.uint8)), "the first of two stands in the upper half"
    assert torch.equal(packed.data & 15, index[:, 1::2].to(torch.uint8))
    assert torch.equal(packed.scales, scales.float())
    again = pack(packed.weight(torch.float32))
    assert torch.equal(again.data, packed.data) and torch.equal(again.scales, packed.scales), "a packed weight packs as it is"


def test_the_bytes_are_those_of_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 makes of these weights (quantize_4bit, nf4, blocks of 64), by its SHA-256."""
    number = torch.arange(64 * 128)
    weight = (
        ((number * number * 31 + number * 97) % 1009 - 504).view(64, 128) / 512 * torch.arange(1.0, 65.0).unsqueeze(1)
    )  # exact everywhere
    packed = pack(weight)
    assert hashlib.sha256(packed.data.numpy().tobytes()).hexdigest() == BYTES
    assert pack(torch.zeros(2, 64)).data.unique().tolist() == [0x77], "zeros are zeros"


def test_scales_in_8_bits_are_those_of_bitsandbytes() -> None:
    """What its kernel in PyTorch makes (quantize_blockwise, runs of 256, dynamic map), as that for CUDA; by SHA-256.

    Its own kernel for CPUs finds the nearest value by a table and takes the next one in 1 of 600 cases.
    """
    number = torch.arange(256 * 256)
    weight = ((number * number * 31 + number * 97) % 1009 - 504).view(256, 256) / 512 * torch.arange(1.0, 257.0).unsqueeze(1)
    packed = pack(weight)
    assert isinstance(packed.scales, torch.Tensor)
    small = small_scales(packed.scales)
    assert hashlib.sha256(small.codes.numpy().tobytes()).hexdigest() == SMALL_BYTES
    assert small.second.shape == (4,) and torch.equal(small.offsets, packed.scales.mean().expand(256))
    assert float((small.values() - packed.scales).abs().max()) < 0.01 * float(packed.scales.max())
    assert small_scales(torch.zeros(2, 1)).values().tolist() == [[0.0], [0.0]]
    both = Packed(packed.data, small)
    assert torch.equal(both.weight(torch.float32), rounded(weight, 4, True))
    assert not torch.equal(rounded(weight, 4, True), rounded(weight, 4, False))


SMALL_BYTES = "f1693787121aad2f778787924d4b8d5d89bd6624b11b13d815f839b88032f4e6"


def test_8_bits_are_those_of_bitsandbytes() -> None:
    """What its int8_vectorwise_quant (0.50.2) makes of these weights, by its SHA-256; the scales are the rows' largest magnitudes."""
    number = torch.arange(64 * 128)
    weight = ((number * number * 31 + number * 97) % 1009 - 504).view(64, 128) / 512 * torch.arange(1.0, 65.0).unsqueeze(1)
    packed = pack_int8(weight)
    assert (
        hashlib.sha256(packed.data.numpy().tobytes()).hexdigest()
        == "0f8be294a8741bc7b138668a20741763fb6f56ebf77132de0ff12866cc6b8ba8"
    )
    assert torch.equal(packed.scales[:, 0], weight.abs().amax(1)) and packed.nbytes == weight.numel() + 4 * 64
    assert float(((packed.weight(torch.float32) - weight).abs() / packed.scales).max()) <= 0.5001 / 127
    assert torch.equal(packed.weight(torch.bfloat16), packed.weight(torch.float32).bfloat16()), "rounded once"
    assert not pack_int8(torch.zeros(2, 64)).weight(torch.float32).any()


FORMS = {"4 bits": (4, False), "4 bits, scales in 8": (4, True), "8 bits": (8, False)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arrangement", [grouped(2, 48, 16, 16), stacked(64, 96), whole(160, 1)], ids=["qkv", "gate_up", "row"])
def test_ranks_hold_parts_of_the_whole(arrangement: Arrangement, form: str) -> None:
    """Scales, means and runs are those of each Hugging Face matrix, at any --tp."""
    torch.manual_seed(3)
    bits, is_double = FORMS[form]
    weight = torch.randn(arrangement.size, 384) * torch.rand(arrangement.size, 1)  # a run of 256 ends within a row
    wanted = arrangement.pack([rounded(matrix, bits, is_double) for matrix in arrangement.unpack(weight)])
    for tp in (1, 2):
        parts = [packed_part(weight, arrangement, tp, rank, bits, is_double) for rank in range(tp)]
        found = arrangement.merge([part.weight(torch.float32) for part in parts])
        assert torch.equal(found, wanted)
    large = torch.randn(512, 4096)
    size = packed_part(large, stacked(256, 256), 1, 0, bits, is_double).nbytes / large.numel()
    assert size < {"4 bits": 0.5626, "4 bits, scales in 8": 0.52, "8 bits": 1.001}[form]


@pytest.mark.parametrize("form", FORMS)
def test_many_experts_are_held_as_one(form: str) -> None:
    torch.manual_seed(4)
    bits, is_double = FORMS[form]
    matrices = [torch.randn(160, 384) * (expert + 1) for expert in range(3)]
    for tp, rank in ((1, 0), (2, 1)):
        parts = [packed_part(matrix, stacked(64, 96), tp, rank, bits, is_double) for matrix in matrices]
        held = PackedExperts(joined(parts), 3)
        assert held.shape == (3, 160 // tp, 384) and len(held) == 3 and held.nbytes == sum(part.nbytes for part in parts)
        assert torch.equal(dense(held, torch.float32), torch.stack([part.weight(torch.float32) for part in parts]))


BYTES = "ea9810909d10056fcedb7683cc802dfc9cf84a96697faef677594af4c182e066"


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_pack_as_in_the_whole(axis: int) -> None:
    weight = torch.randn(64, 256)
    whole, parts = pack(weight), [pack(part) for part in weight.chunk(2, axis)]
    assert torch.equal(torch.cat([part.data for part in parts], axis), whole.data)
    assert torch.equal(torch.cat([part.scales for part in parts], axis), whole.scales)


def test_unpacked_is_the_same_on_every_device(case: tuple[str, torch.dtype]) -> None:
    device, dtype = case
    weight = torch.randn(48, 128, device=device) * 0.1
    packed, small = pack(weight), pack_int8(weight)
    assert torch.equal(unpack(packed.data.cpu(), packed.scales.cpu(), dtype), packed.weight(dtype).cpu())
    assert torch.equal(
        replace(small, data=small.data.cpu(), scales=small.scales.cpu()).weight(dtype), small.weight(dtype).cpu()
    )


@pytest.mark.parametrize("pack", [pack, pack_int8])
def test_products_are_those_of_the_weight_that_it_stands_for(pack: Any, case: tuple[str, torch.dtype]) -> None:
    device, dtype = case
    packed = pack(torch.randn(48, 128, device=device) * 0.1)
    weight = packed.weight(dtype)
    x, y = (torch.ones(5, 2, 128, device=device, dtype=dtype).mul_(0.3).requires_grad_() for _ in range(2))
    bias = torch.randn(48, device=device).to(dtype)
    got = lora_linear(x, packed, bias, None, None, None, LoraCall(Parts((), ()), 0.0, PACKED_OPS))
    want = F.linear(y, weight, bias)
    got.square().sum().backward()
    want.square().sum().backward()
    assert off(got, want) < LIMITS[dtype] and off(x.grad, y.grad) < LIMITS[dtype]
