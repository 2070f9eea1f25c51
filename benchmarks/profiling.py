"""Steps of a trainer by the clock, and what a GPU does in them: kernels by time, and when it had nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_SHOWN, _GAP_US = 40, 20.0


def profiled(step: Callable[[int], Any], steps: int = 3) -> str:
    """Run `steps` steps, the first of them for warming up, and describe the others: ms and calls a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step(0)
        torch.cuda.synchronize()
        for number in range(1, steps):
            step(number)
        torch.cuda.synchronize()
    events = sorted((e for e in recorded.events() if str(e.device_type).endswith("CUDA")), key=lambda e: e.time_range.start)
    events = events[len(events) // steps :]
    counted = steps - 1
    totals: dict[str, list[float]] = {}
    busy, end, gaps = 0.0, events[0].time_range.start, []
    before = ""
    for event in events:
        row = totals.setdefault(event.name, [0.0, 0])
        row[0] += (event.time_range.end - event.time_range.start) / 1e3 / counted
        row[1] += 1 / counted
        if event.time_range.start - end > _GAP_US:
            gaps.append((event.time_range.start - end, before, event.name))
        busy += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end, before = max(end, event.time_range.end), event.name
    span = end - events[0].time_range.start
    lines = [
        f"span {span / 1e3 / counted:.1f} ms a step, busy {busy / 1e3 / counted:.1f} ms, {len(gaps)} gaps over {_GAP_US} us:"
    ]
    lines += [f"  {gap / 1e3:8.2f} ms  {one[:60]} -> {two[:60]}" for gap, one, two in sorted(gaps, reverse=True)[:15]]
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:_SHOWN]
    lines += [f"{ms:9.2f} ms {calls:7.1f}  {name[:110]}" for name, (ms, calls) in ranked]
    return "\n".join(lines)


def measured(trainer: Any, rank: Any, vocab: int, seq: int, micro: int, steps: int) -> tuple[float, float, list[Any]]:
    """(seconds of the median step from the fifth on, the last loss, the batches) of steps with one micro batch of random tokens."""
    import torch

    from megaswift.data.batches import MicroBatch

    generator, positions = torch.Generator().manual_seed(rank.dp_rank), torch.arange(seq).repeat(micro, 1).to(rank.device)
    rows = [torch.randint(0, vocab, (micro, seq + 1), generator=generator) for _ in range(4)]
    batches = [
        MicroBatch(row[:, :-1].contiguous().to(rank.device), row[:, 1:].contiguous(), positions, None, tuple(range(micro)))
        for row in rows
    ]
    times, loss = [time.perf_counter()], 0.0
    for step in range(steps):
        loss = trainer.step([batches[step % 4]]).loss
        times.append(time.perf_counter())
    each = sorted(b - a for a, b in zip(times[4:], times[5:]))
    return each[len(each) // 2], loss, batches


def plain_steps(parameters: list[Any], loss_of: Callable[[int], Any], steps: int) -> tuple[float, float]:
    """(seconds of the median step from the fifth on, the last loss) of a peer's plain loop: clipping at 1, fused AdamW.

    Args:
        loss_of: number of the step -> its loss, with a graph.
    """
    import torch

    cuda = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=cuda)
    times, loss = [time.perf_counter()], torch.zeros(())
    for step in range(steps):
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    each = sorted(b - a for a, b in zip(times[4:], times[5:]))
    return each[len(each) // 2], float(loss.detach())
