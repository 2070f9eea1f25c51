"""Write the golden losses of families: `python -m tests.make_golden [family ...]`. Say in CHANGELOG.md why they moved."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests import tiny
from tests.engine.test_golden import GOLDEN, golden_run, layouts_of
from tests.ranks import RankPool
from tests.training import tiny_start, write_rows


def main(names: list[str]) -> None:
    """50 steps at each layout for each family."""
    pool = RankPool()
    for name in names or tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            start, rows = tiny_start(root, name), write_rows(root / "rows.jsonl")
            runs = {layout: golden_run(pool, start, rows, root / layout, layout) for layout in layouts_of(name)}
        (GOLDEN / f"losses_{name}.json").write_text(text_of(runs), encoding="utf-8")
    pool.close()


def text_of(runs: dict[str, dict[str, list[float]]]) -> str:
    """JSON with one list a line, so that a change reads well in a diff."""
    layouts = [
        f" {json.dumps(layout)}: {{\n" + ",\n".join(f"  {json.dumps(kind)}: {json.dumps(run[kind])}" for kind in run) + "\n }"
        for layout, run in runs.items()
    ]
    return "{\n" + ",\n".join(layouts) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
