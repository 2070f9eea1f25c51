"""The verb on a tiny model: result files, resuming, comparison, own benchmarks, and what cannot work."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megaswift.commands.eval import _models, eval_main, prepare
from megaswift.config.options import EvalArguments, parse
from megaswift.errors import DataError, MegaswiftError, UserError
from megaswift.evaluation.answers import AnswerStore, read_answers
from megaswift.evaluation.likelihood import LikelihoodScorer
from megaswift.evaluation.scoring import OwnScorer
from megaswift.evaluation.weights import weights_hashes
from megaswift.inference.options import Answer
from megaswift.inference.transformers_backend import TransformersBackend

FOUR = ["--eval_dataset", "ceval", "mmlu", "gsm8k", "arc", "--eval_backend", "Native", "--max_new_tokens", "6"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(model: Path, data: Path, *words: str) -> dict[str, Any]:
    [row] = eval_main(["--ckpt_dir", str(model), "--eval_data_dir", str(data), *words])
    return row


def answers(folder: str = "default") -> list[dict[str, Any]]:
    newest = max(Path("eval_outputs", folder).glob("*/answers.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]


def test_the_seeds_command_leaves_its_files(model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    row = run(model_dir, data_dir, *FOUR)
    assert set(row["result"]) == {"ceval", "mmlu", "gsm8k", "arc"}
    [file] = Path("eval_outputs/default").glob("*/eval_result.jsonl")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [json.loads(json.dumps(row))]
    details = row["details"]["mmlu"]
    assert (details["questions"], details["of"], details["split"]) == (3, 3, "test")
    assert details["scored_by"].startswith("evalscope" if find_spec("evalscope") else "megaswift")
    assert len(row["weights_sha256"]) == len(details["questions_sha256"]) == 64
    assert row["seed"] == 42
    found = answers()
    assert len(found) == 1 + 3 + 2 + 4
    assert {answer["finish"] for answer in found} <= {"stop", "length"}
    assert max(answer["tokens"] for answer in found) <= 6  # a model that never ends is cut
    assert json.loads((file.parent / "evaluation.json").read_text(encoding="utf-8"))["benchmarks"]["arc"]["questions"] == 4
    assert "95" not in capsys.readouterr().err


def test_answers_do_not_depend_on_the_batch(model_dir: Path, data_dir: Path) -> None:
    run(model_dir, data_dir, *FOUR, "--eval_batch_size", "1", "--name", "one")
    run(model_dir, data_dir, *FOUR, "--eval_batch_size", "4", "--name", "four")
    texts = [{row["key"]: row["response"] for row in answers(name)} for name in ("one", "four")]
    assert texts[0] == texts[1]


def test_an_interrupted_evaluation_goes_on(model_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    whole, asked = TransformersBackend.answer_all, []

    def interrupted(self: Any, prompts: Any, options: Any, *, batch_size: int = 1) -> Any:
        for number, item in enumerate(whole(self, prompts, options, batch_size=batch_size)):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(number)
            yield item

    monkeypatch.setattr(TransformersBackend, "answer_all", interrupted)
    words = ["--eval_dataset", "arc", "--max_new_tokens", "6", "--eval_batch_size", "1"]
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, data_dir, *words)
    assert "--eval_use_cache true" in capsys.readouterr().err
    assert len(answers()) == 2
    with next(Path("eval_outputs/default").glob("*/answers.jsonl")).open("a") as file:
        file.write('{"torn')
    monkeypatch.setattr(TransformersBackend, "answer_all", whole)
    row = run(model_dir, data_dir, *words, "--eval_use_cache", "true")
    assert row["details"]["arc"]["asked_now"] == 2
    assert run(model_dir, data_dir, *words, "--eval_use_cache", "true")["details"]["arc"]["asked_now"] == 0
    assert (
        run(model_dir, data_dir, *words, "--max_new_tokens", "7", "--eval_use_cache", "true")["details"]["arc"]["asked_now"]
        == 4
    )


def test_another_config_finds_no_earlier_answers(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    words = ["--eval_dataset", "arc", "--max_new_tokens", "3", "--eval_use_cache", "true"]
    run(copy, data_dir, *words)
    assert run(copy, data_dir, *words)["details"]["arc"]["asked_now"] == 0
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert run(copy, data_dir, *words, "--max_model_len", "200")["details"]["arc"]["asked_now"] == 4
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}), encoding="utf-8")
    assert run(copy, data_dir, *words)["details"]["arc"]["asked_now"] == 4


def test_an_answer_with_any_character_is_found_again(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write({"key": "k", "response": "one\x85two\u2028three"})
    store.close()
    assert AnswerStore(tmp_path / "next", [tmp_path]).known("k") == {"key": "k", "response": "one\x85two\u2028three"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--eval_method", "loglikelihood", "--system", "x"], "--system has no effect with --eval_method loglikelihood"),
        (["--eval_method", "loglikelihood", "--max_new_tokens", "9"], "--max_new_tokens has no effect"),
        (["--eval_backend", "lm-eval", "--temperature", "1"], "--temperature has no effect with --eval_backend lm-eval"),
        (["--eval_backend", "lm-eval", "--eval_method", "generate"], "--eval_method has no effect"),
    ],
)
def test_what_would_be_ignored_is_refused(model_dir: Path, data_dir: Path, words: list[str], named: str) -> None:
    given = ["--ckpt_dir", str(model_dir), "--eval_data_dir", str(data_dir), "--eval_dataset", "arc", *words]
    with pytest.raises(UserError, match=named):
        prepare(parse(EvalArguments, given))
    if "lm-eval" not in words:  # GSM8K is generated
        prepare(parse(EvalArguments, [*given, "--eval_dataset", "arc", "gsm8k"]))


def test_likelihoods_are_those_of_the_whole_text(model_dir: Path, data_dir: Path) -> None:
    """Against one plain forward pass a choice."""
    row = run(model_dir, data_dir, "--eval_dataset", "arc", "mmlu", "--eval_method", "loglikelihood", "--eval_batch_size", "3")
    assert 0 <= row["details"]["arc"]["acc_norm"] <= 1
    backend = TransformersBackend.load(model_dir)
    rows = {row["id"]: row for row in answers() if row["benchmark"] == "arc"}
    for item in prepare(_args(model_dir, data_dir, "arc")).benches[0].items:
        found = rows[item.id]
        context = backend.tokenizer(f"Question: {item.question}\nAnswer:")["input_ids"]
        for choice, value in zip(item.choices, found["log_likelihoods"], strict=True):
            ids = backend.tokenizer(f"Question: {item.question}\nAnswer: {choice}")["input_ids"]
            with torch.no_grad():
                logs = torch.log_softmax(backend.model(torch.tensor([ids])).logits[0].float(), -1)
            wanted = sum(float(logs[place - 1, ids[place]]) for place in range(len(context), len(ids)))
            assert value == pytest.approx(wanted, abs=2e-3)
    scorer = LikelihoodScorer(backend.model, backend.tokenizer, 512)
    ((_, both),) = scorer.score_all([("Question:", [" ab", "é"])], 1)
    assert both.lengths == (2, 2)  # bytes, without the space that joins a choice to its question


def _args(model: Path, data: Path, *names: str) -> EvalArguments:
    return EvalArguments(ckpt_dir=str(model), eval_data_dir=str(data), eval_dataset=list(names))


def test_equal_weights_give_equal_answers(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    from tests.inference.conftest import make_model_dir

    make_model_dir(tmp_path / "other", seed=1, context=768)
    rows = eval_main(
        ["--compare", f"original={model_dir}", f"converted={copy}", str(tmp_path / "other"), "--eval_data_dir", str(data_dir),
         "--eval_dataset", "arc", "--eval_method", "loglikelihood"]
    )  # fmt: skip
    assert [row["model"] for row in rows] == ["original", "converted", "other"]
    assert rows[0]["weights_sha256"] == rows[1]["weights_sha256"] != rows[2]["weights_sha256"]
    text = capsys.readouterr().out
    assert "converted - original: every answer is the same" in text
    assert "McNemar p" in text or "other - original: every answer is the same" in text
    assert "WARNING" not in text
    [page] = Path("eval_outputs/default").glob("*/comparison.html")
    assert "<table>" in page.read_text(encoding="utf-8")
    found = json.loads((page.parent / "comparison.json").read_text(encoding="utf-8"))
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("original", "converted"), ("original", "other"), ("converted", "other"),
    ]  # fmt: skip


def test_equal_weights_with_unequal_answers_are_an_error(model_dir: Path, data_dir: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    for file in (copy / "chat_template.jinja", copy / "tokenizer_config.json"):
        if file.exists():
            file.write_text(
                file.read_text(encoding="utf-8").replace("You are helpful.", "Be brief, be rude."), encoding="utf-8"
            )
    with pytest.raises(DataError, match="equal weights gave unequal answers"):
        eval_main(
            ["--compare", f"original={model_dir}", f"converted={copy}", "--eval_data_dir", str(data_dir), "--eval_dataset",
             "arc", "--max_new_tokens", "6"]
        )  # fmt: skip
    assert "WARNING: converted has the weights of original in the precision" in capsys.readouterr().out
    assert list(Path("eval_outputs/default").glob("*/comparison.html"))


@pytest.mark.parametrize(("given", "used"), [([], "AUTO"), (["--dtype", "fp32"], "fp32")])
def test_a_comparison_has_one_precision(model_dir: Path, tmp_path: Path, given: list[str], used: str) -> None:
    """On a GPU a model converted in fp32 would else be asked in fp32, and its original in bf16."""
    trained = shutil.copytree(model_dir, tmp_path / "trained")
    (trained / "sft_args.json").write_text('{"dtype": "fp16"}')
    args = parse(EvalArguments, ["--compare", f"a={model_dir}", f"b={trained}", "--eval_dataset", "arc", *given])
    assert [chosen.args.dtype for chosen in _models(args).values()] == [used, used]


def test_a_title_without_a_model(model_dir: Path) -> None:
    with pytest.raises(UserError, match="'b=' names no model"):
        eval_main(["--compare", f"a={model_dir}", "b=", "--eval_dataset", "arc"])


def test_own_benchmarks(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "zoo_val.csv").write_text("question,A,B,answer\nIs a cat an animal?,yes,no,A\n", encoding="utf-8")
    (own / "faq.jsonl").write_text('{"query": "Who are you?", "response": "A model."}\n', encoding="utf-8")
    config = [
        {"name": "zoo", "pattern": "ceval", "dataset": "own", "subset_list": ["zoo"]},
        {"name": "faq", "pattern": "general_qa", "dataset": "own"},
    ]
    (tmp_path / "custom.json").write_text(json.dumps(config))
    row = run(
        model_dir,
        data_dir,
        "--custom_eval_config",
        "custom.json",
        "--eval_dataset",
        "zoo",
        "faq",
        "arc",
        "--max_new_tokens",
        "4",
    )
    assert set(row["result"]) == {"zoo", "faq", "arc"}
    assert row["details"]["faq"]["scored_by"].startswith("megaswift")


def test_a_prompt_that_does_not_fit_is_counted_as_wrong(model_dir: Path, data_dir: Path) -> None:
    row = run(model_dir, data_dir, "--eval_dataset", "arc", "--max_model_len", "20", "--max_new_tokens", "4")
    assert row["details"]["arc"]["too_long"] == 4
    assert row["result"]["arc"] == 0


@pytest.mark.parametrize("opened", [False, True], ids=["the model opens its thoughts", "the prompt opens them"])
def test_a_model_that_thinks(opened: bool, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It has room for its thoughts, and one that the limit cuts is counted by that name, whatever letters stand in it."""
    from tests.inference.conftest import CHATML, make_model_dir

    header = "'<|im_start|>assistant\n"
    template = CHATML.replace(header, f"{header}<think>\n") if opened else CHATML + "{# <think> </think> #}"
    model, mark = make_model_dir(tmp_path / "thinking", chat_template=template, context=768), "" if opened else "<think>"
    said = [f"{mark}A? D?</think>\n\nB", f"{mark}The answer is B", f"{mark}B", f"{mark}x</think>Option D is right"]
    ends, limits = ["stop", "length", "stop", "stop"], []

    def answer_all(self: Any, prompts: Any, options: Any, *, batch_size: int = 1) -> Any:
        limits.append(options.max_new_tokens)
        yield from enumerate(Answer(text, 3, 5, end) for text, end in zip(said, ends, strict=True))

    monkeypatch.setattr(TransformersBackend, "answer_all", answer_all)
    monkeypatch.setattr("megaswift.evaluation.run.make_scorer", lambda bench, few_shot, _: OwnScorer(bench, few_shot))
    row = run(model, data_dir, "--eval_dataset", "arc")
    details = row["details"]["arc"]
    assert [row["prediction"] for row in answers()] == ["B", "", "", "D"]
    assert (details["cut_at_limit"], details["thoughts_cut"], details["unreadable"]) == (1, 1, 2)
    assert details["max_new_tokens"] == limits[0] >= 8192
    told = capsys.readouterr()
    assert "8,192 tokens more for each answer" in told.err
    assert "1 of these within their thoughts" in told.out
    assert "arc: answers cut within their thoughts, at 8,224 tokens, and so counted as wrong: 1" in told.err
    run(model, data_dir, "--eval_dataset", "arc", "--max_new_tokens", "40")
    assert limits[1] == 40
    assert "tokens more for each answer" not in capsys.readouterr().err


def test_answers_behind_a_torn_line_are_read(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"key": "a"}\n{"torn\n[1]\n{"key": "b"}\n')
    assert [row["key"] for row in read_answers(tmp_path / "answers.jsonl")] == ["a", "b"]


def test_the_hash_is_of_the_weights_not_of_the_files(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(tmp_path / "cut", max_shard_size="30KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        cut, whole = weights_hashes(tmp_path / "cut", dtype), weights_hashes(model_dir, dtype)
        assert (cut.stored, cut.asked, cut.precision) == (whole.stored, whole.asked, "F32")
    name, other = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))
    tensors = load_file(model_dir / "model.safetensors")
    save_turned = tensors | {name: tensors[name].view(tensors[other].shape), other: tensors[other].view(tensors[name].shape)}
    turned = shutil.copytree(model_dir, tmp_path / "turned")
    save_file(save_turned, turned / "model.safetensors", {"format": "pt"})
    found = weights_hashes(turned, torch.bfloat16)
    assert found.stored != whole.stored and found.asked != whole.asked  # the same bytes in other shapes


def test_a_conversion_to_bf16_is_the_original_where_both_are_asked_in_bf16(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    converted = shutil.copytree(model_dir, tmp_path / "converted")
    AutoModelForCausalLM.from_pretrained(model_dir).to(torch.bfloat16).save_pretrained(converted)
    words = ["--compare", f"original={model_dir}", f"converted={converted}", "--eval_data_dir", str(data_dir), "--eval_dataset", "arc",
             "--eval_method", "loglikelihood", "--eval_limit", "4"]  # fmt: skip
    for dtype, same in (("bf16", True), ("fp32", False)):
        rows = eval_main([*words, "--dtype", dtype, "--name", dtype])
        assert rows[0]["weights_sha256"] != rows[1]["weights_sha256"]
        assert (rows[0]["weights_asked_sha256"] == rows[1]["weights_asked_sha256"]) == same
        [file] = Path("eval_outputs", dtype).glob("*/comparison.json")
        found = json.loads(file.read_text(encoding="utf-8"))
        [pair] = found["pairs"]
        assert pair["same_weights"] == same
        note = "converted has the weights of original, rounded to BF16: answers may differ; --dtype bf16 asks both the same"
        assert found["notes"] == ([] if same else [note])
        assert (note in capsys.readouterr().out) is not same
        if same:
            assert pair["paired"]["changed"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_backend", "OpenCompass", "--eval_dataset", "arc"], "use --eval_backend Native"),
        (["--eval_dataset"], "no benchmark is named"),
        (["--eval_dataset", "mmluu"], "did you mean: mmlu"),
        (["--eval_dataset", "arc", "--eval_limit", "0"], "is not 1 or more"),
        (["--eval_dataset", "arc", "--eval_batch_size", "0"], "is not 1 or more"),
        (["--eval_dataset", "arc", "--name", "a/b"], "cannot be a directory name"),
        (["--eval_dataset", "arc_easy"], "arc_easy is not in"),
        (["--eval_dataset", "arc", "--compare", "x"], "names the models itself"),
        (["--eval_dataset", "arc", "--custom_eval_config", "none.json"], "cannot read the configuration"),
        (["--eval_dataset", "arc", "--infer_backend", "vllm"], "vLLM is not installed"),
        (["--eval_dataset", "arc", "--eval_backend", "lm-eval"], "lm-eval is not installed"),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    model_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    if ("vllm" in words and find_spec("vllm")) or ("lm-eval" in words and find_spec("lm_eval")):
        pytest.skip("it is installed")
    monkeypatch.setattr("megaswift.inference.transformers_backend.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(MegaswiftError) as caught:
        eval_main(["--ckpt_dir", str(model_dir), "--eval_data_dir", str(data_dir), *words])
    assert message in caught.value.text()
    assert not Path("eval_outputs").exists()


def test_without_files_and_network_the_error_says_which_files(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(UserError, match="arc cannot be fetched from the hub") as caught:
        prepare(parse(EvalArguments, ["--ckpt_dir", str(model_dir), "--eval_dataset", "arc"]))
    assert "--eval_data_dir" in caught.value.fix


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (make test-eval installs it)")
def test_lm_eval_finds_the_same_likelihoods(model_dir: Path, data_dir: Path) -> None:
    names = ["--eval_dataset", "arc", "mmlu", "gsm8k", "ceval", "--max_new_tokens", "6"]
    row = run(model_dir, data_dir, *names, "--eval_backend", "lm-eval", "--name", "theirs", "--eval_limit", "3")
    run(model_dir, data_dir, *names, "--eval_method", "loglikelihood", "--name", "ours", "--eval_limit", "3")
    assert row["details"]["arc"]["scored_by"].startswith("lm-eval")
    mine = {(row["benchmark"], row["subset"], row["id"]): row for row in answers("ours")}
    for theirs in answers("theirs"):
        ours = mine[theirs["benchmark"], theirs["subset"], theirs["id"]]
        if theirs["benchmark"] in ("arc", "mmlu"):
            assert theirs["log_likelihoods"] == pytest.approx(ours["log_likelihoods"], abs=2e-3)
            assert theirs["correct"] == ours["correct"]
