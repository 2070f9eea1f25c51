"""The structure of the code: imports flow one way, few modules are reached from training."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "megaswift"

# Later ones may import earlier ones. `errors`, `families`, `cache` and `terminal` may be imported by all.
ORDER = [
    "errors",
    "terminal",
    "cache",
    "option_parser",
    "training_options",
    "arguments",
    "args_file",
    "families",
    "mapping",
    "hf",
    "plan",
    "checkpoint",
    "convert",
    "data",
    "engine",
    "inference",
    "report",
    "proof",
    "export",
    "verify",
    "start",
    "sft",
    "inspect_data",
    "parity",
    "run_model",
    "evaluation",
    "infer",
    "deploy",
    "eval",
    "cli",
]
ENTRY = "megaswift.sft"


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Names of our modules that a file imports anywhere, functions included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megaswift"):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("megaswift")]
        found |= {name for name in names if name in known}
    return found - {"megaswift"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_imports_flow_one_way() -> None:
    wrong = []
    for name, path in modules().items():
        if name in ("megaswift", "megaswift.__main__"):
            continue
        for target in imports_of(path):
            if ORDER.index(room(target)) > ORDER.index(room(name)):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_room_is_in_the_order() -> None:
    assert {room(name) for name in modules()} - {"megaswift", "__main__"} == set(ORDER)


def test_four_files_from_the_command_to_the_step() -> None:
    """cli -> sft -> engine/loop -> engine/step: each names the next."""
    chain = ["cli", "sft", "engine/loop", "engine/step"]
    for here, there in zip(chain, chain[1:]):
        assert f"megaswift.{there.replace('/', '.')}" in (SOURCE / f"{here}.py").read_text(encoding="utf-8"), (
            f"{here} does not lead to {there}"
        )


def test_every_file_says_what_it_is() -> None:
    for name, path in modules().items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, megaswift.cli; megaswift.cli.main(['sft', '--help']); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "megaswift", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0
