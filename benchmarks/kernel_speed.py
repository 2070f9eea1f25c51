"""Speed of each part of a training step on one GPU, beside what the card's memory or matrix units allow.

python benchmarks/kernel_speed.py [--shapes 0.5b,1.5b,3b] [--parts norm,swiglu,...] [--tune]

Times are medians of triton.testing.do_bench (cold L2 cache) on random data. `tune` also times other block sizes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from megaswift.megatron.kernels import (
    attention,
    embedding,
    fp8_linear,
    fp8_quantize,
    fused_adamw,
    linear_cross_entropy,
    main_grad,
    rms_norm,
    rope,
    swiglu,
)

SHAPES = {  # tokens a step, hidden, layers, query heads, kv heads, head size, ffn
    "0.5b": (32768, 896, 24, 14, 2, 64, 4864),
    "1.5b": (16384, 1536, 28, 12, 2, 128, 8960),
    "3b": (8192, 2048, 36, 16, 2, 128, 11008),
}
VOCAB, SEQ = 151936, 4096


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def time_ms(run: Callable[[], Any]) -> float:
    return do_bench(run, warmup=15, rep=60, return_mode="median")


class Table:
    """Prints one line a measurement; a failure is a line too."""

    def __init__(self, copy_rate: float) -> None:
        self.copy_rate = copy_rate  # bytes/ms

    def memory(self, name: str, run: Callable[[], Any], moved: float) -> None:
        self._line(name, run, lambda ms: f"{moved / ms / 1e9:6.2f} TB/s, {100 * moved / ms / self.copy_rate:5.1f} % of copy")

    def matrix(self, name: str, run: Callable[[], Any], flops: float) -> None:
        self._line(name, run, lambda ms: f"{flops / ms / 1e9:6.0f} TFLOP/s")

    def _line(self, name: str, run: Callable[[], Any], describe: Callable[[float], str]) -> None:
        try:
            ms = time_ms(run)
            print(f"{name:58} {ms:9.4f} ms  {describe(ms)}", flush=True)
        except Exception as error:
            print(f"{name:58} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)


def copy_rate() -> float:
    source = rand(1 << 30)
    target = torch.empty_like(source)
    return 4 * source.numel() / time_ms(lambda: target.copy_(source))


def norm(table: Table, shape: str, tune: bool) -> None:
    tokens, hidden = SHAPES[shape][:2]
    x, d, w, g, gt = rand(tokens, hidden), rand(tokens, hidden), rand(hidden), rand(tokens, hidden), rand(tokens, hidden)
    size = 2.0 * x.numel()
    total, _, rstd = rms_norm.forward(x, d, w, 1e-6)
    table.memory(f"{shape} add+norm forward", lambda: rms_norm.forward(x, d, w, 1e-6), 4 * size)
    best, fit = rms_norm._BACKWARD, rms_norm._WARPS_ON_PROCESSOR
    for tile, warps in (
        (((1024, 8), 40), ((1024, 8), 48), ((1024, 8), 80), ((2048, 8), 40), ((2048, 16), 24)) if tune else ((best, fit),)
    ):
        rms_norm._BACKWARD, rms_norm._WARPS_ON_PROCESSOR = tile, warps
        table.memory(
            f"{shape} norm+add backward tile {tile} warps {warps}", lambda: rms_norm.backward(g, gt, total, w, rstd), 4 * size
        )
    rms_norm._BACKWARD, rms_norm._WARPS_ON_PROCESSOR = best, fit
    table.memory(f"{shape} torch rms_norm forward", lambda: F.rms_norm(x, (hidden,), w, 1e-6), 2 * size)


def swiglu_part(table: Table, shape: str, tune: bool) -> None:
    tokens, ffn = SHAPES[shape][0], SHAPES[shape][6]
    x, g = rand(tokens, 2 * ffn), rand(tokens, ffn)
    size, block = 2.0 * g.numel(), swiglu._BLOCK
    for other in (512, 1024, 2048) if tune else (block,):
        swiglu._BLOCK = other
        table.memory(f"{shape} swiglu forward block {other}", lambda: swiglu.forward(x), 3 * size)
        table.memory(
            f"{shape} swiglu backward block {other}", lambda: swiglu.backward_in_place(g, x, recompute=False), 5 * size
        )
        table.memory(
            f"{shape} swiglu backward+recompute block {other}", lambda: swiglu.backward_in_place(g, x, recompute=True), 6 * size
        )
    swiglu._BLOCK = block


def rope_part(table: Table, shape: str, tune: bool) -> None:
    tokens, _, _, heads, groups, dim, _ = SHAPES[shape]
    batch = tokens // SEQ
    mixed = rand(SEQ, batch, (heads + 2 * groups) * dim)
    cos, sin = rand(SEQ, 1, dim), rand(SEQ, 1, dim)
    parts = tuple(rand(SEQ, batch, n, dim) for n in (heads, groups, groups))
    moved, bias = 4.0 * mixed.numel(), rand(mixed.shape[2])
    table.memory(
        f"{shape} split+rotate forward", lambda: rope._launch_split(mixed, bias, parts, cos, sin, backward=False), moved
    )
    table.memory(
        f"{shape} split+rotate backward", lambda: rope._launch_split(mixed, bias, parts, cos, sin, backward=True), moved
    )


def attention_part(table: Table, shape: str, tune: bool) -> None:
    tokens, _, _, heads, groups, dim, _ = SHAPES[shape]
    batch = tokens // SEQ
    q, k, v = (rand(SEQ, batch, n, dim).requires_grad_() for n in (heads, groups, groups))
    flops = 2.0 * batch * heads * SEQ * SEQ * dim

    def expanded() -> torch.Tensor:
        a, b, c = q.permute(1, 2, 0, 3), *(x.repeat_interleave(heads // groups, 2).permute(1, 2, 0, 3) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_cudnn_attention(a, b, c, None, True, 0.0, True, False)[0]

    def flash() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return attention.dense_causal(q, k, v, backend="torch")

    for name, run in (
        ("cuDNN, grouped", lambda: attention.dense_causal(q, k, v)),
        ("cuDNN, K/V expanded", expanded),
        ("flash", flash),
    ):
        table.matrix(f"{shape} attention forward, {name}", run, flops)
        try:
            out = run()
        except Exception:
            continue
        grad = torch.randn_like(out)
        back = lambda out=out, grad=grad: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)  # noqa: E731
        table.matrix(f"{shape} attention backward, {name}", back, 2.5 * flops)


def packed(table: Table, shape: str, tune: bool) -> None:
    _, _, _, heads, groups, dim, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 1500, (40,), generator=generator).tolist()
    total, longest = sum(lengths), max(lengths)
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    q, k, v = (rand(total, 1, n, dim).requires_grad_() for n in (heads, groups, groups))
    flops = 2.0 * heads * dim * sum(n * n for n in lengths)
    run = lambda: attention.packed_causal(q, k, v, edges, longest)  # noqa: E731
    table.matrix(f"{shape} packed ({total} tokens, 40 samples) forward, flash", run, flops)
    out = run()
    grad = torch.randn_like(out)
    table.matrix(
        f"{shape} packed backward, flash", lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), 2.5 * flops
    )
    a, b, c = (x.detach().squeeze(1) for x in (q, k, v))
    layout = (edges, edges, longest, longest)
    ragged = functools.partial(torch.ops.aten._cudnn_attention_forward, a, b, c, None, *layout, True, 0.0, True, False)
    table.matrix(f"{shape} packed forward, cuDNN ragged", ragged, flops)
    try:
        res = ragged()
        print("    ragged against flash:", float((res[0].float().reshape(out.shape) - out.float()).norm() / out.float().norm()))
        g = grad.view(total, heads, dim)
        none = torch.empty(0, device="cuda", dtype=torch.bfloat16)
        back = lambda: torch.ops.aten._cudnn_attention_backward(  # noqa: E731
            g, a, b, c, res[0], res[1], res[6], res[7], none, edges, edges, longest, longest, 0.0, True
        )
        table.matrix(f"{shape} packed backward, cuDNN ragged", back, 2.5 * flops)
        want = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        print(
            "    its gradients:",
            [float((x.float() - y.squeeze(1).float()).norm() / y.float().norm()) for x, y in zip(back(), want)],
        )
    except Exception as error:
        print("    ragged failed:", str(error)[:300])
    _flex(table, shape, (q, k, v), lengths, flops, out)


def _flex(
    table: Table, shape: str, parts: tuple[torch.Tensor, ...], lengths: list[int], flops: float, want: torch.Tensor
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    try:
        q, k, v = (x.detach().permute(1, 2, 0, 3).requires_grad_() for x in parts)
        ids = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), torch.tensor(lengths, device="cuda"))
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), None, None, len(ids), len(ids), device="cuda"
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        run = lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
        table.matrix(f"{shape} packed forward, FlexAttention", run, flops)
        out = run()
        grad = torch.randn_like(out)
        print(
            "    flex against flash:",
            float((out.permute(2, 0, 1, 3).reshape(want.shape).float() - want.float()).norm() / want.float().norm()),
        )
        table.matrix(
            f"{shape} packed backward, FlexAttention",
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
            2.5 * flops,
        )
    except Exception as error:
        print("    flex failed:", str(error)[:300])


def loss(table: Table, shape: str, tune: bool) -> None:
    tokens, hidden = SHAPES[shape][:2]
    h, w = rand(tokens, hidden).requires_grad_(), (rand(VOCAB, hidden) * 0.02).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,))
    w.main_grad = torch.zeros(w.shape, device="cuda")
    flops = 6.0 * tokens * hidden * VOCAB
    for mib in (640, 1280, 2560) if tune else (1280,):
        run = functools.partial(linear_cross_entropy.linear_cross_entropy, h, w, labels, grad_scale=1.0, chunk_bytes=mib << 20)
        table.matrix(f"{shape} loss and all gradients, chunks of {mib} MiB", run, flops)
    rows = 4096
    logits = torch.mm(h[:rows].detach(), w.detach().t())
    stats, one, mine = torch.empty(3, rows, device="cuda"), torch.ones((), device="cuda"), labels[:rows].cuda()
    for block, warps, many in (
        ((8192, 32, 1), (8192, 16, 1), (4096, 16, 2), (4096, 16, 1), (2048, 8, 2), (8192, 32, 2)) if tune else ((8192, 32, 1),)
    ):
        launch = lambda block=block, warps=warps, many=many: linear_cross_entropy._row_kernel[(132 * many,)](  # noqa: E731
            logits, mine, stats, one, VOCAB, 0, VOCAB, rows, block, True, num_warps=warps
        )
        table.memory(
            f"{shape} softmax and gradient of {rows} rows, block {block} warps {warps} programs {many}",
            launch,
            4.0 * logits.numel(),
        )


def linear_sizes(shape: str) -> dict[str, tuple[int, int]]:
    """Output and input features of a block's linear layers."""
    _, hidden, _, heads, groups, dim, ffn = SHAPES[shape]
    return {
        "qkv": ((heads + 2 * groups) * dim, hidden),
        "proj": (hidden, heads * dim),
        "fc1": (2 * ffn, hidden),
        "fc2": (hidden, ffn),
    }


def matrices(table: Table, shape: str, tune: bool) -> None:
    tokens, hidden, *_, ffn = SHAPES[shape]
    for name, (n, k) in linear_sizes(shape).items():
        x, w, g, b = rand(tokens, k), rand(n, k), rand(tokens, n), rand(n)
        target = torch.zeros(n, k, device="cuda")
        flops = 2.0 * tokens * n * k
        for part, run in {
            "forward": functools.partial(F.linear, x, w, b if name == "qkv" else None),
            "input gradient": functools.partial(torch.matmul, g, w),
            "weight gradient, added to fp32": functools.partial(main_grad.add_product, target, g, x),
            "weight gradient, overwriting fp32": functools.partial(main_grad.add_product, target, g, x, overwrite=True),
        }.items():
            table.matrix(f"{shape} {name} {part}", run, flops)
    a, w, residual = rand(tokens, ffn), rand(hidden, ffn), rand(tokens, hidden)
    table.matrix(f"{shape} fc2 then residual add", lambda: torch.matmul(a, w.t()).add_(residual), 2.0 * tokens * hidden * ffn)
    table.matrix(f"{shape} fc2 with residual as addmm", lambda: torch.addmm(residual, a, w.t()), 2.0 * tokens * hidden * ffn)


def fp8_quantisation(table: Table, shape: str, tune: bool) -> None:
    tokens, *_, ffn = SHAPES[shape]
    usual = (fp8_quantize._WHOLE_ROW, fp8_quantize._ROWS_TILE)
    columns = (fp8_quantize._COLUMN_TILE, fp8_quantize._TRANSPOSE_TILE)
    both = rand(tokens, 2 * ffn)
    for whole, tile in (usual, (32768, 4096), (8192, 4096), (4096, 4096), (16384, 2048), (4096, 8192)) if tune else (usual,):
        fp8_quantize._WHOLE_ROW, fp8_quantize._ROWS_TILE = whole, tile
        label = f"tile {tile}, whole rows to {whole}"
        for name, (n, k) in linear_sizes(shape).items():
            for what, matrix in (("input", rand(tokens, k)), ("gradient", rand(tokens, n)), ("weight", rand(n, k))):
                run = functools.partial(fp8_quantize.quantize_rows, matrix)
                table.memory(f"{shape} {name} rows of the {what}, {label}", run, 3.0 * matrix.numel())
        for keep, moved in ((True, 7.0), (False, 5.0)):
            run = functools.partial(fp8_quantize.quantize_swiglu, both, tokens, keep=keep)
            table.memory(f"{shape} swiglu and its rows, keep {keep}, {label}", run, moved * tokens * ffn)
    fp8_quantize._WHOLE_ROW, fp8_quantize._ROWS_TILE = usual
    others = (((16, 512, 8), (64, 64)), ((64, 128, 4), (64, 128)), ((32, 256, 8), (128, 128)))
    for pair in (columns, *others) if tune else (columns,):
        fp8_quantize._COLUMN_TILE, fp8_quantize._TRANSPOSE_TILE = pair
        for name, (n, k) in linear_sizes(shape).items():
            run = functools.partial(fp8_quantize.quantize_columns, rand(n, k))
            table.memory(f"{shape} {name} columns of the weight, tiles {pair}", run, 5.0 * n * k)
    fp8_quantize._COLUMN_TILE, fp8_quantize._TRANSPOSE_TILE = columns


def fp8_products(table: Table, shape: str, tune: bool) -> None:
    tokens = SHAPES[shape][0]
    products, product = fp8_linear.Fp8LinearOps(), fp8_linear.scaled_product
    for name, (n, k) in linear_sizes(shape).items():
        x, w, g = rand(tokens, k), rand(n, k), rand(tokens, n)
        x8, w8, g8 = (fp8_quantize.quantize_rows(matrix) for matrix in (x, w, g))
        turned, flops = fp8_quantize.quantize_columns(w), 2.0 * tokens * n * k
        for part, run in {
            "forward, bf16": functools.partial(F.linear, x, w),
            "forward, FP8, product alone": functools.partial(product, x8, w8, torch.bfloat16, fast=True),
            "forward, FP8, with quantisation": functools.partial(products.forward, x, w),
            "input gradient, bf16": functools.partial(torch.matmul, g, w),
            "input gradient, FP8, product alone": functools.partial(product, g8, turned, torch.bfloat16, fast=False),
            "input gradient, FP8, fast sums": functools.partial(product, g8, turned, torch.bfloat16, fast=True),
            "input gradient, FP8, with quantisation": functools.partial(products.input_grad, g, w),
        }.items():
            table.matrix(f"{shape} {name} {part}", run, flops)


def optimizer(table: Table, shape: str, tune: bool) -> None:
    _, hidden, layers, heads, groups, dim, ffn = SHAPES[shape]
    layer = [(heads + 2 * groups) * dim * hidden, hidden * heads * dim, 2 * ffn * hidden, ffn * hidden, hidden, hidden]
    numels = [VOCAB * hidden] + layer * min(layers, 12)
    params, grads, m, v = ([torch.randn(n, device="cuda") for n in numels] for _ in range(4))
    v = [x.abs_() for x in v]
    weights = [torch.empty(n, device="cuda", dtype=torch.bfloat16) for n in numels]
    one, count = torch.ones((), device="cuda"), float(sum(numels))
    options = dict(step=3, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor=one)
    chunk, block = fused_adamw._CHUNK, fused_adamw._BLOCK
    for other in ((32768, 1024), (32768, 2048), (8192, 1024), (131072, 2048)) if tune else ((chunk, block),):
        fused_adamw._CHUNK, fused_adamw._BLOCK = other
        one_table, two = fused_adamw.AddressTable(), fused_adamw.AddressTable()
        step = lambda t=one_table: fused_adamw.adamw_step(params, grads, m, v, weights, **options, table=t)  # noqa: E731
        table.memory(f"{shape} adamw, {count / 1e6:.0f} M parameters, chunk {other}", step, 30 * count)
        table.memory(f"{shape} sum of squares, chunk {other}", lambda t=two: fused_adamw.sum_of_squares(grads, t), 4 * count)
    fused_adamw._CHUNK, fused_adamw._BLOCK = chunk, block


def embed(table: Table, shape: str, tune: bool) -> None:
    tokens, hidden = SHAPES[shape][:2]
    target, grad, ids = (
        torch.zeros(VOCAB, hidden, device="cuda"),
        rand(tokens, hidden),
        torch.randint(0, VOCAB, (tokens,), device="cuda"),
    )
    table.memory(f"{shape} embedding gradient", lambda: embedding.scatter_add(target, grad, ids, 0), 10.0 * grad.numel())
    same = torch.full_like(ids, 7)
    table.memory(
        f"{shape} embedding gradient, one token only", lambda: embedding.scatter_add(target, grad, same, 0), 10.0 * grad.numel()
    )


PARTS = dict(
    norm=norm,
    swiglu=swiglu_part,
    rope=rope_part,
    attention=attention_part,
    packed=packed,
    loss=loss,
    matrices=matrices,
    fp8_quantisation=fp8_quantisation,
    fp8_products=fp8_products,
    optimizer=optimizer,
    embedding=embed,
)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,1.5b,3b")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    table = Table(copy_rate())
    print(torch.cuda.get_device_name(), torch.__version__, f"copy {table.copy_rate / 1e9:.2f} TB/s")
    table.matrix("matrix product 8192^3", functools.partial(torch.mm, rand(8192, 8192), rand(8192, 8192)), 2.0 * 8192**3)
    for part in options.parts.split(","):
        for index, shape in enumerate(options.shapes.split(",")):
            PARTS[part](table, shape, options.tune and index == 0)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
