"""The README is true: its commands parse and lead where they say, its story runs, its messages are the real ones, its file map exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megaswift.cli import VERBS
from megaswift.config import options as arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[tuple[dict[str, str], list[str]]]:
    """The swift commands of a shell block: environment and words."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"(^|\s)#.*", "", line))  # shlex takes the # of name#500 for a comment
        environment = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if words and words[0] == "swift":
            found.append((environment, words[1:]))
    return found


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_parses(path: Path) -> None:
    for text in blocks("shell", path.read_text(encoding="utf-8")):
        for _, words in commands(text):
            assert words[0] in VERBS, words
            arguments.parse(getattr(arguments, VERBS[words[0]][2]), words[1:])


def test_nothing_is_fetched_from_where_it_is_not() -> None:
    """No document and no message sends anybody to an address or a package of ours that does not exist: a stranger may take the name."""
    sources = [*documents(), ROOT / "CHANGELOG.md", *(ROOT / "examples").glob("*"), *(ROOT / "src" / "megaswift").rglob("*.py")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for path in sources:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert not re.search(r"pip3? install[^\n`]*[\s'\"]megaswift\b", text), path
        assert "/megaswift/megaswift" not in text and "git clone" not in text, path
        assert set(re.findall(r"pip install '\.\[([\w-]+)\]'", text)) <= set(extras), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in documents():
        for target in re.findall(r"^make (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_seeds_commands_go_as_far_as_they_can_without_the_model(tmp_path: Path) -> None:
    """Without a network and GPUs each of them ends with one error that names what is missing."""
    seed = commands(blocks("shell")[3])
    assert [words[0] for _, words in seed] == ["export", "sft", "export", "export", "infer", "infer"]
    for environment, words in seed:
        done = subprocess.run(
            [sys.executable, "-m", "megaswift", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, **environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "MODELSCOPE_CACHE": str(tmp_path / "ms")},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1
        assert "qwen2-7b-instruct" in done.stderr


def test_the_file_map_exists() -> None:
    text = next(block for block in blocks("text") if "src/megaswift/" in block and "cli.py" in block)
    folder = ROOT / "src" / "megaswift"
    for line in text.splitlines():
        for name in re.findall(r"^ {4}([\w/]+(?:\.py)?)(?= )|(?<=\.py )(\w+\.py)", line):
            path = folder / next(part for part in name if part)
            assert path.exists(), path
    for line in text.splitlines():
        if re.match(r"[a-z]+/ ", line):
            assert (ROOT / line.split()[0]).is_dir(), line


def test_the_table_of_messages_is_real() -> None:
    """Every message in the table "what happens when" is made from a text in the sources."""
    table = README.split("## What happens when")[1].split("\n## ")[0]
    sources = []
    for path in (ROOT / "src" / "megaswift").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                sources.append(".*".join(re.escape(part.value) for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                sources.append(re.escape(node.value))
    patterns = [source for source in sources if len(source) > 15]
    for message in re.findall(r"`error: ([^`]+)`", table):
        assert any(re.fullmatch(f".*{pattern}.*", message, re.DOTALL) for pattern in patterns), message


def test_option_files_in_examples_parse() -> None:
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        assert arguments.parse(arguments.SftArguments, [str(path)])
