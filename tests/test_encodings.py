"""A locale that knows ASCII only, and names that are not UTF-8: one line or the right output, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaswift.terminal import not_utf8
from tests.tiny import save_tiny, write_tokenizer

PLAIN = {"PYTHONUTF8": "0", "LC_ALL": "C"}


def swift(*words: str | bytes, cwd: Path, **more: str) -> tuple[int, str]:
    """Exit code and what was printed on both streams."""
    environment = {**os.environ, **PLAIN, "MEGASWIFT_CACHE": str(cwd / "cache"), **more}
    command = [sys.executable, "-m", "megaswift", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout.decode("utf-8")


def test_chinese_names_and_rows_under_ascii(tmp_path: Path) -> None:
    save_tiny(tmp_path / "模型", "llama", vocab_size=300)
    write_tokenizer(tmp_path / "模型")
    rows = [{"instruction": f"你好 {number}", "output": "我是 {{name}}"} for number in range(4)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "数据.jsonl").write_text(text, encoding="utf-8")
    words = ["data", "--model_id_or_path", "模型", "--dataset", "数据.jsonl", "--model_name", "小黄", "--output", "页"]
    code, shown = swift(*words, cwd=tmp_path)
    assert code == 0, shown
    assert "数据.jsonl" in shown and "我是 小黄" in shown and (tmp_path / "页" / "index.html").is_file()
    code, shown = swift("data", "--model_id_or_path", "模型", "--dataset", "没有.jsonl", cwd=tmp_path)
    assert (code, shown.count("Traceback")) == (3, 0) and "没有.jsonl" in shown


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    code, shown = swift("infer", "--ckpt_dir", "没有", cwd=tmp_path, PYTHONUTF8="1", PYTHONIOENCODING="ascii:strict")
    assert code in (2, 3) and "\\u6ca1\\u6709" in shown and "Traceback" not in shown


@pytest.mark.parametrize("extra", [PLAIN, {"PYTHONUTF8": "1"}], ids=["ascii", "utf-8"])
def test_a_name_in_gbk_is_refused(tmp_path: Path, extra: dict[str, str]) -> None:
    code, shown = swift("data", "--dataset", "数据.jsonl".encode("gbk"), cwd=tmp_path, **extra)
    assert code == 2 and "error: a word is not UTF-8." in shown and "\\xca\\xfd\\xbe\\xdd.jsonl" in shown


def test_a_directory_whose_name_is_not_utf8() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "/a/\udcba".encode()
    found = not_utf8(caught.value)
    assert found is not None and found.where == "/a/\\xba"
    assert not_utf8(ValueError()) is None
