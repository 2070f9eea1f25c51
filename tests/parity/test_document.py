"""docs/parity.md comes from one command: its quick form measures every part on tiny models and writes every section."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from tests.training import long

ROOT = Path(__file__).parent.parent.parent
SECTIONS = (
    "## One loss at every layout",
    "## The loss of transformers",
    "## Faults that it catches",
    "## bf16: the noise is measured",
    "## Learning works",
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """The document of a quick run, and the results that it was made from."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import parity_document
        from parity_text import write_document
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    work = tmp_path_factory.mktemp("document")
    options = argparse.Namespace(quick=True, data=None, parts=list(parity_document.PARTS))
    parity_document.measure(work, options)
    results = {part: json.loads((work / f"{part}.json").read_text(encoding="utf-8")) for part in parity_document.PARTS}
    write_document(work / "parity.md", results)
    return work / "parity.md", results


@long
def test_every_section_is_there(document: tuple[Path, dict[str, dict]]) -> None:
    path, results = document
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert "5 of 5 are caught and not found where they are not." in text
    assert "Every layout is within it." in text
    assert "OUTSIDE" not in text and "NOT CAUGHT" not in text
    assert (path.parent / "parity_learning.png").stat().st_size < 60_000
    assert results["learning"]["learning"]["difference"] < 5e-3
    assert results["cognition"]["answers"]["engine"] == results["cognition"]["answers"]["transformers"]
    assert str(path.parent) not in text


@long
def test_a_difference_is_not_hidden(document: tuple[Path, dict[str, dict]]) -> None:
    """The words follow the results: what is outside of its limit is said so."""
    from parity_text import _faults, _matrix

    results = json.loads(json.dumps(document[1]))
    results["matrix"]["plain"]["llama"]["error"] = "parity does not hold: layout pp2, step 3"
    assert "Outside of it: plain llama: parity does not hold: layout pp2, step 3" in _matrix(results["matrix"])
    results["faults"]["untied head"]["with"] = None
    assert "4 of 5 are caught" in _faults(results["faults"])
    assert "NOT CAUGHT" in _faults(results["faults"])


def test_the_document_in_docs_was_made_by_the_full_command() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles in (list(SECTIONS), [*SECTIONS, "## On a GPU"])  # the last comes from a machine with one
    assert "fp32, 20 steps" in text and "5 of 5 are caught" in text
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert f"| {family} | tp2,pp2,sp |" in text
    assert "SmolLM2-135M-Instruct on `" in text
    assert "Xiao Huang" in text
