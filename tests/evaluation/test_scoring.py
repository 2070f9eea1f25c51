"""Reading answers, and the statistics of comparisons."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from megaswift.evaluation.items import Bench, Item
from megaswift.evaluation.judge_process import JudgeProcess
from megaswift.evaluation.scoring import Asked, OwnScorer, Verdict, make_scorer, read_letter, read_number, rouge_l
from megaswift.evaluation.statistics import mcnemar, paired, paired_bootstrap, wilson

FOUR = ("red", "green", "blue", "white")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. green", "B"), ("(C)", "C"), ("The answer is D.", "D"), ("Answer: a", "A"), ("答案：B", "B"), ("答案是 C。", "C"),
        ("A good question. The answer is B", "B"), ("A colour", ""), ("It is green.", "B"), ("red or green", ""), ("", ""), ("E", ""),
        ("\x00\ud800", ""), ("Beautiful", ""), ("The answer is a dog.", ""), ("Answer: a hot object is red", "A"), ("the answer is b because", "B"),
        ("The answer is A because", "A"), ("greenish", ""), ("infrared", ""),
        ("The answer is A. No: the answer is C.", "C"),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str) -> None:
    assert read_letter(text, FOUR) == letter


def test_choices_are_found_as_whole_words() -> None:
    assert read_letter("It is 14.", "4567") == ""
    assert read_letter("It is 4.", "4567") == "A"
    assert read_letter("这是绿色的", ("红色", "绿色")) == "B"
    assert read_letter("c++, of course", ("c", "c++")) == ""  # punctuation does not count, so both are said


@pytest.mark.parametrize(
    ("text", "number"),
    [("The answer is 1,234.50.", "1234.5"), ("3 + 4 = 7", "7"), ("#### -12", "-12"), ("\\boxed{18}", "18"), ("none", ""), ("0.0", "0"), ("The answer is $5 of 9", "5")],
)  # fmt: skip
def test_numbers(text: str, number: str) -> None:
    assert read_number(text) == number


def test_rouge_l() -> None:
    assert rouge_l("the cat sat", "the cat sat") == 1
    assert rouge_l("the cat", "the dog") == pytest.approx(0.5)
    assert rouge_l("我是小黄", "我是小红") == pytest.approx(0.75)
    assert rouge_l("", "x") == 0


def test_wilson_interval_of_a_textbook_case() -> None:
    low, high = wilson(81, 263)  # E. B. Wilson's interval for 81 of 263, as in Newcombe, 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 0) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(3, 12) == pytest.approx(0.03515625)


def test_a_pair() -> None:
    found = paired([1, 0, 1, 0], [1, 1, 1, 1], [(True, True), (False, True), (True, True), (False, True)], 3, 42)
    assert (found.difference, found.gained, found.lost, found.changed) == (0.5, 2, 0, 3)
    assert 0 <= found.low <= 0.5 <= found.high <= 1
    assert not found.significant
    assert paired_bootstrap([0.0] * 9) == (0.0, 0.0)
    assert paired_bootstrap([1, -1] * 50, seed=1) == paired_bootstrap([1, -1] * 50, seed=1)


def _bench(kind: str, item: Item) -> Bench:
    return Bench(
        kind, kind, "test", (item,), {item.subset: (Item(item.subset, "s", "Shot?", item.choices, item.answer, "Because."),)}
    )


@pytest.mark.parametrize("kind", ["arc", "mmlu", "ceval", "gsm8k"])
@pytest.mark.parametrize("scorer", ["own", "evalscope"])
def test_scorers_ask_and_judge(kind: str, scorer: str) -> None:
    if scorer == "evalscope" and find_spec("evalscope") is None:
        pytest.skip("EvalScope is not installed (make test-eval installs it)")
    subset = {"arc": "ARC-Challenge", "mmlu": "anatomy", "ceval": "law", "gsm8k": "main"}[kind]
    item = Item(subset, "7", "What?", () if kind == "gsm8k" else FOUR, "12" if kind == "gsm8k" else "B")
    made = OwnScorer(_bench(kind, item), 1) if scorer == "own" else make_scorer(_bench(kind, item), 1, 42)
    assert made.title.startswith(scorer if scorer == "evalscope" else "megaswift")
    [asked] = made.asked()
    text = asked.messages[-1]["content"]
    assert "What?" in text
    assert "Shot?" in text
    right = {"gsm8k": "\\boxed{12}", "ceval": "答案：B"}.get(kind, "ANSWER: B")
    assert made.judge(asked, right).correct
    assert not made.judge(asked, right.replace("B", "C").replace("12", "13")).correct
    nothing = made.judge(asked, "")
    assert (nothing.prediction, nothing.correct, nothing.score) == ("", False, 0.0)


class _Stubborn(OwnScorer):
    """Hangs, dies or fails over some answers."""

    def judge(self, asked: Asked, text: str) -> Verdict:
        if text == "hang":
            time.sleep(600)
        if text == "die":
            os._exit(7)
        if text == "fail":
            raise ValueError("this scorer cannot read that")
        if text == "strange":
            raise ValueError("this error cannot travel", lambda: None)
        return super().judge(asked, text)


def test_a_judge_process_survives_answers_that_hang_or_kill() -> None:
    item = Item("main", "7", "What?", (), "12")
    made = partial(_Stubborn, _bench("gsm8k", item), 0)
    [asked] = made().asked()
    with JudgeProcess(made, deadline=2.0) as judge:
        assert judge(asked, "It is 12.").correct
        before = judge._process.pid
        began = time.monotonic()
        assert judge(asked, "hang") == Verdict("", False, 0.0)
        assert time.monotonic() - began < 30
        assert not Path(f"/proc/{before}").exists()
        assert judge(asked, "It is 12.").correct
        assert judge(asked, "die") == Verdict("", False, 0.0)
        assert judge(asked, "It is 13.") == Verdict("13", False, 0.0)
        with pytest.raises(ValueError, match="cannot read that"):
            judge(asked, "fail")
        with pytest.raises(RuntimeError, match="ValueError: .*cannot travel"):
            judge(asked, "strange")
        last = judge._process.pid
    assert not Path(f"/proc/{last}").exists()


def test_a_judge_process_never_runs_the_users_script_again(tmp_path: Path) -> None:
    script = tmp_path / "asks.py"
    script.write_text(
        "from functools import partial\n"
        "from megaswift.evaluation.items import Bench, Item\n"
        "from megaswift.evaluation.judge_process import JudgeProcess\n"
        "from megaswift.evaluation.scoring import OwnScorer\n"
        "print('once')\n"
        "item = Item('main', '7', 'What?', (), '12')\n"
        "bench = Bench('gsm8k', 'gsm8k', 'test', (item,))\n"
        "scorer = partial(OwnScorer, bench, 0)\n"
        "with JudgeProcess(scorer) as judge:\n"
        "    print(judge(scorer().asked()[0], 'It is 12.').correct)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "once\nTrue\n", done.stderr
    assert not done.stderr


def test_a_judge_that_cannot_be_made_says_why() -> None:
    with (
        JudgeProcess(partial(_missing, "evalscope is broken")) as judge,
        pytest.raises(ImportError, match="evalscope is broken"),
    ):
        judge(Asked(Item("main", "7", "What?", (), "12"), []), "12")


def _missing(text: str) -> OwnScorer:
    raise ImportError(text)


@pytest.mark.skipif(find_spec("evalscope") is None, reason="EvalScope is not installed (make test-eval installs it)")
def test_evalscope_judges_mathematics_in_its_own_process() -> None:
    item = Item("main", "7", "What?", (), "12")
    made = make_scorer(_bench("gsm8k", item), 1, 42)
    [asked] = made.asked()
    answers = ["\\boxed{12}", "\\boxed{13}", "It is $\\frac{24}{2}$", "no idea", "\\boxed{" * 400]
    with made.judging() as judge:
        assert judge(asked, answers[0]).correct
        child = judge._process.pid
        assert [judge(asked, text) for text in answers] == [made.judge(asked, text) for text in answers]
        assert judge._process.pid == child, "no answer took the deadline"
