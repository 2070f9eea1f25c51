"""Small benchmark files in the layouts of their publishers, written for these tests."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

ARC = [
    {"query": "Question: What do plants need to grow?", "choices": ["Light", "Noise", "Paint", "Glass"], "gold": 0},
    {"query": "Question: Which of these is a liquid?", "choices": ["Stone", "Water", "Wood"], "gold": 1},
    {"query": "Question: What falls from clouds?", "choices": ["Sand", "Iron", "Rain", "Salt"], "gold": 2},
    {"query": "Question: Which animal can fly?", "choices": ["Fish", "Horse", "Worm", "Sparrow"], "gold": 3},
]
GSM8K = [
    {"question": "Tom has 2 pens and buys 3. How many has he?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "A box costs 1,000 coins. What do two cost?", "answer": "2 * 1000 = 2000\n#### 2,000"},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(root: Path) -> Path:
    """All four benchmarks: MMLU as a zip, C-Eval as a directory, GSM8K and ARC as jsonl."""
    root.mkdir(parents=True, exist_ok=True)
    write_lines(root / "arc_challenge.jsonl", ARC)
    write_lines(root / "gsm8k_test.jsonl", GSM8K)
    write_lines(root / "gsm8k_train.jsonl", GSM8K[::-1])
    with zipfile.ZipFile(root / "mmlu.zip", "w") as archive:
        archive.writestr(
            "data/test/anatomy_test.csv", '"Which, of these,\nis a bone?",Femur,Liver,Skin,Hair,A\nHow many lungs?,1,2,3,4,B\n'
        )
        archive.writestr("data/test/virology_test.csv", "What is a virus?,A plant,A metal,A germ,A gas,C\n")
        archive.writestr("data/dev/anatomy_dev.csv", "Where is the heart?,Chest,Foot,Hand,Ear,A\n")
        archive.writestr("data/dev/virology_dev.csv", "What spreads flu?,Light,Droplets,Sound,Heat,B\n")
    ceval = root / "ceval"
    for split, row in (
        ("val", "0,一年有几个月？,10,11,12,13,C"),
        ("dev", "0,一周有几天？,5,6,7,8,C,数一数。"),
        ("test", "0,题目,1,2,3,4"),
    ):
        (ceval / split).mkdir(parents=True)
        header = "id,question,A,B,C,D" + {"val": ",answer", "dev": ",answer,explanation", "test": ""}[split]
        (ceval / split / f"law_{split}.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    return root
