"""Whole runs of preference training: beside plain PyTorch at every layout, resumed elsewhere, exported, refused where they must be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaswift.commands.export import export_main
from megaswift.commands.rlhf import rlhf_main
from megaswift.commands.sft import sft_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import ExportArguments, RlhfArguments, SftArguments, VerifyArguments
from megaswift.data.batches import Batches
from megaswift.data.store import TokenRows
from megaswift.errors import DataError, UserError
from megaswift.parity.adapters import PeftSide
from megaswift.run.objective import check_same_objective
from megaswift.run.spec import RUN_FILE, Run
from megaswift.store.manifest import read_manifest
from megaswift.store.paths import REFERENCE_FILE
from tests.ranks import RankPool
from tests.rlhf.pairs import PlainStep, forget, job, kept_files, say, write_pairs
from tests.runs import changed
from tests.training import Trained, long, tiny_start, train

STEPS, BETA = 6, 0.2
COMMON: dict[str, Any] = {
    "beta": BETA, "max_steps": STEPS, "save_steps": 3, "eval_steps": 3, "gradient_accumulation_steps": 4, "adam_epsilon": 1e-4,
    "dataset_test_ratio": 0.2, "learning_rate": 3e-4, "arguments": RlhfArguments,
}  # fmt: skip
LORA: dict[str, Any] = {"sft_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.2, "learning_rate": 1e-2}
LONE = (1, 1, 1, False, 1)  # one process: tp, pp, sequence parallel, cp
# name -> processes and options; the global batch is 8 rows at all of them
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1 padded": (1, {"batch_size": 2, "padding_free": False}),
    "dp2": (2, {"gradient_accumulation_steps": 4}),
    "tp2 sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2, "batch_size": 2, "gradient_accumulation_steps": 2}),
    "cp2": (2, {"cp": 2}),
}


SOME = tuple(LAYOUTS) if "MEGASWIFT_LONG" in os.environ else ("dp1 padded", "tp2 sp", "cp2")  # in the default suite


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


def dpo(policy: Tensor, tokens: Tensor, reference: Tensor, good: Tensor) -> Tensor:
    h = (policy[good] - reference[good]) - (policy[~good] - reference[~good])
    return -F.logsigmoid(BETA * h).mean()


def plain(run: Trained, folder: Path) -> tuple[list[float], np.ndarray]:
    """Losses of the same run in transformers and torch, and what its model said of all answers before the first step."""
    spec = Run.read(run.directory / RUN_FILE)
    args = SftArguments(
        learning_rate=spec.schedule.learning_rate,
        adam_epsilon=spec.optimizer.epsilon,
        max_grad_norm=spec.optimizer.max_grad_norm,
    )
    data = TokenRows.open(spec.data.train)
    side = PlainStep(dpo, folder, args, "fp32", spec.schedule.train_iters, spec.schedule.warmup_iters, PeftSide.of(spec))
    with torch.no_grad():
        base = PlainStep(dpo, folder, args, "fp32", 1, 0)
        said = [float(base.log_probability(sample)) for row in range(len(data)) for sample in data.samples(row)]
    data.reference = np.array(said, np.float32)
    batches = Batches(
        data, micro_batch_size=1, global_batch_size=spec.batch.global_batch_size, dp_rank=0, dp_size=1, seed=spec.seed, pad_id=0
    )
    ids = [batches.sample_ids(step) for step in range(spec.schedule.train_iters)]
    return [step.loss for step in side.run(data, ids, keep=False)], data.reference


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=long)])
def test_six_steps_are_those_of_torch_at_every_layout(
    method: str, start: Path, rows: Path, pool: RankPool, tmp_path: Path
) -> None:
    """The reference is computed by each run itself, at its own layout."""
    wanted: Any = None
    for name, (world, options) in ((name, LAYOUTS[name]) for name in SOME):
        words = COMMON | (LORA if method == "lora" else {}) | options
        run = train(pool, tmp_path / name, world, resume_from_checkpoint=str(start), dataset=[str(rows)], **words)
        forget(run.directory)
        wanted = wanted or plain(run, start.parent / "hf")
        losses, said = wanted
        assert losses[0] == pytest.approx(np.log(2), abs=1e-6), "what is trained is the reference yet"
        assert max(abs(loss - losses[0]) for loss in losses) > 0.05, "and no longer"
        with np.load(run.directory / REFERENCE_FILE) as file:
            assert np.abs(file["train"] - said).max() < 2e-5, name
            assert len(file["val"]) == 16
        assert run.losses == pytest.approx(losses, abs=2e-5), name
        [first, *_, last] = [row for row in run.rows if "loss" in row]
        assert abs(last["rewards/margins"]) > 0.01 and first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        evaluated = [row for row in run.rows if "eval_loss" in row]
        assert len(evaluated) == 2
        for row in evaluated:
            margin = row["eval_rewards/chosen"] - row["eval_rewards/rejected"]
            assert row["eval_rewards/margins"] == pytest.approx(margin, abs=1e-6)
            assert 0 <= row["eval_rewards/accuracies"] <= 1 and row["eval_logps/chosen"] < 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_goes_on_with_the_reference_that_it_began_with(
    method: str, start: Path, rows: Path, pool: RankPool, tmp_path: Path
) -> None:
    """Three steps at one layout and three at another are six, and nothing asks for --beta again."""
    words = COMMON | (LORA if method == "lora" else {})
    common: dict[str, Any] = {**words, "resume_from_checkpoint": str(start), "dataset": [str(rows)]}
    whole = train(pool, tmp_path / "whole", 2, **common, tp=2)
    other = tmp_path / "other"
    shutil.copytree(whole.directory, other / "tiny-chat-tp2-pp1" / whole.directory.name)
    shutil.rmtree(other / "tiny-chat-tp2-pp1" / whole.directory.name / "iter_0000006")
    files = kept_files(whole.directory)
    assert all(path.is_file() for path in files)
    forget(whole.directory)
    if method == "full":
        shutil.move(start, tmp_path / "away")  # nothing is left that the reference could be computed from
    asked = {name: value for name, value in common.items() if name != "beta"} | {"tp": 1, "pp": 2, "batch_size": 2}
    try:
        again = train(pool, other, 2, **asked, resume=True, model_type="tiny-chat")
    finally:
        if method == "full":
            shutil.move(tmp_path / "away", start)
    assert again.losses[-3:] == pytest.approx(whole.losses[-3:], abs=2e-5)
    assert again.eval_losses[-1] == pytest.approx(whole.eval_losses[-1], abs=2e-5)
    assert method == "lora" or not any(path.exists() for path in files), "nothing was computed"
    assert read_manifest(again.directory / "iter_0000006")["objective"]["beta"] == BETA

    with pytest.raises(UserError, match="was trained by swift rlhf --rlhf_type dpo, and does not go on by swift sft"):
        plain_words = {name: value for name, value in words.items() if name not in ("beta", "arguments")}
        sft_main(SftArguments(resume_from_checkpoint=str(again.directory), dataset=[str(rows)], **plain_words))
    with pytest.raises(UserError, match="does not go on by swift rlhf --rlhf_type cpo"):
        rlhf_main(RlhfArguments(resume_from_checkpoint=str(again.directory), dataset=[str(rows)], rlhf_type="cpo", max_steps=8))
    if method == "full":
        folder = export_main(ExportArguments(ckpt_dir=str(again.directory), to_hf=True))
        assert verify_main(VerifyArguments(directory=str(folder), deep=True)) is not False


def test_the_reference_is_kept_for_the_next_run_over_the_same(start: Path, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    """In the cache by rows and weights; other weights, or other rows, do not find it."""
    common: dict[str, Any] = {**COMMON, "dataset": [str(rows)], "max_steps": 1}
    first = train(pool, tmp_path / "first", 1, **common, resume_from_checkpoint=str(start))
    kept = kept_files(first.directory)
    for file in kept:  # a mark that only who reads the file can show
        with np.load(file) as values:
            found = {"about": values["about"], "values": values["values"] - 1}
        np.savez(file, **found)
    second = train(pool, tmp_path / "second", 1, **common, resume_from_checkpoint=str(start))
    assert kept_files(second.directory) == kept
    with np.load(first.directory / REFERENCE_FILE) as one, np.load(second.directory / REFERENCE_FILE) as other:
        assert np.array_equal(other["train"], one["train"] - 1)
    forget(first.directory)
    changed = tiny_start(tmp_path / "changed", "qwen2", seed=3, tie_word_embeddings=True)
    third = train(pool, tmp_path / "third", 1, **common, resume_from_checkpoint=str(changed))
    with np.load(first.directory / REFERENCE_FILE) as one, np.load(third.directory / REFERENCE_FILE) as other:
        assert np.abs(other["train"] - one["train"]).max() > 0.1
    fewer = write_pairs(tmp_path / "fewer.jsonl", 30)
    fourth = train(pool, tmp_path / "fourth", 1, **common | {"dataset": [str(fewer)]}, resume_from_checkpoint=str(start))
    assert not {*kept_files(third.directory), *kept_files(fourth.directory)} & set(kept)


def test_a_reference_is_read_only_for_its_own_rows_and_weights(start: Path, tmp_path: Path) -> None:
    """What a run's file and the cache hold is asked for by both."""
    from megaswift.train.reference import kept, write

    path, run = tmp_path / "values.npz", job(start, write_pairs(tmp_path / "rows.jsonl"), *LONE, batch=1)
    data = TokenRows.open(run.data.train)
    said = np.arange(len(data.sizes), dtype=np.float32)
    write(path, "these weights", {"train": data.fingerprint}, {"train": said})
    assert np.array_equal(kept(path, "train", data, "these weights"), said)  # type: ignore[arg-type]
    assert kept(path, "train", data, None) is not None, "a run that goes on has its own, whatever it began from"
    assert kept(path, "train", data, "other weights") is None and kept(path, "val", data, None) is None
    write(path, "these weights", {"train": "other rows"}, {"train": said})
    assert kept(path, "train", data, "these weights") is None
    path.write_bytes(path.read_bytes()[:-40])
    assert kept(path, "train", data, "these weights") is None, "a torn file"


def test_a_run_goes_on_by_its_own_method_alone() -> None:
    manifest = {"objective": {"kind": "dpo", "beta": 0.1}}
    check_same_objective(RlhfArguments(), manifest, "here")
    check_same_objective(SftArguments(), {}, "here")
    for args, found in ((SftArguments(), manifest), (RlhfArguments(rlhf_type="cpo"), manifest), (RlhfArguments(), {})):
        with pytest.raises(UserError, match="does not go on by"):
            check_same_objective(args, found, "here")


def stopped(path: str) -> str:
    """On one rank: what a run says that is told to stop on rank 1 while its reference is computed."""
    import os

    from megaswift.errors import Stopped
    from megaswift.launch.signals import StopSignals
    from megaswift.train.loop import train as train_rank

    if os.environ["RANK"] == "1":
        StopSignals.asked = property(lambda self: "SIGTERM")  # type: ignore[assignment]
    try:
        train_rank(Run.read(Path(path)))
    except Stopped as error:
        return error.text()
    return "done"


def test_a_signal_is_heard_while_the_reference_is_computed(start: Path, pool: RankPool, tmp_path: Path) -> None:
    run = job(start, write_pairs(tmp_path / "rows.jsonl", 20), 2, 1, 1, False, 1, batch=1)
    run = changed(run, run_dir=str(tmp_path), logging_dir=str(tmp_path / "runs"))
    run.write(tmp_path / RUN_FILE)
    forget(tmp_path)
    one, other = pool.run(2, stopped, str(tmp_path / RUN_FILE))
    assert "a signal to another rank before a step was made, during the reference of the training rows" in one
    assert "stopped by SIGTERM" in other and not (tmp_path / REFERENCE_FILE).exists()


KTO: dict[str, Any] = {"rlhf_type": "kto", "beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 2.0}


LABELLED_AT = ("dp1 padded", "tp2 sp", "pp2", "cp2") if "MEGASWIFT_LONG" in os.environ else ("dp1 padded", "pp2")


def test_kto_with_unbalanced_labels(start: Path, pool: RankPool, tmp_path: Path) -> None:
    """Four good answers for each bad one: rewards part, on held-out answers too, the same at other layouts, and a run goes on."""
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for k in range(60):
            good = k % 5 != 0
            answer = say(k, 3) if good else say(k, 3).upper()
            turns = [{"role": "user", "content": say(k * 3, 2)}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns, "label": good}) + "\n")
    words = COMMON | KTO | {"max_steps": 12, "save_steps": 6, "eval_steps": 6, "learning_rate": 1e-3}
    found = {}
    for name, (world, options) in {key: LAYOUTS[key] for key in LABELLED_AT}.items():
        run = train(pool, tmp_path / name, world, resume_from_checkpoint=str(start), dataset=[str(rows)], **words | options)
        found[name] = run
        for key in ("loss", "kl", "rewards/chosen", "rewards/rejected"):
            wanted = [row.get(key) for row in found["dp1 padded"].rows if "loss" in row]
            assert [row.get(key) for row in run.rows if "loss" in row] == pytest.approx(wanted, abs=5e-5), f"{name}: {key}"
    first, *_, last = [row for row in found["pp2"].rows if "loss" in row]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["loss"] == pytest.approx(0.5 * (0.5 * 0.8 + 2.0 * 0.2), abs=0.2)
    evaluated = [row for row in found["pp2"].rows if "eval_loss" in row]
    assert evaluated[-1]["eval_rewards/margins"] > evaluated[0]["eval_rewards/margins"] > 0 and last["loss"] < first["loss"]
    shutil.rmtree(found["pp2"].directory / "iter_0000012")
    again = train(
        pool, tmp_path / "pp2", 2, dataset=[str(rows)], resume=True, model_type="tiny-chat", tp=2, pp=1, cp=1,
        **{name: value for name, value in words.items() if name not in ("beta", "desirable_weight", "undesirable_weight")},
    )  # fmt: skip
    assert again.losses[-6:] == pytest.approx(found["pp2"].losses[-6:], abs=5e-5)


@pytest.mark.parametrize(
    "options", [{"rlhf_type": "orpo"}, {"rlhf_type": "simpo"}, {"rlhf_type": "cpo"}, {"rlhf_type": "ipo"}], ids=str
)
def test_the_other_methods_run(options: dict[str, Any], start: Path, rows: Path, pool: RankPool, tmp_path: Path) -> None:
    """With their own defaults; only those that compare with a reference compute one."""
    words = {name: value for name, value in COMMON.items() if name != "beta"} | {"max_steps": 2, **options}
    run = train(pool, tmp_path, 2, resume_from_checkpoint=str(start), dataset=[str(rows)], tp=2, packing=True, **words)
    assert (run.directory / REFERENCE_FILE).exists() == (options["rlhf_type"] == "ipo")
    plan = json.loads((run.directory / "plan.json").read_text())["objective"]
    assert plan["beta"] == {"simpo": 2.0}.get(options["rlhf_type"], 0.1)
    assert (
        all(np.isfinite(loss) for loss in run.losses) and "eval_rewards/margins" in run.rows[-2] | run.rows[-1] | run.rows[-3]
    )


def test_rows_that_the_reference_did_not_see_are_refused_when_full_training_goes_on(
    start: Path, rows: Path, pool: RankPool, tmp_path: Path
) -> None:
    words: dict[str, Any] = {**COMMON, "max_steps": 1, "save_steps": 1}
    run = train(pool, tmp_path / "run", 1, **words, resume_from_checkpoint=str(start), dataset=[str(rows)])
    more = write_pairs(tmp_path / "more.jsonl", 44)
    again: dict[str, Any] = {**words, "max_steps": 2, "resume_from_checkpoint": str(run.directory), "dataset": [str(more)]}
    with pytest.raises(UserError, match="the training rows"):
        train(pool, tmp_path / "run", 1, **again)
    with pytest.raises((DataError, AssertionError), match="log-probabilities of these training rows are not known"):
        train(pool, tmp_path / "run", 1, **again, allow_data_change=True)


def test_what_a_run_says_of_its_objective(
    start: Path, rows: Path, pool: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, Any] = {**COMMON, "max_steps": 1, "label_smoothing": 0.1, "rpo_alpha": 0.25}
    run = train(pool, tmp_path, 1, **words, resume_from_checkpoint=str(start), dataset=[str(rows)])
    out = capsys.readouterr().out
    assert (
        "learnt: dpo (sigmoid), beta 0.2, label smoothing 0.1, loss of the chosen answer x 0.25; reference: the weights" in out
    )
    plan = json.loads((run.directory / "plan.json").read_text())
    assert plan["objective"]["kind"] == "dpo" and plan["objective"]["nll_weight"] == 0.25
    [row] = [row for row in run.rows if "loss" in row]
    assert row["nll_loss"] > 0 and row["supervised_tokens_per_second"] > 0
    assert (run.directory / "images" / "rewards_margins.png").is_file()
