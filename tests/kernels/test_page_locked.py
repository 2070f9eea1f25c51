"""Tensors in host memory, and the fused AdamW on state that lies there: the same bits as on the device."""

from __future__ import annotations

import gc

import pytest
import torch

from megaswift.megatron.kernels.fused_adamw import FusedAdamW
from megaswift.megatron.kernels.pinned import HostTensors, PageLocked

SIZES = (1, 17, 4096, 40000, 3_000_001)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


def test_tensors_are_apart_and_stay() -> None:
    """Zeros at first, aligned, without overlap, and alive when their maker is gone."""
    host = HostTensors()
    tensors = [host.zeros((n,), dtype) for n in SIZES for dtype in (torch.float32, torch.bfloat16, torch.uint8)]
    del host
    gc.collect()
    assert all(not tensor.any() and tensor.data_ptr() % 256 == 0 for tensor in tensors)
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:]))
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert HostTensors().zeros((0,), torch.float32).shape == (0,)


def test_memory_that_the_machine_does_not_have() -> None:
    with pytest.raises(MemoryError, match="of host memory"):
        PageLocked(1 << 60)


@pytest.mark.gpu
@needs_gpu
def test_the_gpu_sees_the_memory_of_the_host() -> None:
    """What one writes the other reads, and the GPU's own memory is not used."""
    memory = PageLocked(1 << 20)
    before = torch.cuda.memory_allocated()
    tensor = memory.on_device()
    assert tensor.is_cuda and memory.bytes.is_pinned() and torch.cuda.memory_allocated() == before
    tensor.fill_(7)
    torch.cuda.synchronize()
    assert bool((memory.bytes == 7).all())
    memory.bytes.fill_(9)
    assert bool((tensor == 9).all()) and bool((tensor.cpu() == 9).all())


@pytest.mark.parametrize(
    "device", DEVICES if not torch.cuda.is_available() else DEVICES[1:]
)  # there the host's memory is the GPU's
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_the_same_update(moments: str, device: str) -> None:
    """Weights, master weights and moments of three steps, bit for bit."""
    torch.manual_seed(3)
    host = HostTensors()
    values = [torch.randn(n, device=device) for n in SIZES]
    runs = []
    for where in (None, host):
        params = [value.clone() for value in values]
        for param in params[1:]:
            param.low_precision_weight = torch.zeros(param.shape, dtype=torch.bfloat16, device=device)
            if where is not None:
                param.data = where.copy_of(param)
        optimizer = FusedAdamW([{"params": params, "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95))
        optimizer.moments, optimizer.host = moments, where
        runs.append((params, optimizer))
    for step in range(3):
        for params, optimizer in runs:
            generator = torch.Generator(device).manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, device=device, generator=generator)
            optimizer.gradient_factor = torch.tensor(0.3, device=device)
            optimizer.step()
    for one, other in zip(*(params for params, _ in runs)):
        assert torch.equal(one, other)
        if one.numel() > 1:
            assert torch.equal(one.low_precision_weight, other.low_precision_weight)
        states = [optimizer.state[param] for (_, optimizer), param in zip(runs, (one, other))]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert states[1]["exp_avg"].any()
