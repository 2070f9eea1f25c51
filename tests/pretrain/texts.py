"""Text for tests, rows that are cut of it in the plainest way, and a run over them."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from transformers import PreTrainedTokenizerFast

from megaswift.config.options import PtArguments
from megaswift.data.documents import Documents
from megaswift.data.encode import PreparedData
from megaswift.data.pretrain import prepare_text
from megaswift.data.text import TextTokens
from megaswift.data.text_rows import TextRows
from megaswift.run.setup import prepared, resolved, template_of
from megaswift.run.source import resolve_source
from megaswift.run.spec import Run
from tests import tiny

WORDS = "who are you what is this a good day to learn new things about large models and small ones".split()
END, PAD = 1, 2  # of the tiny tokenizer


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Texts of different lengths, some longer than a row of the tests."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def write_texts(path: Path, count: int, seed: int = 0, longest: int = 30) -> Path:
    """A file of lines for .txt, and one of rows for all other names."""
    plain = path.suffix == ".txt"
    lines = [text if plain else json.dumps({"text": text}) for text in texts(count, seed, longest)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def tokenizer(directory: Path, bos: bool = False) -> Any:
    """The tiny tokenizer; with `bos` it puts <|im_start|> before every text, as Llama's does."""
    tiny.write_tokenizer(directory)
    if bos:
        from tokenizers import Tokenizer, processors

        path = directory / "tokenizer.json"
        whole = Tokenizer.from_file(str(path))
        whole.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
        whole.save(str(path))
    more = {"bos_token": "<|im_start|>"} if bos else {}
    return PreTrainedTokenizerFast.from_pretrained(directory, eos_token="<|im_end|>", pad_token="<|endoftext|>", **more)


def made(root: Path, *items: str, bos: bool = False, processes: int | None = None, **options: Any) -> PreparedData:
    """The rows of some items of `--dataset`."""
    tokens = TextTokens(tokenizer(root / ("with bos" if bos else "tokenizer"), bos))
    words: dict[str, Any] = {"max_length": 32, "dataset_test_ratio": 0.0, **options}
    args = PtArguments(dataset=list(items), **words)
    return prepare_text(args, tokens, cache_dir=root / "cache", processes=processes)


def rows_of(data: PreparedData) -> TextRows:
    assert isinstance(data.train, TextRows)
    return data.train


def expected(rows: TextRows, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and number of the document of each place of a row, read off the documents token by token."""
    span, first = rows.place(row)
    store, plan = Documents.open(span.directory), rows.plan
    ids = np.asarray(store.tokens[first : first + plan.max_length + 1]).astype(np.int64)
    document = np.searchsorted(store.offsets, np.arange(first, first + len(ids)), side="right")
    labels = np.full(plan.max_length, -100, np.int64)
    for place in range(plan.max_length):
        if first + place + 1 >= span.last:
            continue
        crossed = document[place + 1] != document[place]
        if not (crossed and (plan.separate or ids[place + 1] == plan.bos_id)):
            labels[place] = ids[place + 1]
    return ids[: plan.max_length], labels, document[: plan.max_length]


def job(
    start: Path, items: list[str], world: int, tp: int, pp: int, sp: bool, cp: int, vpp: int = 1, *, batch: int, rows: int, **more: Any
) -> Run:  # fmt: skip
    """One step over the first `rows` rows. `batch`: rows of a micro batch."""
    options = dict(tp=tp, pp=pp, vpp=vpp, cp=cp, sequence_parallel=sp, batch_size=batch, max_steps=1, dataset_test_ratio=0.0)
    with mock.patch.dict(os.environ, {"NPROC_PER_NODE": str(world)}):
        found = resolve_source(PtArguments(resume_from_checkpoint=str(start), dataset=items, **{**options, **more}))
        args = found.args.changed(gradient_accumulation_steps=rows // (batch * world))
        tokens = template_of(args, found)
        data = prepared(args, tokens, found)
        return resolved(args, replace(found, args=args), data, world, start.parent, tokens.pad_id)
