"""Megatron-LM's indexed files, written by Megatron-Core: read where they are, or given the ends that they lack; damage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaswift.data.documents import Documents
from megaswift.data.indexed import open_indexed, prefix_of
from megaswift.data.read import open_path
from megaswift.errors import DataError, UserError
from tests.pretrain.texts import END, expected, made, rows_of, texts, tokenizer, write_texts


def write_indexed(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.int32) -> Path:
    """Documents of one or more sequences each, as Megatron's preprocess_data.py writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents(root: Path, end: bool = True) -> list[list[list[int]]]:
    """Tokens of sixty texts; every third document is two sequences."""
    own = tokenizer(root / "own")
    whole = [own(text)["input_ids"] + [END] * end for text in texts(60)]
    return [[ids[:4], ids[4:]] if k % 3 == 0 and len(ids) > 5 else [ids] for k, ids in enumerate(whole)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_they_are_read_where_they_are(dtype: Any, tmp_path: Path) -> None:
    """The same rows as of the texts themselves, and no token is stored a second time."""
    prefix = write_indexed(tmp_path / "corpus_text_document", documents(tmp_path), dtype)
    wanted = rows_of(made(tmp_path, str(write_texts(tmp_path / "a.jsonl", 60))))
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        rows = rows_of(made(tmp_path, str(name)))
        store = Documents.open(rows.plan.parts[0][0].directory)
        assert not (store.path / "tokens.bin").exists() and store.index["tokens"] == f"{prefix}.bin"
        assert len(rows) == len(wanted)
        for row in range(len(rows)):
            assert all(np.array_equal(one, other) for one, other in zip(expected(rows, row), expected(wanted, row)))
            assert [piece.ids.tolist() for piece in rows.samples(row)] == [piece.ids.tolist() for piece in wanted.samples(row)]
    made(tmp_path, f"{prefix}:0.5", f"{tmp_path / 'a.jsonl'}:0.5")


def test_documents_without_an_end_get_one(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "corpus", [*documents(tmp_path, end=False), [[5, 6, END]], []])
    data = made(tmp_path, str(prefix))
    store = Documents.open(rows_of(data).plan.parts[0][0].directory)
    assert (store.path / "tokens.bin").exists() and len(store) == 61, "an empty document is none"
    own = [ids for document in documents(tmp_path) for sequence in document for ids in sequence]
    assert store.tokens.tolist() == [*own, 5, 6, END]
    assert data.report.datasets[0].files == ["60 of 61 documents do not end with the end token: copied, and given it"]


def test_damaged_files(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "corpus", documents(tmp_path))
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole, ids = index.read_bytes(), tokens.read_bytes()
    assert prefix_of(tmp_path / "other") is None and len(open_indexed(prefix).offsets) == 61

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            made(tmp_path, str(prefix))
        index.write_bytes(whole)
        tokens.write_bytes(ids)

    tokens.write_bytes(ids[:-4])
    refused("bytes, its index counts")
    index.write_bytes(b"x" + whole[1:])
    refused("does not begin as one of version 1")
    index.write_bytes(whole[:60])
    refused("it has 60 bytes")
    index.write_bytes(whole[:17] + b"\x07" + whole[18:])
    refused("no token ids")
    index.write_bytes(whole[:34] + b"\x01" + whole[35:])
    refused("do not lie end to end")
    array = np.frombuffer(ids, np.int32).copy()
    array[7] = -1
    tokens.write_bytes(array.tobytes())
    refused("token id below 0")
    array[7] = 5000
    tokens.write_bytes(array.tobytes())
    from megaswift.config.options import PtArguments
    from megaswift.data.pretrain import prepare_text
    from megaswift.data.text import TextTokens

    args = PtArguments(dataset=[str(prefix)], max_length=32)
    with pytest.raises(
        DataError, match=r"this dataset has a token without a row in the model's embedding, which has 300 rows: '' \(5000\)"
    ):
        prepare_text(args, TextTokens(tokenizer(tmp_path / "own")), cache_dir=tmp_path / "cache", table=300)
    with pytest.raises(UserError, match="indexed files are taken whole"):
        made(tmp_path, f"{prefix}#5")
    with pytest.raises(DataError, match=r"of type '.idx' cannot be read"):
        open_path(index)
