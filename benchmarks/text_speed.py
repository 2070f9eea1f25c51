"""Preparing text for `swift pt`, and cutting rows of it: time, largest memory of each process, disk.

python benchmarks/text_speed.py --words rows.jsonl --megabytes 500 2000 [--dir DIR]

Documents are stretches of the words of a JSON Lines file in random order, some three hundred words each, so that a tokenizer has as
much work with them as with real text. All is written below DIR and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

MODEL, LENGTH, STEPS, BATCH = "smollm2-135m-instruct", 4096, 20, 64


def write_text(source: Path, megabytes: int, target: Path) -> None:
    """A file of about so many megabytes; the same for the same source."""
    draw = np.random.default_rng(1)
    with source.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        words = np.array([word for row in rows for value in row.values() for word in str(value).split(" ")], object)
    written = 0
    with target.open("w", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            parts, left = [], int(min(draw.lognormal(5.6, 1.0) + 20, 20_000))
            while left > 0:
                count, first = int(draw.integers(4, 40)), int(draw.integers(0, len(words) - 40))
                parts.append(" ".join(words[first : first + count]))
                left -= count
            written += file.write(json.dumps({"text": " ".join(parts)}) + "\n")


class Watch:
    """Looks at this process and its children five times a second.

    Attributes:
        largest: MB of memory of their own that this process, one child, and all together had at most.
    """

    def __init__(self) -> None:
        self.largest = {"parent": 0.0, "worker": 0.0, "together": 0.0}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        me = os.getpid()
        while not self.done.wait(0.2):
            own, workers = _memory(me), [_memory(child) for child in _children(me)]
            for name, size in (("parent", own), ("worker", max(workers, default=0.0)), ("together", own + sum(workers))):
                self.largest[name] = max(self.largest[name], size)

    def stop(self) -> dict[str, float]:
        self.done.set()
        self.thread.join()
        return {f"{name}_mb": size for name, size in self.largest.items()}


def _children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _memory(process: int) -> float:
    """MB that a process has of its own, what it maps of files left out."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon"))


def measure(text: Path, cache: Path) -> dict[str, Any]:
    """What it takes to prepare a file, to cut it to another length, and to make batches of it."""
    from megaswift.config.options import PtArguments
    from megaswift.data.batches import Batches
    from megaswift.data.pretrain import prepare_text
    from megaswift.data.text import TextTokens
    from megaswift.hub.locate import locate
    from megaswift.weights.hf.tokenizer import read_tokenizer

    tokens = TextTokens(read_tokenizer(locate(MODEL).path))
    watch, began = Watch(), time.monotonic()
    data = prepare_text(PtArguments(dataset=[str(text)], max_length=LENGTH), tokens, cache_dir=cache)
    seconds = time.monotonic() - began
    memory, size = watch.stop(), text.stat().st_size / 1e6
    disk = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 1e6
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    prepare_text(PtArguments(dataset=[str(text)], max_length=LENGTH // 2), tokens, cache_dir=cache)
    again = time.monotonic() - began
    batches = Batches(
        data.train, micro_batch_size=4, global_batch_size=BATCH, dp_rank=0, dp_size=1, seed=1, pad_id=tokens.pad_id
    )
    began_cpu = time.process_time()
    for step in range(STEPS):
        batches.step(step)
    fed = STEPS * BATCH * LENGTH / (time.process_time() - began_cpu) / 1e6
    return {
        "text_mb": size, "seconds": seconds, "mb_a_second": size / seconds, "mb_a_second_of_a_worker": size / (workers.ru_utime + workers.ru_stime),
        "tokens_million": data.report.tokens / 1e6, "disk_mb": disk, **memory, "another_length_seconds": again,
        "batches_million_tokens_a_second_of_a_core": fed,
    }  # fmt: skip


def main() -> None:
    """The command; each size is measured by a process of its own, whose memory begins anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=Path, required=True, help="JSON Lines that the text is made of")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[500])
    parser.add_argument(
        "--dir", type=Path, default=None, help="where the text and its tokens go; default: a temporary directory"
    )
    options = parser.parse_args()
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(dir=options.dir) as work:
            write_text(options.words, megabytes, Path(work) / "text.jsonl")
            child = os.fork()
            if not child:
                found = measure(Path(work) / "text.jsonl", Path(work) / "cache")
                shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}
                print(json.dumps(shown), flush=True)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit("the measurement failed")


if __name__ == "__main__":
    main()
