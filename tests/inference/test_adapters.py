"""Several adapters beside one model: each answers by its name as its merged model would, and the model itself as it was."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.lora.adapters import lora_of, peft_model, save_adapter
from tests.tiny import save_tiny, write_tokenizer

from megaswift.commands.eval import _models
from megaswift.commands.infer import prepare
from megaswift.config.options import DeployArguments, EvalArguments, InferArguments, parse
from megaswift.errors import UserError
from megaswift.inference.backends import load_backend
from megaswift.inference.chat import Conversation, Terminal
from megaswift.inference.gate import Refused
from megaswift.inference.model_ref import choose
from megaswift.inference.options import GenerationOptions
from megaswift.inference.server import Limits, Service
from megaswift.inference.vllm_backend import adapter_words

GREEDY = GenerationOptions(max_new_tokens=12, temperature=0)
ASKED: list[Any] = [[{"role": "user", "content": "who are you"}], [{"role": "user", "content": "a good day to learn"}]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters of it that differ in rank, modules and what they train whole, and one of another base."""
    root = tmp_path_factory.mktemp("adapters")
    for name, seed in (("base", 0), ("other", 1)):
        save_tiny(root / name, "qwen2", seed, vocab_size=512, tie_word_embeddings=False)
        write_tokenizer(root / name)
    first = lora_of(root / "base", rank=4)
    save_adapter(peft_model(root / "base", first, seed=1), first, root / "first")
    second = lora_of(root / "base", ["q_proj", "down_proj"], ["norm"], rank=6, alpha=24.0, rslora=True)
    save_adapter(peft_model(root / "base", second, seed=2), second, root / "second")
    for name, base in (("first", "base"), ("second", "base")):
        path = root / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(root / base)}))
    return {name: root / name for name in ("base", "other", "first", "second")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASWIFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def wanted(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, list[str]]:
    """Name -> answers of the merged model; None: of the base."""
    found: dict[str | None, list[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASWIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in (None, "first", "second"):
            args = InferArguments(ckpt_dir=str(made[name or "base"]), infer_backend="pt", dtype="fp32")
            located = choose(args).locate()
            backend = load_backend(args, located.path, located.model_type)
            found[name] = [answer.text for answer in backend.generate(ASKED, GREEDY)]
    assert len(set(map(tuple, found.values()))) == 3, "they say different things"
    return found


def several(made: dict[str, Path], **options: Any) -> InferArguments:
    words = [f"{name}={made[name]}" for name in ("first", "second")]
    return InferArguments(adapters=words, infer_backend="pt", dtype="fp32", **options)


@pytest.fixture(scope="module")
def backend(made: dict[str, Path]) -> Any:
    args = several(made)
    chosen = choose(args)
    located = chosen.locate()
    assert located.path == made["base"].resolve() and list(chosen.named) == ["first", "second"]
    return load_backend(args, located.path, located.model_type, adapters=chosen.named)


def test_each_answers_as_its_merged_model(backend: Any, wanted: dict[str | None, list[str]]) -> None:
    from dataclasses import replace

    for name in (None, "second", "first", None, "second"):
        options = replace(GREEDY, adapter=name)
        assert [answer.text for answer in backend.generate(ASKED, options, batch_size=2)] == wanted[name], name
        stream = backend.stream(ASKED[0], options)
        assert "".join(stream) == wanted[name][0]


def test_requests_choose_by_name(backend: Any, wanted: dict[str | None, list[str]]) -> None:
    from megaswift.inference.objects import CHAT_FORM

    service = Service(backend, "tiny", GREEDY, Limits(), 4, adapters=("first", "second"))

    async def ask() -> list[dict[str, Any]]:
        bodies = [
            {"messages": ASKED[0], **({"model": name} if name else {})} for name in ("first", "tiny", "second", None, "first")
        ]
        return await asyncio.gather(*(service.whole(service.chat(body), CHAT_FORM) for body in bodies))

    answers = asyncio.run(ask())
    assert [answer["model"] for answer in answers] == ["first", "tiny", "second", "tiny", "first"]
    found = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert found == [wanted[name][0] for name in ("first", None, "second", None, "first")]
    with pytest.raises(Refused, match="'tiny' or 'first' or 'second'"):
        service.chat({"messages": ASKED[0], "model": "third"})
    service.line.close()


def test_a_conversation_goes_over_to_another(backend: Any, wanted: dict[str | None, list[str]]) -> None:
    from dataclasses import replace

    said = "who are you\nadapter second\nwho are you\nadapter\nwho are you\nadapter third\nexit\n"
    terminal = Terminal(io.StringIO(said), io.StringIO())
    talk = Conversation(backend, replace(GREEDY, adapter="first", seed=None), terminal, adapters=("first", "second"))
    rows = talk.run()
    assert [row["response"] for row in rows[:3]] == [wanted[name][0] for name in ("first", "second", None)]
    assert [row["query"] for row in rows[3:]] == ["adapter third"], "a question, since there is no such adapter"


def test_words(made: dict[str, Path], tmp_path: Path) -> None:
    assert parse(DeployArguments, ["--adapters", "a=x", "b=y"]).adapters == ["a=x", "b=y"]
    single = choose(InferArguments(adapters=[str(made["first"])]))
    assert single.adapter == made["first"] and not single.named
    one = choose(InferArguments(adapters=[f"only={made['first']}"]))
    assert one.named == {"only": made["first"]} and one.adapter is None
    for text, words in (
        ("need a name each", [str(made["first"]), f"b={made['second']}"]),
        ("need a name each", [f"a={made['first']}", f"a={made['second']}"]),
        ("holds no adapter", [f"a={made['base']}"]),
    ):
        with pytest.raises(UserError, match=text):
            choose(InferArguments(adapters=words))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in made["second"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(made["other"])}))
    with pytest.raises(UserError, match="first and moved were trained on"):
        choose(InferArguments(adapters=[f"first={made['first']}", f"moved={moved}"]))
    (moved / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="PiSSA"):
        choose(InferArguments(adapters=[f"moved={moved}"]))
    (tmp_path / "rows.jsonl").write_text('{"query": "who are you"}\n')
    with pytest.raises(UserError, match="answered by one model"):
        prepare(several(made, val_dataset=[str(tmp_path / "rows.jsonl")]))


def test_adapters_are_compared(made: dict[str, Path]) -> None:
    models = _models(EvalArguments(compare=[f"{name}={made[name]}" for name in ("base", "first", "second")]))
    assert [models[name].adapter for name in ("base", "first", "second")] == [None, made["first"], made["second"]]
    with pytest.raises(UserError, match="compared with each other"):
        _models(EvalArguments(adapters=[f"first={made['first']}"]))


def test_what_vllm_is_told(made: dict[str, Path]) -> None:
    assert adapter_words({}) == {}
    words = adapter_words({"first": made["first"], "again": made["first"]})
    assert words == {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with pytest.raises(UserError, match="does not load the adapter second: it loads no modules_to_save"):
        adapter_words({"first": made["first"], "second": made["second"]})
