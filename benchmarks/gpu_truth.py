"""Numerical truth on one GPU: the engine beside transformers in bf16, determinism and its cost, `swift parity`, and FP8.

    python benchmarks/gpu_truth.py [--device cuda|cpu] [--shape 0.5b|1.5b|3b|tiny] [--steps 20] [--out gpu_truth.json]
    python benchmarks/gpu_truth.py --parts fp8 --shape 1.5b --steps 60

Random weights in a Qwen2 shape, random text. Each part is a process of its own. `truth` runs the same batches through the
engine (once as it is, and once from each of two seeds of bf16 rounding noise, which measures how far apart right answers
are) and through transformers with torch.optim.AdamW over fp32 master weights, sample by sample. Gradients are compared by
parameter after the first and the last step, on the device. `deterministic` runs twice with --deterministic true and
compares losses and weights bit by bit. `parity` is the command itself on a small model. `fp8`, which runs only if it is named,
trains once with --fp8 true and once without, and sets the losses beside those of a bf16 run with rounding noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sft_gpu import make_model, make_rows

LIMIT_FACTOR = 3.0  # transformers may be this many times as far from the engine as the two seeds are


def run_of(work: Path, options: argparse.Namespace, **more: Any) -> tuple[Any, Any, Any]:
    """What `swift sft` would hand to its ranks, with the start and the tokenized rows."""
    from megaswift.config.options import SftArguments
    from megaswift.data.encode import prepare
    from megaswift.run.setup import resolved, template_of
    from megaswift.run.source import resolve_source
    from megaswift.store.cache import cache_root

    args = SftArguments(
        model_type="truth", model_id_or_path=str(work / "model"), dataset=[str(work / "rows.jsonl")], dtype="bf16",
        packing=True, max_length=options.length, gradient_accumulation_steps=options.batch, max_steps=options.steps,
        learning_rate=1e-4, lr_scheduler_type="cosine", dataset_test_ratio=0.0, **more,
    )  # fmt: skip
    start = resolve_source(args)
    template = template_of(start.args, start)
    data = prepare(start.args, template, cache_dir=cache_root(), packing=True)
    return resolved(start.args, start, data, 1, work / "run", template.pad_id), start, data


def hf_gradients(trainer: Any, sums: Any, config: Any) -> dict[str, Any]:
    """Gradients of the mean loss by Hugging Face name, fp32, on the device; the model is whole in this process."""
    from megaswift.models import parameters_of

    local = {
        ".self_attention.linear_qkv.layer_norm_weight": ".input_layernorm.weight",
        ".mlp.linear_fc1.layer_norm_weight": ".pre_mlp_layernorm.weight",
    }
    divisor, found = trainer.gradient_divisor(sums), {}
    weights = dict(trainer.bare_model.named_parameters())
    for parameter in parameters_of(config):
        name = parameter.name
        for fused, plain in local.items():
            name = name.replace(fused, plain)
        gradient = weights[name].main_grad / divisor
        found |= dict(zip((part.name for part in parameter.hf), parameter.arrangement.unpack(gradient)))
    return found


def engine(run: Any, config: Any, device: Any, *, noise: int = 0, gradients: bool = False) -> dict[str, Any]:
    """The steps of a run in this process: losses, norms, milliseconds a step, and what else is asked for."""
    import torch

    from megaswift.megatron import process_groups as ranks
    from megaswift.parity.noise import perturb
    from megaswift.train.setup import open_batches, restore_trainer, to_device

    steps = run.schedule.train_iters
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "ms": [], "gradients": {}}
    with ranks.joined(run.parallel, run.seed) as rank:
        trainer = restore_trainer(run)[0]
        if noise:
            perturb(trainer, noise)
        batches, _ = open_batches(run, rank)
        for step in range(steps):
            micro_batches = to_device(batches.step(step), rank.device)
            synchronize(device)
            began = time.perf_counter()
            sums = trainer.gradients(micro_batches)
            if gradients and step in (0, steps - 1):
                result["gradients"][step + 1] = {name: g.clone() for name, g in hf_gradients(trainer, sums, config).items()}
            done = trainer.update(sums)  # its loss comes to the host, so the step is over
            result["ms"].append(1e3 * (time.perf_counter() - began))
            result["loss"].append(done.loss)
            result["grad_norm"].append(done.grad_norm)
        result["weights"] = torch.cat([weight.detach().reshape(-1) for weight in trainer.bare_model.parameters()])
        result["ids"] = [batches.sample_ids(step) for step in range(steps)]
        trainer.close()
    return result


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def middle(values: list[float]) -> float:
    """The median of the later half: kernels are compiled and caches warm by then."""
    later = sorted(values[len(values) // 2 :])
    return later[len(later) // 2]


def part_truth(work: Path, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """The engine and transformers on the same batches, and the noise between two seeds."""
    import torch

    from megaswift.parity.compare import relative
    from megaswift.parity.noise import SEEDS
    from megaswift.parity.reference import Reference

    run, start, data = run_of(work, options)
    plain = engine(run, start.config, device, gradients=True)
    again = engine(run, start.config, device)
    noisy = [engine(run, start.config, device, noise=seed, gradients=seed == SEEDS[0]) for seed in SEEDS]
    print("engine runs are done; transformers follows", flush=True)
    steps = run.schedule.train_iters
    reference = Reference(work / "model", start.args, "bf16", steps, run.schedule.warmup_iters)
    rows, groups = [], {}
    began = time.perf_counter()
    for number, wanted in enumerate(reference.run(data.train, plain["ids"]), start=1):
        values = [plain["loss"][number - 1], *(other["loss"][number - 1] for other in noisy)]
        rows.append({
            "step": number, "engine": values[0], "transformers": wanted.loss, "difference": relative(values[0], wanted.loss),
            "noise": (max(values) - min(values)) / values[0],
            "norm_engine": plain["grad_norm"][number - 1], "norm_transformers": wanted.grad_norm,
        })  # fmt: skip
        if number in plain["gradients"]:
            groups[number] = gradient_table(plain["gradients"][number], noisy[0]["gradients"][number], wanted.gradients)
    seconds = time.perf_counter() - began
    largest = max(row["noise"] for row in rows)
    return {
        "steps": rows,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "parameters": sum(weight.numel() for weight in reference.masters.values()),
        "noise": largest,
        "difference": max(row["difference"] for row in rows),
        "losses_within_noise": all(row["difference"] <= LIMIT_FACTOR * largest for row in rows),
        "gradients": groups,
        "plain_again_bit_equal": bool((again["weights"] == plain["weights"]).all()) and again["loss"] == plain["loss"],
        "engine_ms": middle(plain["ms"] + again["ms"]),
        "transformers_ms": 1e3 * seconds / steps,
        "tokens_a_step": int(sum(int(data.train.lengths[ids].sum()) for ids in plain["ids"]) / steps),
    }


def gradient_table(mine: dict[str, Any], noisy: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Relative differences of all parameters' gradients: to transformers, and between the engine and its noise seed."""
    from megaswift.parity.compare import group_of, relative_tensor

    table = {
        name: (relative_tensor(mine[name], value), relative_tensor(noisy[name], mine[name])) for name, value in wanted.items()
    }
    groups: dict[str, list[float]] = {}
    for name, pair in table.items():
        kept = groups.setdefault(group_of(name), [0.0, 0.0])
        groups[group_of(name)] = [max(kept[0], pair[0]), max(kept[1], pair[1])]
    ratios = sorted(pair[0] / max(pair[1], 1e-30) for pair in table.values())
    worst = max(table, key=lambda name: table[name][0] / max(table[name][1], 1e-30))
    return {
        "parameters": len(table), "groups": groups, "median_ratio": ratios[len(ratios) // 2], "largest_ratio": ratios[-1],
        "worst": [worst, *table[worst]], "by_parameter": table,
    }  # fmt: skip


def part_deterministic(work: Path, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Two runs with --deterministic true, and what it costs."""
    from megaswift.train.determinism import deterministic

    run, start, _ = run_of(work, options, deterministic=True)
    with deterministic(True):
        first = engine(run, start.config, device)
        second = engine(run, start.config, device)
    return {
        "losses_bit_equal": first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"],
        "weights_bit_equal": bool((first["weights"] == second["weights"]).all()),
        "weights": first["weights"].numel(),
        "ms": middle(first["ms"] + second["ms"]),
        "loss": first["loss"],
    }


def part_parity(work: Path, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """`swift parity` itself on a small model, in fp32 and in bf16."""
    make_rows(work / "few.jsonl", 12000, 600)
    make_model(work / "small", "tiny", 320, 2048)
    found: dict[str, Any] = {}
    swift(work, "export", "--model_type", "small", "--model_id_or_path", "small", "--to_megatron", "true", "--verify", "false",
          "--dtype", "fp32")  # fmt: skip
    for dtype in ("fp32", "bf16"):
        began = time.perf_counter()
        output = f"parity-{dtype}"
        words = ["parity", "--resume_from_checkpoint", "small-tp1-pp1", "--dataset", "few.jsonl", "--dtype", dtype, "--steps", "3",
                 "--learning_rate", "1e-3", "--gradient_accumulation_steps", "4", "--output_dir", output]  # fmt: skip
        code, text = swift(work, *words, check=False)
        content = json.loads(next((work / output).rglob("parity.json")).read_text(encoding="utf-8")) if code in (0, 3) else {}
        found[dtype] = {
            "exit": code,
            "problem": content.get("problem", text[-2000:]),
            "seconds": time.perf_counter() - began,
            "loss_difference": [step["loss_difference"] for step in content.get("reference", [])],
            "worst_gradient": [step["worst_gradient"] for step in content.get("reference", [])],
        }
    return found


def swift(work: Path, *words: str, check: bool = True) -> tuple[int, str]:
    """Run a command; its exit code and what it printed."""
    done = subprocess.run([sys.executable, "-m", "megaswift", *words], cwd=work, capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"swift {words[0]} ended with exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.returncode, done.stdout + done.stderr


def part_fp8(work: Path, options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """The same steps with FP8 products, in bf16, and in bf16 from weights with the rounding noise of one seed."""
    from megaswift.parity.compare import relative
    from megaswift.parity.noise import SEEDS

    runs = {}
    for name, more, noise in (("bf16", {}, 0), ("fp8", {"fp8": True}, 0), ("noisy", {}, SEEDS[0])):
        run, start, _ = run_of(work, options, **more)
        runs[name] = engine(run, start.config, device, noise=noise)
        del runs[name]["weights"]
        print(f"{name} is done", flush=True)
    losses = {name: run["loss"] for name, run in runs.items()}
    rows = [
        {
            "step": step, "bf16": plain, "fp8": fp8, "difference": relative(fp8, plain), "noise": relative(noisy, plain),
            "norm_bf16": runs["bf16"]["grad_norm"][step - 1], "norm_fp8": runs["fp8"]["grad_norm"][step - 1],
        }
        for step, (plain, fp8, noisy) in enumerate(zip(losses["bf16"], losses["fp8"], losses["noisy"]), start=1)
    ]  # fmt: skip
    later = rows[len(rows) // 2 :]
    return {
        "steps": rows,
        "mean_later": {name: sum(row[name] for row in later) / len(later) for name in ("bf16", "fp8")},
        "ms": {name: middle(run["ms"]) for name, run in runs.items()},
    }


USUAL = {"truth": part_truth, "deterministic": part_deterministic, "parity": part_parity}
PARTS = {**USUAL, "fp8": part_fp8}


def show(results: dict[str, Any], out: Any = print) -> None:
    """The results as tables."""
    truth, strict, parity = (results.get(name, {}) for name in USUAL)
    if "steps" in truth:
        out(f"\n{'step':>4} {'engine':>12} {'transformers':>13} {'difference':>11} {'bf16 noise':>11}")
        for row in truth["steps"]:
            if row["step"] in (1, 2, 3, 5, 10, 15, len(truth["steps"])):
                out(f"{row['step']:>4} {row['engine']:>12.6f} {row['transformers']:>13.6f} {row['difference']:>11.1e} {row['noise']:>11.1e}")  # fmt: skip
        out(f"largest difference {truth['difference']:.1e}, largest noise {truth['noise']:.1e}: "
            f"{'within' if truth['losses_within_noise'] else 'OUTSIDE'} {LIMIT_FACTOR:g} x noise")  # fmt: skip
        for step, table in truth["gradients"].items():
            groups = ", ".join(f"{name} {a:.1e} ({b:.1e})" for name, (a, b) in sorted(table["groups"].items()))
            out(f"gradients of {table['parameters']} parameters at step {step}, largest difference (noise): {groups}")
            out(
                f"  difference / noise: median {table['median_ratio']:.2f}, largest {table['largest_ratio']:.2f} at {table['worst'][0]}"
            )
        out(f"engine {truth['engine_ms']:.1f} ms a step of {truth['tokens_a_step']} tokens, transformers sample by sample {truth['transformers_ms']:.1f} ms; "
            f"a plain run repeated is bit-equal: {truth['plain_again_bit_equal']}")  # fmt: skip
    if "ms" in strict:
        out(f"\n--deterministic true, twice: losses and norms bit-equal {strict['losses_bit_equal']}, "
            f"{strict['weights']:,} weights bit-equal {strict['weights_bit_equal']}")  # fmt: skip
        if "engine_ms" in truth:
            more = strict["ms"] - truth["engine_ms"]
            out(
                f"  {strict['ms']:.1f} ms a step, {truth['engine_ms']:.1f} without: {more:+.1f} ms, {100 * more / truth['engine_ms']:+.0f} %"
            )
    for dtype, found in parity.items():
        if isinstance(found, dict) and "exit" in found:
            differences = " ".join(f"{value:.1e}" for value in found["loss_difference"])
            verdict = "holds" if found["exit"] == 0 else f"exit {found['exit']}: {found['problem']}"
            out(f"\nswift parity, {dtype}: {verdict}; loss differences {differences} ({found['seconds']:.0f} s)")
    if "steps" in results.get("fp8", {}):
        show_fp8(results["fp8"], out)
    for name, content in results.items():
        if isinstance(content, dict) and "error" in content:
            out(f"\n{name} FAILED:\n{content['error']}")


def show_fp8(found: dict[str, Any], out: Any) -> None:
    """Every fifth step of the FP8 part, and what it comes to."""
    out(f"\n{'step':>4} {'bf16':>12} {'fp8':>12} {'difference':>11} {'bf16 noise':>11} {'norm bf16':>10} {'norm fp8':>10}")
    for row in found["steps"]:
        if row["step"] == 1 or row["step"] % 5 == 0:
            out(f"{row['step']:>4} {row['bf16']:>12.6f} {row['fp8']:>12.6f} {row['difference']:>11.1e} {row['noise']:>11.1e} "
                f"{row['norm_bf16']:>10.4f} {row['norm_fp8']:>10.4f}")  # fmt: skip
    out(f"largest difference {max(row['difference'] for row in found['steps']):.1e}, largest noise "
        f"{max(row['noise'] for row in found['steps']):.1e}; mean loss of the later half: bf16 {found['mean_later']['bf16']:.6f}, "
        f"fp8 {found['mean_later']['fp8']:.6f}; milliseconds a step: {found['ms']}")  # fmt: skip


def run_part(name: str, options: argparse.Namespace, work: Path) -> None:
    """One part in this process; its result goes to a file."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = PARTS[name](work, options, device)
    (work / f"{name}.json").write_text(json.dumps(result, default=str), encoding="utf-8")


def main() -> None:
    """Make the model, run the parts one after the other, print and write what they found; exit code 1 if something is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=None)
    parser.add_argument("--shape", choices=["0.5b", "1.5b", "3b", "tiny"], default="0.5b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--batch", type=int, default=8, help="packed rows in a step")
    parser.add_argument("--vocab", type=int, default=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(USUAL))
    parser.add_argument("--limit", type=float, default=150.0, help="seconds that one part may take")
    parser.add_argument("--out", type=Path, default=Path("gpu_truth.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.vocab = options.vocab or (320 if options.shape == "tiny" else 151936)
    if options.work:
        run_part(options.parts[0], options, options.work)
        return
    began = time.perf_counter()
    results: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ["MEGASWIFT_CACHE"] = str(work / "cache")
        prepare_inputs(work, options)
        for part in options.parts:
            started = time.perf_counter()
            print(f"{part} ...", flush=True)
            words = [sys.executable, __file__, *sys.argv[1:], "--parts", part, "--work", str(work)]
            try:
                done = subprocess.run(words, check=False, timeout=options.limit, capture_output=True, text=True)
                file = work / f"{part}.json"
                results[part] = (
                    json.loads(file.read_text()) if file.exists() else {"error": (done.stdout + done.stderr)[-6000:]}
                )
            except subprocess.TimeoutExpired as error:
                results[part] = {
                    "error": f"took longer than {options.limit:g} s; so far it printed: {str(error.output)[-2000:]}"
                }
            print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results["seconds"] = time.perf_counter() - began
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)
    print(f"\n{results['seconds']:.0f} s in all; details in {options.out}")
    sys.exit(0 if good(results) else 1)


def good(results: dict[str, Any]) -> bool:
    """Whether every part that ran found what it should."""
    truth, strict, parity = (results.get(name) for name in USUAL)
    return (
        (truth is None or bool(truth.get("losses_within_noise")))
        and (strict is None or bool(strict.get("losses_bit_equal") and strict.get("weights_bit_equal")))
        and (parity is None or all(isinstance(found, dict) and found.get("exit") == 0 for found in parity.values()))
        and "error" not in results.get("fp8", {})
    )


def prepare_inputs(work: Path, options: argparse.Namespace) -> None:
    """A random model and enough rows for all steps."""
    import torch

    make_model(work / "model", options.shape, options.vocab, max(2048, options.length))
    torch.set_default_dtype(torch.float32)  # make_model left it at bf16
    make_rows(work / "rows.jsonl", options.length * options.batch * (options.steps + 2), options.length)


if __name__ == "__main__":
    main()
