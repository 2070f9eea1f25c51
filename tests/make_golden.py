"""Write the golden losses of families: `python -m tests.make_golden [family ...]`. Say in CHANGELOG.md why they moved."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests import tiny
from tests.engine.test_training import GOLDEN, options
from tests.ranks import RankPool
from tests.training import tiny_start, train, write_rows


def main(names: list[str]) -> None:
    """One run at tp 1, pp 1, dp 1 for each family."""
    pool = RankPool()
    for name in names or tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            run = train(pool, root / "out", 1, **options(tiny_start(root, name), write_rows(root / "rows.jsonl")))
            content = {"loss": run.losses, "eval_loss": run.eval_losses, "grad_norm": run.norms}
            (GOLDEN / f"losses_{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pool.close()


if __name__ == "__main__":
    main(sys.argv[1:])
