"""Full fine-tuning speed on one GPU beside transformers' Trainer with Liger kernels, in one run.

python benchmarks/train_speed.py --peer PATH/peer_hf.py [--shapes 0.5b:8,1.5b:4,3b:2] [--profile] [--out results.json]

Random weights in Qwen2.5 shapes, random tokens, S = 4096, one micro batch a step: forward, backward, optimizer. Ours keeps
fp32 master weights, fp32 moments and fp32 gradients; the peer keeps bf16 only. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "135m": dict(hidden_size=576, num_layers=30, num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),
    "0.5b": dict(hidden_size=896, num_layers=24, num_attention_heads=14, num_query_groups=2, ffn_hidden_size=4864),
    "1.5b": dict(hidden_size=1536, num_layers=28, num_attention_heads=12, num_query_groups=2, ffn_hidden_size=8960),
    "3b": dict(hidden_size=2048, num_layers=36, num_attention_heads=16, num_query_groups=2, ffn_hidden_size=11008),
}
VOCAB = 151936
CHUNK_MIB = {"135m": 2560, "0.5b": 2560, "1.5b": 2560, "3b": 1280}  # logits at a time; the 3B shape nearly fills the card
PEAK = 989.4e12


def model_flops_a_token(shape: str, seq: int, params: int) -> float:
    """6 x parameters in matrix products (tied head counted once) + causal attention, forward and backward."""
    size = SHAPES[shape]
    return 6 * params + 6 * size["num_layers"] * size["hidden_size"] * seq


def join() -> None:
    """A process group of one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29777", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl"
    )  # without device_id: it would make every group's communicator now, 7 GiB in all
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)


# fmt: off
SETTINGS = dict(
    bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, normalization="RMSNorm", gated_linear_unit=True,
    add_bias_linear=False, add_qkv_bias=True, hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=1e-6,
    gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, bias_activation_fusion=False,
    bias_dropout_fusion=False, calculate_per_token_loss=True, activation_func=torch.nn.functional.silu,
)
# fmt: on


def build_model(shape: str, seq: int, way: str) -> Any:
    """A tied GPTModel of fused parts whose forward gives the summed loss."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megaswift.megatron import layer_specs as backend
    from megaswift.megatron.graphs import Graphs
    from megaswift.megatron.kernels.activation_offload import offload_activations
    from megaswift.megatron.kernels.fp8_linear import Fp8LinearOps
    from megaswift.megatron.kernels.linear_cross_entropy import linear_cross_entropy
    from megaswift.megatron.kernels.linear_ops import PLAIN
    from megaswift.megatron.kernels.megatron_layer import FusedMLP, fuse_embedding
    from megaswift.megatron.model import EngineConfig
    from megaswift.models.kinds import Kind

    class Model(GPTModel):
        graphs: Any = None

        def forward(self, tokens: Any, labels: Any, layout: Any) -> Any:
            hidden = self.embedding(input_ids=tokens, position_ids=None)
            hidden = self.graphs(hidden, layout)
            flat, weight = hidden.reshape(-1, hidden.shape[-1]), self.shared_embedding_or_output_weight()
            options = dict(vocab_size=VOCAB, grad_scale=1.0, shared_with_embedding=True, chunk_bytes=CHUNK_MIB[shape] << 20)
            return linear_cross_entropy(flat, weight, labels.t(), **options)[0]

    config = EngineConfig(**SHAPES[shape], **SETTINGS, linear_ops=Fp8LinearOps() if "f" in way else PLAIN)
    FusedMLP.recompute_activation, FusedMLP.recompute_first, FusedMLP.overlap = "k" not in way, "m" in way, "o" in way
    model = Model(
        config,
        backend.block_spec([Kind()] * config.num_layers),
        vocab_size=VOCAB,
        max_sequence_length=seq,
        position_embedding_type="none",
        share_embeddings_and_output_weights=True,
    )
    if "a" in way:
        offload_activations(model.decoder, config.num_layers - 1)
    model.graphs = Graphs(model.decoder, "always" if "g" in way else "never")
    return fuse_embedding(model.cuda())


def build(shape: str, seq: int, way: str) -> tuple[Any, Any, Any]:
    """(bare model, wrapped model, optimizer)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megaswift.megatron import compat
    from megaswift.megatron.kernels.megatron_optimizer import fuse_optimizer

    model = build_model(shape, seq, way)
    config = model.config
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    with model.graphs.stream_of_step():
        ddp = DistributedDataParallel(config, buffers, Float16Module(config, model))
    compat.use_our_adamw()
    options = dict(bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=1.0, weight_decay=0.0)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-5, **options), [ddp])
    moments = "8bit" if "8" in way else "bf16" if "b" in way else "fp32"
    optimizer = fuse_optimizer(optimizer, moments, on_host="h" in way)
    for inner in optimizer.chained_optimizers:
        inner.optimizer.allocate()
    return model, ddp, optimizer


def tables(seq: int, dim: int) -> tuple[Any, Any]:
    """cos and sin, [seq, 1, dim]."""
    inverse = 1e6 ** (-torch.arange(0, dim, 2, device="cuda").float() / dim)
    angles = torch.arange(seq, device="cuda").float()[:, None] * inverse
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def make_step(shape: str, seq: int, micro: int, way: str, accumulate: int) -> tuple[Any, Any]:
    """A function that does step k, and the model."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megaswift.megatron.kernels.linear_ops import linear_ops_of
    from megaswift.megatron.kernels.main_grad import settle_main_grads, zero_main_grads
    from megaswift.megatron.layer_specs import SequenceLayout

    bare, ddp, optimizer = build(shape, seq, way)
    config = bare.config
    layout = SequenceLayout(tables={"main": tables(seq, config.kv_channels)})
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCAB, (micro, seq + 1), generator=generator) for _ in range(4)]
    batches = [(rows[:, :-1].contiguous().cuda(), rows[:, 1:].contiguous()) for rows in batches]
    count = torch.tensor(micro * seq, dtype=torch.int32, device="cuda")

    def finalize(model: Any, tokens: Any, **kwargs: Any) -> None:
        settle_main_grads(ddp)
        finalize_model_grads(model, None, **kwargs)
        optimizer.divisor = tokens

    def forward_step(iterator: Any, model: Any) -> Any:
        tokens, labels = next(iterator)
        return model(tokens, labels, layout), lambda loss: (loss, count, {"loss": loss.detach()})

    config.finalize_model_grads_func = finalize
    config.grad_scale_func = optimizer.scale_loss
    schedule = get_forward_backward_func()
    sizes = dict(
        num_microbatches=accumulate, seq_length=seq, micro_batch_size=micro, decoder_seq_length=seq, forward_only=False
    )

    def step(k: int) -> Any:
        zero_main_grads(ddp)
        optimizer.zero_grad()
        data = iter([batches[(k + i) % 4] for i in range(accumulate)])
        with bare.graphs.step(), linear_ops_of(config).unchanged_weights(accumulate):
            report = schedule(forward_step_func=forward_step, data_iterator=data, model=[ddp], **sizes)
        _, norm, _ = optimizer.step()
        return report[0]["loss"], norm

    return step, bare


def profile(step: Any, first: int) -> tuple[list[tuple[str, float, int]], dict[str, float]]:
    """Kernels as (name, ms a step, calls a step), longest first, and how much of the time the GPU had nothing to do.

    Four steps run under the profiler before the two that count, so that the card is as warm as in training.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        for k in range(6):
            step(first + k)
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: e.time_range.start)
    updates = [index for index, event in enumerate(events) if "adamw_kernel" in event.name]  # the last kernels of a step
    events = events[updates[len(updates) * 4 // 6 - 1] + 1 :]
    totals: dict[str, list[float]] = {}
    busy, end, gaps = 0.0, events[0].time_range.start, []
    for e in events:
        row = totals.setdefault(e.name, [0.0, 0])
        row[0] += e.time_range.elapsed_us() / 2e3
        row[1] += 1
        gaps.append((e.time_range.start - end, e.name))
        busy += max(0.0, e.time_range.end - max(end, e.time_range.start))
        end = max(end, e.time_range.end)
    span = (end - events[0].time_range.start) / 2e3
    waits = [g for g, _ in gaps if g > 0]
    state = dict(
        span_ms=round(span, 2),
        busy_ms=round(busy / 2e3, 2),
        waits=len(waits) // 2,
        waits_ms=round(sum(waits) / 2e3, 2),
        waits_over_20us_ms=round(sum(g for g in waits if g > 20) / 2e3, 2),
    )
    state["longest"] = [(round(g), n[:60]) for g, n in sorted(gaps, reverse=True)[:12]]  # type: ignore[assignment]
    return sorted(((n, t, int(c) // 2) for n, (t, c) in totals.items()), key=lambda row: -row[1]), state


def child(shape: str, seq: int, micro: int, steps: int, way: str, with_profile: bool, accumulate: int = 1) -> None:
    """Measure ours and print one JSON line."""
    import gc
    import warnings

    from megaswift.megatron.kernels.attention import describe

    warnings.filterwarnings("ignore")
    join()
    result: dict[str, Any] = dict(run="ours", shape=shape, seq=seq, micro=micro, way=way, accumulate=accumulate)
    try:
        step, bare = make_step(shape, seq, micro, way, accumulate)
        query = torch.empty(2, 2, bare.config.num_attention_heads, bare.config.kv_channels, device="cuda", dtype=torch.bfloat16)
        params, config, graphs = sum(p.numel() for p in bare.parameters()), bare.config, bare.graphs
        gc.disable()
        times, losses = [], []
        for k in range(steps):
            loss, norm = step(k)
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            losses.append(float(loss) / (micro * seq))
        waits = sorted(b - a for a, b in zip(times[4:], times[5:]))
        median = waits[len(waits) // 2]
        begin = time.perf_counter()
        for k in range(6):  # without waiting for each step, as training runs
            step(k)
        torch.cuda.synchronize()
        free_running = (time.perf_counter() - begin) / 6
        per_second = accumulate * micro * seq / median
        rate = per_second * model_flops_a_token(shape, seq, params)
        result |= dict(
            params=params,
            step_s=round(median, 4),
            free_step_s=round(free_running, 4),
            tok_s=round(per_second),
            tflops=round(rate / 1e12, 1),
            mfu=round(rate / PEAK, 3),
            mem_gb=round(torch.cuda.max_memory_allocated() / 2**30, 1),
            loss=[round(x, 4) for x in (losses[0], losses[-1])],
            grad_norm=round(float(norm), 4),
            attention=describe(query, config.num_query_groups, packed=False),
            graphs=graphs.note or len(graphs.captured),
        )
        if with_profile:
            rows, result["timeline"] = profile(step, steps)
            result["profile"] = [(name[:90], round(ms, 3), calls) for name, ms, calls in rows[:40]]
    except torch.OutOfMemoryError as error:
        result["oom"] = str(error)[:600]
        print(torch.cuda.memory_summary(abbreviated=True), file=sys.stderr)
    print(json.dumps(result), flush=True)


def run(command: list[str]) -> dict[str, Any]:
    """The last JSON line that a command prints."""
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else dict(command=command, failed=done.stderr[-3000:])


def main() -> None:
    """Parse the command line and run ours and the peer for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        default="0.5b:8:k,1.5b:4:k,3b:2",
        help="SHAPE:MICRO_BATCH[:k keeps SwiGLU's result, o overlaps its gradient, b bf16 moments, 8 8-bit ones, f FP8 products, "
        "m computes the MLP's first product again, g CUDA graphs, h optimizer on the host, a activations of all layers but the "
        "last there], comma separated; ways may be joined: 8ha",
    )
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="micro batches in a step of ours; the peer runs one")
    parser.add_argument("--peer", type=Path, help="the peer's script; without it only ours runs")
    parser.add_argument("--without-peer", default="", help="shapes whose peer is not run")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        shape, micro, way = options.child
        child(shape, options.seq, int(micro), options.steps, way, options.profile, options.accumulate)
        return
    results: list[dict[str, Any]] = []
    measured: set[tuple[str, str]] = set()  # the peer runs once for a shape, whatever the number of our ways
    for entry in options.shapes.split(","):
        shape, micro, way = (entry + ":").split(":")[:3]
        command = [
            sys.executable,
            __file__,
            "--seq",
            str(options.seq),
            "--steps",
            str(options.steps),
            "--accumulate",
            str(options.accumulate),
            "--child",
            shape,
            micro,
            way or "-",
        ]
        commands = [command + (["--profile"] if options.profile else [])]
        peer = (shape, micro)
        if options.peer and shape not in options.without_peer.split(",") and peer not in measured:
            measured.add(peer)
            commands.append([sys.executable, str(options.peer), shape, str(options.seq), micro, "1", "0", str(options.steps)])
        for each in commands:
            results.append(run(each))
            print({k: v for k, v in results[-1].items() if k != "profile"}, flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    for result in results:
        for name, ms, calls in result.get("profile", []):
            print(f"{result['shape']:5} {ms:9.3f} ms {calls:5d} x  {name}")


if __name__ == "__main__":
    main()
