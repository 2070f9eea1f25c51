"""The words and tables of docs/parity.md, made from the results of parity_document.py. No number is written by hand."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INTRO = """# Numerical truth

Two questions, answered by measurements that one command repeats: does the loss depend on the layout, and is it the loss that
transformers gives? Everything below is written by `make parity` from the results of its run; nothing is typed in.
To ask the same about your own run, use `swift parity` with the flags of `swift sft`:

```shell
NPROC_PER_NODE=2 swift parity --resume_from_checkpoint smollm2-135m-instruct-tp1-pp2 --dataset rows.jsonl --pp 2 --steps 5
swift parity --resume_from_checkpoint smollm2-135m-instruct-tp1-pp2 --dataset rows.jsonl --layouts "tp1 pp2 dp2 tp3,sp deterministic"
NPROC_PER_NODE=2 swift parity --resume_from_checkpoint smollm2-135m-instruct-tp1-pp2 --dataset rows.jsonl --pp 2 --learning true
```

`swift sft --deterministic true` takes only operations that give the same bits in each run at one layout. Before the first step it
measures what they cost on this machine and prints it; `deterministic` among the `--layouts` of `swift parity` times whole steps.
"""

NORM = """
### The gradient norm, by hand

The log's `grad_norm` and that of `swift parity` are one number: the Euclidean norm of the gradient of the mean loss over all supervised
tokens of the global batch, before clipping. `swift parity` leaves the samples of the first step in `step1.jsonl`, and this gives the
same norm from transformers alone:

```python
import json
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("smollm2-135m-instruct", dtype=torch.float32)
model.get_input_embeddings().padding_idx = None
samples = [json.loads(line) for line in open("step1.jsonl")]
tokens = sum(label != -100 for sample in samples for label in sample["labels"][1:])
for sample in samples:
    ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels, num_items_in_batch=tokens).loss.backward()
print(sum(float(weight.grad.double().square().sum()) for weight in model.parameters()) ** 0.5)
```

Another number comes out where one of these is left out:

- **padding_idx.** transformers gives the embedding row of `pad_token_id` no gradient. In SmolLM2, as in many models, that token also ends
  every turn, so it stands in every row; the engine trains its row like all others.
- **The tokens.** A mean of the micro batches' means, or of the rows', weighs tokens by the row that they stand in. The sum over the
  global batch is divided once, as transformers' own Trainer does with `num_items_in_batch`.
- **Clipping.** Both norms are from before `--max_grad_norm`, as `clip_grad_norm_` returns it.
- **Tied embeddings** are one weight with one gradient, the sum over both of its uses. The copies of two pipeline stages count once, and so
  do weights that every rank of `--tp` has. Rows of a padded vocabulary have no gradient.
- **Precision.** torch's `clip_grad_norm_` on a CPU adds up a tensor's squares in fp32 one after the other: with SmolLM2's embedding, 28 million
  values, it can be off by 5e-4. The sum above is in fp64. In bf16 a model of transformers keeps its gradients in bf16; the engine and the
  reference add them up in fp32, so compare in fp32.
- **The log** has the loss as a mean over `--logging_steps`, and the norm of the last of these steps. In fp16 a step that overflowed has none.
"""


def write_document(path: Path, results: dict[str, Any]) -> None:
    """Write the document, and beside it the picture of the learning curves."""
    sections = [INTRO, _machine()]
    for name, make in (
        ("matrix", _matrix), ("transformers", _transformers), ("faults", _faults), ("noise", _noise), ("learning", _learning),
        ("cognition", _cognition), ("gpu_truth", _gpu),
    ):  # fmt: skip
        if name in results:
            sections.append(make(results[name]))
    if "learning" in results:
        picture = path.with_name("parity_learning.png")
        _draw(picture, results["learning"])
        place = next(k for k, section in enumerate(sections) if section.startswith("## Learning works"))
        sections[place] += f"\n![training and validation loss of both]({picture.name})\n"
    path.write_text("\n".join(section.strip() + "\n" for section in sections), encoding="utf-8")


def _machine() -> str:
    import megatron.core
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"Measured with torch {torch.__version__}, Megatron-Core {megatron.core.__version__}, transformers {transformers.__version__}, "
        f"on {platform.machine()} Linux, {gpu}. Ranks are processes over {'NCCL' if torch.cuda.is_available() else 'gloo'}. "
        "Tiny models have four layers, random weights, and no bias, norm or weight that is zero or one.\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def largest(found: dict[str, Any], layout: str) -> float:
    """The largest relative difference of a layout's losses from those of the first."""
    first = next(iter(found["layouts"].values()))
    return max(abs(value - wanted) / abs(wanted) for value, wanted in zip(found["layouts"][layout], first))


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _matrix(found: dict[str, Any]) -> str:
    plain, packed, more = found["plain"], found["packed"], found["more"]
    names = list(plain)
    first = next(iter(plain.values()))
    steps = len(next(iter(first["layouts"].values())))
    over = [f"{kind} {name}: {item['error']}" for kind in found for name, item in found[kind].items() if item["error"]]
    verdict = "Every layout is within it." if not over else "Outside of it: " + "; ".join(over)
    worst = max(largest(item, layout) for kind in found.values() for item in kind.values() for layout in item["layouts"])

    def rows(kind: dict[str, Any]) -> Iterable[list[str]]:
        for layout in list(next(iter(kind.values()))["layouts"])[1:]:
            yield [f"`{layout}`", *(_small(largest(item, layout)) for item in kind.values())]

    ends = ", ".join(f"{name} {_ends(item)}" for name, item in plain.items())
    return (
        "## One loss at every layout\n\n"
        f"fp32, {steps} steps, learning rate 1e-3, the same global batches. Each figure is the largest relative difference of the loss "
        f"from `tp1` at any step; the limit is {first['limits'][0]:.0e}. {verdict} The largest is {worst:.1e}; fp32 resolves "
        f"1.2e-7. Losses of `tp1`, first and last step: {ends}.\n\n"
        + table(["layout", *names], rows(plain))
        + "\n`sp` is sequence parallelism; `epN` and `etpN` spread experts, with enough processes beside them (`ep2,dp2`). `mbsN` runs N rows in one micro batch, end to end with attention within each row; `padded` "
        "pads them to the longest instead. `mbs4` is one big batch where `tp1` accumulates 4 micro batches. `resume` saves after half "
        "of the steps and goes on from there, with new models and process groups.\n\n"
        "The same with rows packed to 48 tokens (`--packing true`), against the packed `tp1`:\n\n"
        + table(["layout", *packed], rows(packed))
        + (_more(rows(more), list(more)) if more else "")
    )


def _more(rows: Iterable[list[str]], names: list[str]) -> str:
    return (
        "\nMore layouts of one family, with global batches of 8 rows (`mbs8` is one big batch; `math` takes torch's plain "
        "attention):\n\n" + table(["layout", *names], rows)
    )


def _ends(item: dict[str, Any]) -> str:
    losses = next(iter(item["layouts"].values()))
    return f"{losses[0]:.4f} to {losses[-1]:.4f}"


def _transformers(found: dict[str, Any]) -> str:
    rows = []
    for family, layouts in found.items():
        for layout, item in layouts.items():
            steps = item["reference"]
            gradient = max(tuple(step["worst_gradient"]) for step in steps)
            weight = max(tuple(step["worst_weight"]) for step in steps)
            rows.append([
                family, layout, _small(max(step["loss_difference"] for step in steps)),
                _small(max(step["grad_norm_difference"] for step in steps)), f"{_small(gradient[0])} `{gradient[1]}`",
                f"{_small(weight[0])} `{weight[1]}`", "holds" if item["error"] is None else item["error"],
            ])  # fmt: skip
    steps = len(next(iter(next(iter(found.values())).values()))["reference"])
    return (
        "## The loss of transformers\n\n"
        f"The same rows through transformers' model and `torch.optim.AdamW`, sample by sample, without padding and packing. fp32, {steps} "
        "steps; the largest relative difference of the loss, of the gradient's norm, of any tensor's gradient and of any tensor after "
        "the update, over all steps. The reference is built without `padding_idx`.\n\n"
        + table(["family", "engine at", "loss", "gradient norm", "worst gradient", "worst weight", "verdict"], rows)
        + NORM
    )


def _faults(found: dict[str, Any]) -> str:
    rows = [
        [fault, f"`{' '.join(item['options']) or 'tp1'}`", item["with"] or "NOT CAUGHT", item["without"] or "parity holds"]
        for fault, item in found.items()
    ]
    caught = sum(item["with"] is not None and item["without"] is None for item in found.values())
    return (
        "## Faults that it catches\n\n"
        f"Each fault is planted into the engine (`tests/parity/planted.py`), and `swift parity` is run with and without it. {caught} of "
        f"{len(found)} are caught and not found where they are not.\n\n"
        + table(["fault", "layout", "with it", "without it"], rows)
    )


def _noise(found: dict[str, Any]) -> str:
    first, limits = next(iter(found["layouts"])), found["limits"]
    steps = len(limits)
    plain = found["layouts"][first]
    shown = sorted({1, min(5, steps), min(10, steps), steps})
    spread = [
        [f"seed {k}", *(_small(abs(run[s - 1] - plain[s - 1]) / plain[s - 1]) for s in shown), ""]
        for k, run in enumerate(found["noise"], 1)
    ]

    def rows() -> Iterable[list[str]]:
        for layout, losses in list(found["layouts"].items())[1:]:
            differences = [abs(value - wanted) / wanted for value, wanted in zip(losses, plain)]
            share = max(d / limit for d, limit in zip(differences, limits))
            yield [f"`{layout}`", *(_small(differences[s - 1]) for s in shown), f"{share:.2f}"]

    return (
        "## bf16: the noise is measured\n\n"
        "In bf16 there is no single right loss: another order of summation gives another one. So the limit is measured. The first "
        "layout runs twice more from weights that are moved at random by up to one unit in the last place, once for each of two seeds; "
        f"a layout may differ by 3 times the largest distance among these runs up to the same step. {steps} steps of a tiny qwen2:\n\n"
        + table(
            ["relative difference at step", *map(str, shown), "largest share of the limit"],
            [*spread, ["limit", *(_small(limits[s - 1]) for s in shown), "1"], *rows()],
        )
        + f"\n{'Parity holds.' if found['error'] is None else found['error']} A fault that is smaller than the noise cannot be seen in "
        "bf16; ask in fp32 (`--dtype fp32`).\n"
    )


def _learning(found: dict[str, Any]) -> str:
    curves = found["learning"]
    evaluated = {int(step): pair for step, pair in curves["eval_loss"].items()}
    every = max(1, len(curves["loss"]) // 8)
    rows = []
    for step, (engine, reference) in enumerate(curves["loss"], start=1):
        if step == 1 or step % every == 0 or step in evaluated:
            pair = [f"{value:.6f}" for value in evaluated[step]] if step in evaluated else ["", ""]
            rows.append([str(step), f"{engine:.6f}", f"{reference:.6f}", *pair])
    worst = max(abs(a - b) / b for a, b in curves["loss"])
    return (
        "## Learning works\n\n"
        f"SmolLM2-135M-Instruct on `{found['data']}`, one epoch ({curves['rows']} packed rows, {len(curves['loss'])} steps, "
        f"{curves['tokens']:,} tokens), by `swift sft` on two pipeline stages and by transformers with `torch.optim.AdamW` on the same "
        f"global batches, schedule and clipping (`{' '.join(found['options'])}`). The final losses on {curves['eval_rows']} held-out "
        f"rows differ by {100 * curves['difference']:.4f} %; {100 * curves['limit']:.1f} % are allowed. No step's loss differs by more "
        f"than {100 * worst:.4f} %.\n\n"
        + table(["step", "loss, engine", "loss, transformers", "validation, engine", "validation, transformers"], rows)
    )


def _cognition(found: dict[str, Any]) -> str:
    answers, curves = found["answers"], found["learning"]
    rows = [
        [question, *(_cell(answers[who][k]) for who in ("before", "engine", "transformers"))]
        for k, question in enumerate(found["questions"])
    ]
    same = sum(a == b for a, b in zip(answers["engine"], answers["transformers"]))
    return (
        f"The same for `{found['data']}` with a new name ({len(curves['loss'])} steps; final validation losses differ by "
        f"{100 * curves['difference']:.4f} %). Greedy answers before, and after training both ways; {same} of {len(rows)} are the same "
        "word for word:\n\n" + table(["question", "before", "engine", "transformers"], rows)
    )


def _gpu(found: dict[str, Any]) -> str:
    """What benchmarks/gpu_truth.py found."""
    truth, strict, parity = found["truth"], found["deterministic"], found["parity"]
    more = strict["ms"] - truth["engine_ms"]
    rows = [
        [
            str(row["step"]),
            f"{row['engine']:.6f}",
            f"{row['transformers']:.6f}",
            _small(row["difference"]),
            _small(row["noise"]),
        ]
        for row in truth["steps"]
        if row["step"] in (1, 2, 5, 10, 15, len(truth["steps"]))
    ]
    ratios = "; ".join(
        f"step {step}: median {item['median_ratio']:.2f}, largest {item['largest_ratio']:.2f}"
        for step, item in truth["gradients"].items()
    )
    equal = strict["losses_bit_equal"] and strict["weights_bit_equal"]
    again = "are" if truth["plain_again_bit_equal"] else "are not"
    verdicts = ", ".join(f"{dtype} {'holds' if item['exit'] == 0 else item['problem']}" for dtype, item in parity.items())
    return (
        "## On a GPU\n\n"
        f"`benchmarks/gpu_truth.py` on one {truth['device']}: a Qwen2 shape of {truth['parameters'] / 1e6:,.0f} million random weights in bf16, "
        f"{len(truth['steps'])} steps of {truth['tokens_a_step']:,} packed tokens. Noise is the distance of three engine runs whose weights "
        "differ by one rounding.\n\n"
        + table(["step", "loss, engine", "loss, transformers", "relative difference", "noise"], rows)
        + f"\nGradients of every parameter, difference to transformers over noise: {ratios}. `swift parity` on a small model: {verdicts}.\n\n"
        f"With `--deterministic true` two runs are {'bit-equal' if equal else 'NOT bit-equal'} in losses, gradient norms and "
        f"{strict['weights']:,} weights; a step takes {strict['ms']:.1f} ms, {truth['engine_ms']:.1f} ms without ({more:+.1f} ms, "
        f"{100 * more / truth['engine_ms']:+.0f} %{', measured in two calls on two machines of one type' if found.get('two_calls') else ''}). "
        f"Two runs without it {again} bit-equal.\n"
    )


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 110 else line[:107] + "..."


def _draw(path: Path, found: dict[str, Any]) -> None:
    """Training loss as lines and validation loss as points, the engine over transformers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = found["learning"]
    figure, axis = pyplot.subplots(figsize=(8, 3.6))
    steps = range(1, len(curves["loss"]) + 1)
    axis.plot(steps, [pair[1] for pair in curves["loss"]], label="transformers", linewidth=4, color="#f2b277")
    axis.plot(steps, [pair[0] for pair in curves["loss"]], label="engine", linewidth=1.2, color="#1f4e79")
    places = [int(step) for step in curves["eval_loss"]]
    axis.plot(
        places,
        [pair[1] for pair in curves["eval_loss"].values()],
        "o",
        markersize=9,
        color="#f2b277",
        label="transformers, validation",
    )
    axis.plot(
        places,
        [pair[0] for pair in curves["eval_loss"].values()],
        "x",
        markersize=7,
        color="#1f4e79",
        label="engine, validation",
    )
    axis.set_xlabel("step")
    axis.set_ylabel("loss per supervised token")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
