"""Answers of the transformers backend against plain transformers, and against themselves in other forms."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megaswift.errors import DataError, NonFiniteError, UserError
from megaswift.inference import decoding
from megaswift.inference.loading import load_model
from megaswift.inference.options import GenerationOptions, PromptTooLongError
from megaswift.inference.text import decode, whole_text
from megaswift.inference.transformers_backend import TransformersBackend
from megaswift.models.lengths import context_length

QUESTIONS = ["who are you", "你是谁", "a", "What is the capital of France? " * 3, "晚上睡不着觉怎么办"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in QUESTIONS]
GREEDY = GenerationOptions(max_new_tokens=40, temperature=0)
SAMPLED = GenerationOptions(max_new_tokens=40, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=3)


def plain_generate(backend: TransformersBackend, model_dir: Path, prompt: list[int], **settings) -> list[int]:
    """What transformers answers by itself, as its users write it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=[0, 2], **settings)
    return output[0, len(prompt) :].tolist()


def test_a_plain_install_can_place_a_model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU transformers places it, which needs a package of its own."""
    monkeypatch.setattr("megaswift.inference.loading._device_map", lambda _: "cpu")
    assert load_model(model_dir).device == torch.device("cpu")


def test_prompt_is_the_chat_template(backend) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "你好"},
    ]
    for conversation in (messages, messages[1:]):
        expected = backend.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert backend.prompt_ids(conversation, GREEDY) == expected


def test_control_tokens_in_a_question_stay_text(backend) -> None:
    ids = backend.prompt_ids([{"role": "user", "content": "a<|im_end|>b"}], GREEDY)
    assert ids.count(2) == backend.prompt_ids([{"role": "user", "content": "ab"}], GREEDY).count(2)


def test_system_prompts(backend) -> None:
    question = {"role": "user", "content": "hi"}
    none = decode(backend.tokenizer, backend.prompt_ids([{"role": "system", "content": ""}, question], GREEDY))
    own = decode(backend.tokenizer, backend.prompt_ids([question], GREEDY))
    assert "helpful" in own
    assert "system" not in none
    assert backend.prompts.system_text(None) == "You are helpful."
    assert backend.prompts.system_text("") is None
    assert backend.prompts.system_text("X") == "X"


def test_greedy_equals_plain_transformers(backend, model_dir) -> None:
    for conversation, answer in zip(CONVERSATIONS, backend.generate(CONVERSATIONS, GREEDY), strict=True):
        ids = plain_generate(backend, model_dir, backend.prompt_ids(conversation, GREEDY), max_new_tokens=40, do_sample=False)
        assert answer.tokens == len(ids)
        assert answer.text == decode(backend.tokenizer, ids).rstrip("\ufffd")


def test_sampling_equals_plain_transformers_with_the_same_seed(backend, model_dir) -> None:
    prompt = backend.prompt_ids(CONVERSATIONS[0], SAMPLED)
    answer = backend.generate(CONVERSATIONS[:1], SAMPLED)[0]
    torch.manual_seed(3)
    ids = plain_generate(
        backend,
        model_dir,
        prompt,
        max_new_tokens=40,
        do_sample=True,
        temperature=0.9,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.2,
    )
    assert answer.text == decode(backend.tokenizer, ids).rstrip("\ufffd")


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        GenerationOptions(max_new_tokens=30, temperature=0, repetition_penalty=1.3),
        GenerationOptions(max_new_tokens=12, temperature=0, num_beams=3),
    ],
    ids=["greedy", "penalty", "beams"],
)
def test_a_batch_answers_like_single_questions_in_their_order(backend, options) -> None:
    together = backend.generate(CONVERSATIONS, options, batch_size=3)
    assert together == [backend.generate([conversation], options)[0] for conversation in CONVERSATIONS]


@pytest.mark.parametrize(
    "options",
    [GREEDY, SAMPLED, GenerationOptions(max_new_tokens=12, temperature=0, num_beams=2)],
    ids=["greedy", "sampled", "beams"],
)
def test_streamed_text_equals_the_answer(backend, options) -> None:
    for conversation in CONVERSATIONS:
        stream = backend.stream(conversation, options)
        assert "".join(stream) == stream.answer.text
        assert stream.answer == backend.generate([conversation], options)[0]


def test_seeds(backend) -> None:
    def texts(seed: int) -> list[str]:
        options = GenerationOptions(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        return [answer.text for answer in backend.generate(CONVERSATIONS, options, batch_size=2)]

    assert texts(1) == texts(1) != texts(2)


def test_stop_words_end_an_answer_and_are_no_part_of_it(backend) -> None:
    full = backend.generate(CONVERSATIONS[2:3], GREEDY)[0]
    word = full.text[8:10]
    options = GenerationOptions(max_new_tokens=40, temperature=0, stop_words=("never there", word))
    answer = backend.generate(CONVERSATIONS, options, batch_size=5)[2]
    assert answer.text == full.text[: full.text.index(word)]
    assert answer.finish == "stop"
    assert answer.tokens < full.tokens
    stream = backend.stream(CONVERSATIONS[2], options)
    assert "".join(stream) == answer.text
    assert stream.answer == answer


def test_a_control_token_can_be_a_stop_word(backend) -> None:
    prompt = backend.prompt_ids(CONVERSATIONS[0], GREEDY)
    assert decoding.special_stop_ids(backend.tokenizer, ("<|im_start|>", "word")) == {1}
    answer = backend.finished(prompt, [40, 41, 1, 42], GenerationOptions(stop_words=("<|im_start|>",)))
    assert (answer.finish, answer.tokens) == ("stop", 3)


def test_generation_config_of_the_folder_gives_end_tokens_and_nothing_else(model_dir, tmp_path) -> None:
    path = shutil.copytree(model_dir, tmp_path / "model")
    settings = {
        "eos_token_id": [2, 77],
        "do_sample": True,
        "temperature": 1.9,
        "top_k": 1,
        "repetition_penalty": 9.0,
        "max_new_tokens": 3,
        "bad_words_ids": [[5]],
    }
    (path / "generation_config.json").write_text(json.dumps(settings))
    other = TransformersBackend.load(path)
    assert other._ends == {0, 2, 77}
    plain = TransformersBackend.load(model_dir)
    answers, expected = other.generate(CONVERSATIONS, GREEDY), plain.generate(CONVERSATIONS, GREEDY)
    assert [(a.text, a.tokens) for a in answers if a.finish == "length"] == [
        (b.text, b.tokens) for a, b in zip(answers, expected, strict=True) if a.finish == "length"
    ]
    assert any(answer.finish == "length" for answer in answers)


def test_prompts_that_are_too_long(backend) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(PromptTooLongError, match="at most 511"):
        backend.generate([long], GREEDY)
    with pytest.raises(PromptTooLongError, match="at most 20"):
        backend.generate(CONVERSATIONS[3:4], GenerationOptions(max_length=20))
    cut = GenerationOptions(max_length=20, truncation="truncation_left", max_new_tokens=2, temperature=0)
    whole = backend.prompt_ids(CONVERSATIONS[3], GREEDY)
    assert backend.prompt_ids(CONVERSATIONS[3], cut) == whole[-20:]
    assert backend.generate(CONVERSATIONS[3:4], cut)[0].prompt_tokens == 20


def test_an_endless_answer_ends_at_the_context(backend) -> None:
    options = GenerationOptions(max_new_tokens=10_000, temperature=0)
    long = [{"role": "user", "content": "zz" * 220}]
    single = backend.generate([long], options)[0]
    assert single.prompt_tokens + single.tokens <= 512
    assert backend.generate([long, *CONVERSATIONS[:1]], options, batch_size=2)[0] == single


def test_a_cut_answer_is_told_from_a_whole_one(backend) -> None:
    options = GenerationOptions(max_new_tokens=3, temperature=0)
    ids = backend.tokenizer.encode("one two three four", add_special_tokens=False)
    end = backend.tokenizer.eos_token_id
    found = [backend.finished([1], generated, options) for generated in (ids[:3], [*ids[:2], end], ids[:9])]
    assert [(answer.finish, answer.tokens) for answer in found] == [("length", 3), ("stop", 3), ("length", 3)]
    last = backend.finished([1] * (backend.context - 2), ids[:2], options)
    assert (last.finish, last.tokens) == ("length", 2)  # at the end of the context


def test_stop_ends_generation_and_keeps_what_there_is(backend) -> None:
    stream = backend.stream(CONVERSATIONS[2], GenerationOptions(max_new_tokens=400, temperature=0))
    shown = next(stream) + next(stream)
    answer = stream.stop()
    assert answer.finish == "interrupted"
    assert answer.text.startswith(shown.rstrip("\ufffd"))
    assert list(stream) == []
    assert answer.tokens < 100


def test_a_stream_that_nobody_reads_ends(backend) -> None:
    stream = backend.stream(CONVERSATIONS[2], GenerationOptions(max_new_tokens=400, temperature=0))
    next(stream)
    del stream
    deadline = time.monotonic() + 30
    while any(thread.name == "generate" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "generate" for thread in threading.enumerate())


def test_context_length_counts_rope_scaling() -> None:
    from transformers import LlamaConfig

    assert context_length(LlamaConfig(max_position_embeddings=4096)) == 4096
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    assert context_length(LlamaConfig(max_position_embeddings=4096, rope_parameters=yarn)) == 16384
    assert context_length(LlamaConfig(max_position_embeddings=16384, rope_parameters=yarn)) == 16384


def test_a_missing_weight_is_an_error_and_never_random(model_dir, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="up_proj"):
        TransformersBackend.load(path)


def test_weights_that_are_no_numbers(model_dir, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(model_dir, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    broken = TransformersBackend.load(path)
    with pytest.raises(NonFiniteError):
        broken.generate(CONVERSATIONS[:1], GREEDY)
    with pytest.raises(NonFiniteError):
        list(broken.stream(CONVERSATIONS[0], SAMPLED))


def test_a_folder_without_tokenizer(model_dir, tmp_path) -> None:
    path = shutil.copytree(model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    with pytest.raises(DataError, match="tokenizer"):
        TransformersBackend.load(path)


def test_a_tokenizer_without_template_takes_that_of_the_model_type(make_model, tmp_path) -> None:
    path = make_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(UserError, match="template"):
        TransformersBackend.load(path)
    named = TransformersBackend.load(path, model_type="qwen2-7b-instruct")
    text = named.tokenizer.decode(named.prompt_ids(CONVERSATIONS[0], GREEDY))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == system + "<|im_start|>user\nwho are you<|im_end|>\n<|im_start|>assistant\n"
    assert 2 in named._ends
    chosen = TransformersBackend.load(path, template_type="chatml")
    assert chosen.tokenizer.decode(chosen.prompt_ids(CONVERSATIONS[0], GREEDY)).startswith("<|im_start|>user\n")


def test_an_ordinary_end_token_is_no_part_of_the_answer(backend, model_dir, tmp_path) -> None:
    """Whole and streamed: special tokens hide themselves when decoded, but a config may name any token as the end."""
    for conversation in CONVERSATIONS:
        ids = plain_generate(backend, model_dir, backend.prompt_ids(conversation, GREEDY), max_new_tokens=40, do_sample=False)
        texts = [decode(backend.tokenizer, [token]) for token in ids]
        places = [k for k in range(2, len(ids)) if ids[k] not in ids[:k] and "\ufffd" not in texts[k] and texts[k].strip()]
        places = [k for k in places if whole_text(backend.tokenizer, ids[: k + 1]).endswith(texts[k])]
        if places:
            break
    place = places[-1]
    model = shutil.copytree(model_dir, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(settings | {"eos_token_id": ids[place]}), encoding="utf-8")
    other = TransformersBackend.load(model)
    [answer] = other.generate([conversation], GREEDY)
    assert (answer.text, answer.tokens, answer.finish) == (whole_text(other.tokenizer, ids[:place]), place + 1, "stop")
    assert whole_text(other.tokenizer, ids[: place + 1]) == answer.text + texts[place]
    stream = other.stream(conversation, GREEDY)
    assert "".join(stream) == answer.text
    assert stream.answer == answer
