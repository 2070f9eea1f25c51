"""Whole runs of models that give scores: resumed elsewhere, exported with proof, loaded by transformers and PEFT, asked by `swift infer`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megaswift.commands.deploy import deploy_main
from megaswift.commands.export import export_main
from megaswift.commands.infer import infer_main
from megaswift.commands.sft import sft_main
from megaswift.commands.verify import verify_main
from megaswift.config.options import (
    DeployArguments,
    ExportArguments,
    InferArguments,
    RlhfArguments,
    SftArguments,
    VerifyArguments,
)
from megaswift.data.batches import make_micro_batch
from megaswift.data.store import TokenRows
from megaswift.data.tokens import pooled_place
from megaswift.errors import UserError
from megaswift.run.source import resolve_source
from megaswift.run.spec import RUN_FILE, Run
from megaswift.train.head import first_scores
from megaswift.weights.hf.config import load_config
from tests import tiny
from tests.ranks import RankPool
from tests.rlhf.pairs import write_pairs
from tests.rlhf.scored import write_classes, write_margins
from tests.training import long, tiny_start, train

COMMON: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "eval_steps": 2, "gradient_accumulation_steps": 4, "dataset_test_ratio": 0.2, "learning_rate": 3e-3,
}  # fmt: skip
LORA: dict[str, Any] = {"sft_type": "lora", "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_start(tmp_path_factory.mktemp("start"), "qwen2", tie_word_embeddings=False)


def scores_of(model: Any, rows: TokenRows, pad: int) -> list[list[float]]:
    """What transformers says of all samples, in one batch padded at the right."""
    samples = [sample.ids.astype(np.int64) for row in range(len(rows)) for sample in rows.samples(row)]
    ids = torch.full((len(samples), max(map(len, samples))), pad)
    for row, sample in zip(ids, samples):
        row[: len(sample)] = torch.from_numpy(sample)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != pad).long()).logits.tolist()


@pytest.mark.parametrize("method", [pytest.param("full", marks=long), "lora"])
def test_a_reward_model_from_start_to_end(method: str, start: Path, pool: RankPool, tmp_path: Path) -> None:
    """Two steps at tp 2 with sequence parallelism and two at pp 2 are four; transformers and `swift infer` give the same scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    rows = write_pairs(tmp_path / "rows.jsonl", 40)
    common: dict[str, Any] = {**COMMON, **(LORA if method == "lora" else {}), "rlhf_type": "rm", "dataset": [str(rows)]}
    run = train(
        pool, tmp_path / "out", 2, RlhfArguments, resume_from_checkpoint=str(start), tp=2, sequence_parallel=True, **common
    )
    assert {"rewards/chosen", "rewards/accuracies"} <= run.rows[-2].keys() | run.rows[0].keys()
    shutil.rmtree(run.directory / "iter_0000004")
    (run.directory / "latest_checkpointed_iteration.txt").write_text("2")
    words = {name: value for name, value in common.items() if name != "rlhf_type"} | {"rlhf_type": "rm"}
    again = train(pool, tmp_path / "out", 2, RlhfArguments, resume_from_checkpoint=str(run.directory), pp=2, **words)
    assert again.losses == pytest.approx(run.losses, abs=2e-6)
    assert again.eval_losses == pytest.approx(run.eval_losses, abs=2e-6)

    made = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True))
    assert verify_main(VerifyArguments(directory=str(made), deep=True)) is not False
    spec = Run.read(run.directory / RUN_FILE)
    held_out = TokenRows.open(str(spec.data.val))
    config = load_config(run.directory)
    assert config.architectures == ["Qwen2ForSequenceClassification"] and config.num_labels == 1
    if method == "full":
        model: Any = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            start.parent / "hf", num_labels=1, pad_token_id=config.pad_token_id, dtype=torch.float32
        )
        model = PeftModel.from_pretrained(base, made)
    found = scores_of(model.eval(), held_out, int(config.pad_token_id))
    chosen, rejected = np.array(found)[:, 0].reshape(-1, 2).T
    evaluated = [row for row in again.rows if "eval_loss" in row][-1]
    assert evaluated["eval_loss"] == pytest.approx(float(np.log1p(np.exp(rejected - chosen)).mean()), abs=1e-6)
    assert evaluated["eval_rewards/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-6)
    asked = infer_main(
        InferArguments(
            ckpt_dir=str(made),
            val_dataset=[str(rows)],
            show_dataset_sample=-1,
            infer_batch_size=3,
            result_dir=str(tmp_path / "said"),
        )
    )
    refused: list[tuple[Any, str]] = [
        (
            lambda: infer_main(InferArguments(ckpt_dir=str(made), val_dataset=[str(rows)], temperature=0.5)),
            "--temperature is about answers",
        ),
        (lambda: deploy_main(DeployArguments(ckpt_dir=str(made))), "the API asks for answers"),
    ]
    if method == "lora":
        refused.append(
            (lambda: infer_main(InferArguments(adapters=[f"mine={made}"], save_result=False)), "the adapter mine gives scores")
        )
    for call, what in refused:
        with pytest.raises(UserError, match=what):
            call()
    said = {round(row["score"], 5) for row in asked} | {round(row["rejected_score"], 5) for row in asked}
    assert len(asked) == 40 and all(min(abs(value - one) for one in said) < 2e-5 for [value] in found)
    assert all(row["correct"] == (row["score"] > row["rejected_score"]) for row in asked)
    [file] = (tmp_path / "said").iterdir()
    assert [json.loads(line) for line in file.read_text().splitlines()] == asked


def test_classes_from_start_to_end(start: Path, pool: RankPool, tmp_path: Path) -> None:
    """They are learnt by heart, exported, and said by `swift infer`."""
    rows = write_classes(tmp_path / "rows.jsonl", lambda k: k % 3, 24)
    run = train(
        pool, tmp_path / "out", 2, SftArguments, resume_from_checkpoint=str(start), dataset=[str(rows)], task_type="seq_cls", num_labels=3,
        **COMMON | {"dataset_test_ratio": 0.0, "max_steps": 30, "save_steps": 30, "batch_size": 2, "gradient_accumulation_steps": 6},
    )  # fmt: skip
    assert run.rows[-2 if "loss" not in run.rows[-1] else -1]["accuracy"] == 1.0
    made = export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True))
    asked = infer_main(InferArguments(ckpt_dir=str(made), val_dataset=[str(rows)], show_dataset_sample=-1, save_result=False))
    assert [row["class"] for row in asked] == [k % 3 for k in range(24)] and all(row["correct"] for row in asked)
    assert sum(asked[0]["probabilities"]) == pytest.approx(1)
    with pytest.raises(UserError, match="gives scores and no answers"):
        infer_main(InferArguments(ckpt_dir=str(made), save_result=False))
    with pytest.raises(UserError, match="has no output layer"):
        resolve_source(SftArguments(model_id_or_path=str(made), dataset=[str(rows)]))
    with pytest.raises(UserError, match="a head of 3 scores"):
        resolve_source(SftArguments(model_id_or_path=str(made), dataset=[str(rows)], task_type="seq_cls", num_labels=2))


def test_the_token_that_is_scored_is_transformers_choice() -> None:
    """Also where an answer ends with what is the pad token, or is nothing else."""
    from transformers import LlamaForSequenceClassification

    config = tiny.tiny_config("llama", num_labels=1, pad_token_id=7)
    model = LlamaForSequenceClassification(config).eval()
    kept: list[Tensor] = []
    model.score.register_forward_hook(lambda _m, _i, out: kept.append(out))
    for ids in ([5, 6, 8], [5, 6, 7], [7, 7, 6, 7, 7], [7, 7], [7, 5]):
        with torch.no_grad():
            chosen = model(input_ids=torch.tensor([ids])).logits[0]
        assert torch.equal(kept[-1][0, pooled_place(np.array(ids), 7)], chosen), ids


def test_micro_batches_mark_one_token_of_each_sample(tmp_path: Path) -> None:
    from megaswift.data.store import RowWriter

    writer = RowWriter(tmp_path / "rows")
    sizes = [3, 5, 2, 4]
    ids = np.array([4, 5, 6, 4, 5, 6, 7, 7, 4, 7, 4, 5, 6, 5], np.int32)
    writer.add(ids, np.ones(14, bool), sizes, values=[[float(k)] for k in range(4)])
    writer.finish(np.array([2, 0, 1, 3]), None)
    rows = TokenRows.open(tmp_path / "rows")
    for padding_free in (True, False):
        batch = make_micro_batch(rows, [1, 2, 0], padding_free, 8, 7)
        assert batch.values is not None and batch.values[:, 0].tolist() == [0, 1, 2]
        assert batch.pooled is not None
        assert batch.pooled.nonzero().tolist() == ([[0, 2], [0, 5], [0, 8]] if padding_free else [[0, 2], [1, 2], [2, 0]])


def test_a_head_begins_as_transformers_begins_one() -> None:
    config = tiny.tiny_config("llama", num_labels=200, initializer_range=0.05, architectures=["LlamaForSequenceClassification"])
    made = first_scores(config, 7)
    assert (
        made.shape == (200, 64)
        and torch.equal(made, first_scores(config, 7))
        and not torch.equal(made, first_scores(config, 8))
    )
    assert float(made.std()) == pytest.approx(0.05, rel=0.02) and abs(float(made.mean())) < 0.002


REFUSED: list[tuple[type[SftArguments], dict[str, Any], str]] = [
    (RlhfArguments, {"rlhf_type": "rm", "beta": 0.2}, "--beta means nothing for --rlhf_type rm"),
    (RlhfArguments, {"rlhf_type": "rm", "num_labels": 2}, "option of swift sft"),
    (RlhfArguments, {"rlhf_type": "dpo", "center_rewards_coefficient": 0.1}, "--center_rewards_coefficient means nothing"),
    (SftArguments, {"num_labels": 2}, "--num_labels is an option of swift sft --task_type seq_cls"),
    (SftArguments, {"task_type": "seq_cls"}, "needs the number of classes"),
    (SftArguments, {"task_type": "seq_cls", "num_labels": 1}, "leaves nothing to choose"),
    (SftArguments, {"task_type": "seq_cls", "num_labels": 2, "truncation_strategy": "split"}, "the label of the whole"),
    (SftArguments, {"task_type": "seq_cls", "num_labels": 2, "loss_scale": "all"}, "--loss_scale is about"),
]


@pytest.mark.parametrize(("arguments", "words", "what"), REFUSED, ids=[what for *_, what in REFUSED])
def test_what_is_refused(arguments: type[SftArguments], words: dict[str, Any], what: str, start: Path) -> None:
    with pytest.raises(UserError, match=what):
        resolve_source(arguments(resume_from_checkpoint=str(start), dataset=["x"], **words))


def test_families_without_such_a_class_are_refused_by_name(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "hf", "ernie4_5", vocab_size=300)
    tiny.write_tokenizer(tmp_path / "hf")
    with pytest.raises(UserError, match="no ForSequenceClassification for model_type 'ernie4_5'"):
        resolve_source(RlhfArguments(rlhf_type="rm", model_id_or_path=str(tmp_path / "hf"), dataset=["x"]))


@long
@pytest.mark.parametrize(
    "words",
    [
        {"new_special_tokens": ["<a>"]}, {"freeze_parameters_ratio": 0.5, "pp": 2}, {"sft_type": "lora", "quantization_bit": 8},
        {"sft_type": "lora", "init_weights": "pissa"}, {"optim": "adamw_8bit"}, {"gradient_checkpointing": True, "pp": 2, "vpp": 2},
        {"dtype": "bf16", "tp": 2, "sequence_parallel": True}, {"save_safetensors": True},
    ],
    ids=lambda words: ", ".join(words),
)  # fmt: skip
def test_other_ways_of_training_have_a_head_too(words: dict[str, Any], start: Path, pool: RankPool, tmp_path: Path) -> None:
    """Each is exported with proof."""
    rows = write_pairs(tmp_path / "rows.jsonl", 16)
    run = train(
        pool, tmp_path / "out", 2, RlhfArguments, resume_from_checkpoint=str(start), dataset=[str(rows)], rlhf_type="rm", max_steps=2,
        save_steps=2, gradient_accumulation_steps=2, dataset_test_ratio=0.0, **words,
    )  # fmt: skip
    assert len(run.losses) == 2 and export_main(ExportArguments(ckpt_dir=str(run.directory), to_hf=True)).is_dir()


@long
def test_a_model_that_has_a_head_keeps_it(start: Path, pool: RankPool, tmp_path: Path) -> None:
    """From its folder, from its converted weights, and beside an adapter: the first loss is that of the same scores."""
    rows = write_pairs(tmp_path / "rows.jsonl", 16)
    common: dict[str, Any] = {
        "dataset": [str(rows)], "rlhf_type": "rm", "max_steps": 1, "gradient_accumulation_steps": 16, "dataset_test_ratio": 0.0,
        "learning_rate": 1e-2, "warmup_ratio": 0.0,
    }  # fmt: skip
    first = train(pool, tmp_path / "first", 1, RlhfArguments, resume_from_checkpoint=str(start), **common)
    folder = export_main(ExportArguments(ckpt_dir=str(first.directory), to_hf=True, hf_output_dir=str(tmp_path / "hf")))
    words = {"model_type": "tiny-chat", "model_id_or_path": str(folder)}
    converted = export_main(ExportArguments(**words, to_megatron=True, megatron_output_dir=str(tmp_path / "mg")))
    again = [
        train(pool, tmp_path / name, 1, RlhfArguments, **common | more).losses[0]
        for name, more in {
            "folder": words,
            "converted": {"resume_from_checkpoint": str(converted)},
            "adapter": {"resume_from_checkpoint": str(converted), "sft_type": "lora"},
        }.items()
    ]
    assert again == pytest.approx([again[0]] * 3, abs=2e-6) and abs(again[0] - first.losses[0]) > 1e-3


@pytest.mark.parametrize(
    ("label", "more", "reason"),
    [
        (3, {}, "a label that is no class"), (True, {}, "a label that is no class"), (None, {}, "no label"),
        (1, {"problem_type": "multi_label_classification"}, "a label that is no list of classes"),
        ([1.0], {"problem_type": "regression"}, "a label of another size"),
        (["x", 1, 2], {"problem_type": "regression"}, "a label that is no number"),
    ],
)  # fmt: skip
def test_bad_labels_are_counted(label: Any, more: dict[str, Any], reason: str, start: Path, tmp_path: Path) -> None:
    from tests.rlhf.pairs import prepared

    good = {"regression": [0.5, 1, -2], "multi_label_classification": [0, 2]}.get(more.get("problem_type", ""), 2)
    rows = write_classes(tmp_path / "rows.jsonl", lambda k: label if k == 4 else good, 8)
    _, data, _, _ = prepared(start, rows, arguments=SftArguments, task_type="seq_cls", num_labels=3, **more)
    assert len(data.train) == 7
    [(found, dropped)] = data.report.datasets[0].dropped.items()
    assert found == reason and dropped.count == 1 and "rows.jsonl:5" in dropped.places[0]


def test_margins_are_those_of_the_rows(start: Path, tmp_path: Path) -> None:
    from tests.rlhf.pairs import prepared

    rows = write_margins(tmp_path / "rows.jsonl", write_pairs(tmp_path / "pairs.jsonl", 20))
    wanted = sorted(json.loads(line).get("margin", 0.0) for line in rows.read_text().splitlines())
    with rows.open("a") as file:
        file.write(json.dumps({"query": "a", "response": "b", "rejected_response": "c", "margin": "large"}) + "\n")
    _, data, _, _ = prepared(start, rows, rlhf_type="rm")
    found = [data.train.values(row)[:, 0].tolist() for row in range(len(data.train))]
    assert all(one == other for one, other in found) and sorted(one for one, _ in found) == pytest.approx(wanted)
    assert list(data.report.datasets[0].dropped) == ["a margin that is no number"]
    _, plain, _, _ = prepared(start, rows, rlhf_type="dpo")
    assert len(plain.train) == 21 and not plain.train.is_scored


def test_nothing_is_left_behind_by_a_refused_run(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        sft_main(
            SftArguments(
                resume_from_checkpoint=str(start),
                dataset=["x"],
                task_type="seq_cls",
                num_labels=1,
                output_dir=str(tmp_path / "out"),
            )
        )
    assert not os.path.exists(tmp_path / "out")
