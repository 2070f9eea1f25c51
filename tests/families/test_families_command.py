"""`swift families`: the table of the docs is the command's, and a folder's config is explained field by field."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny

from megaswift.commands.families import families_main, markdown
from megaswift.errors import UserError
from megaswift.models import describe, families
from megaswift.models.whole import whole_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_document_has_the_table_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`swift families --markdown true` writes it anew."""
    rows = families_main(["--markdown", "true"])
    assert markdown(rows) in capsys.readouterr().out
    assert markdown(rows) in DOCUMENT.read_text(encoding="utf-8")
    assert {row["model_type"] for row in rows} == {family.name for family in families().values()}
    assert families_main([]) == rows


def test_the_table_fits_a_terminal_and_nothing_else_is_printed() -> None:
    command = [sys.executable, "-m", "megaswift", "families"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"COLUMNS": "80"})
    lines = done.stdout.splitlines()
    assert not done.stderr
    assert max(map(len, lines[:-1])) <= 80 and all(
        any(name in line for line in lines) for name in ("gemma3_text", "hunyuan_v1_dense")
    )


def test_a_folder_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.tiny_config("gemma2").save_pretrained(tmp_path / "gemma")
    rows = {row["field"]: row["is"] for row in families_main(["--model_id_or_path", str(tmp_path / "gemma")])}
    assert rows["attn_logit_softcapping"] == rows["sliding_window"] == rows["hidden_activation"] == "honoured"
    said = capsys.readouterr().out
    assert "layers 0, 2: a window of 9 tokens" in said and "layers 1, 3: sees all before a token" in said
    assert "samples of up to 256 tokens" in said
    tiny.tiny_config("seed_oss").save_pretrained(tmp_path / "seed")
    rows = {row["field"]: row["is"] for row in families_main(["--model_id_or_path", str(tmp_path / "seed")])}
    assert rows["residual_dropout"] == "left out: training has no dropout"
    with pytest.raises(UserError, match="there is no directory"):
        families_main(["--model_id_or_path", str(tmp_path / "nowhere")])


def test_what_layers_have_in_words() -> None:
    for name, words in (
        ("olmo3", ["windows in some layers", "normed over all heads", "angles by layer type"]),
        ("exaone4", ["without positions"]),
        ("hunyuan_v1_dense", ["after the rotation", "alpha"]),
        ("qwen2", ["biases"]),
        ("glm", ["a part of each head rotates"]),
    ):
        row = next(row for row in describe.table() if row["model_type"] == name)
        assert all(word in row["attention"] for word in words), row


def test_what_is_carried_along_is_told_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_of(tiny.tiny_config("gemma3")).save_pretrained(tmp_path)
    families_main(["--model_id_or_path", str(tmp_path)])
    assert "vision_tower.*, multi_modal_projector.*" in " ".join(capsys.readouterr().out.split())
