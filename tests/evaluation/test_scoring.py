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

from megaswift.errors import UserError
from megaswift.evaluation.items import Bench, Item
from megaswift.evaluation.judge_process import JudgeProcess
from megaswift.evaluation.run import make_scorer
from megaswift.evaluation.scoring import Asked, OwnScorer, Verdict, read_letter, read_number, rouge_l
from megaswift.evaluation.statistics import mcnemar, paired, paired_bootstrap, wilson
from megaswift.inference.thoughts import apart

FOUR = ("red", "green", "blue", "white")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B. green", "B"), ("(C)", "C"), ("The answer is D.", "D"), ("Answer: a", "A"), ("答案：B", "B"), ("答案是 C。", "C"),
        ("A good question. The answer is B", "B"), ("A colour", ""), ("It is green.", "B"), ("red or green", ""), ("", ""), ("E", ""),
        ("\x00\ud800", ""), ("Beautiful", ""), ("The answer is a dog.", ""), ("Answer: a hot object is red", "A"), ("the answer is b because", "B"),
        ("The answer is A because", "A"), ("greenish", ""), ("infrared", ""),
        ("b", "B"), ("\\boxed{B}", "B"), ("I would say B", "B"), ("Option B is right", "B"), ("Option B", "B"), ("option (c).", "C"),
        ("<think>\nMaybe the answer is A. But grass is green.\n</think>\n\nB", "B"), ("<think>\n\n</think>\n\nB", "B"),
        ("Maybe A. So A.</think>\n\nC", "C"), ("<think>It could be A, the answer is A", ""), ("[THINK]A[/THINK]D", "D"), ("**B**", "B"),
        ("**Answer:** B", "B"), ("$\\boxed{\\text{B}}$", "B"), ("\\boxed{b}", "B"), ("\\boxed{green}", "B"), ("The answer is $\\mathbf{C}$", "C"),
        ("Ｂ", "B"), ("答案：Ｂ", "B"), ("<answer>B</answer>", "B"), ("The correct option is B", "B"), ("The correct choice is (B).", "B"),
        ("The answer would be B", "B"), ("The answer to this question is: B", "B"), ("The correct answer is option B", "B"),
        ("The answer is the letter B.", "B"), ("Option A is wrong. Option B is right.", "B"), ("Option A is wrong, so I choose B.", "B"),
        ("B is correct because A is not", "B"), ("(B) is the right choice", "B"), ("The answer is not A, it's B.", "B"),
        ("The answer is A or B", ""), ("A or B", ""), ("B/C", ""), ("B\n\nThe answer A is wrong because", "B"), ("b) green", "B"), ("b. green", "B"),
        ("I think it is A, no, I choose B", "B"), ("选B", "B"), ("故选：B。", "B"), ("应选 (B)", "B"), ("本题选B项", "B"), ("正确答案是选项B", "B"), ("答案应该是B", "B"),
        ("B选项正确", "B"), ("B项正确", "B"), ("B是正确的", "B"), ("我认为是B", "B"), ("不选A，选C", "C"), ("选C，不选A", "C"), ("选项A错误，选项B正确", "B"), ("答案不是A而是B", "B"), ("A错误，B正确", "B"),
        ("选项B", "B"), ("Answer: B\n\nQuestion: What?\nA. x\nAnswer: C", "B"), ("答案：B\n\n问题：什么？\n答案：C", "B"), ("Question: What?\nAnswer: C", "C"),
        ("Let me think.\nQuestion: which?\nAnswer: D", "D"), ("B\n\nHuman: next?\n\nC", "B"), ("Vitamin C is green", "B"), ("A\nB\nC\nD", ""),
        ("The answer is C, since D is wrong.", "C"), ("I", ""), ("Let's see... B!", "B"), ("It must be D", "D"), ("Therefore, D.", "D"),
        ("The best answer is \"C\".", "C"), ("Answer:\nB", "B"), ("The final answer is:\n\n**C**", "C"), ("A is true but the answer is C", "C"),
        ("D because it is so", "D"), ("blue.", "C"), ("It's (a).", "A"), ("I'd go with c.", "C"), ("i would say b", "B"), ("My answer: d", "D"),
        ("Of the options, A describes, B tells", ""), ("正确的是B", "B"), ("答案为：C", "C"), ("答案：(D)", "D"), ("答案【B】", "B"), ("A、B", ""),
        ("The answer is: a) red", "A"), ("So the answer is D. Option A is wrong.", "D"), ("answer choice B", "B"),
        ("Wrong are A and C. Right is B", "B"),
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
    assert read_letter("C++", ("Python", "Perl", "Java", "C++")) == "D"  # the whole choice, not the letter C
    assert [read_letter(text, "klmnopqrst") for text in ("I would say B", "I", "I think so")] == ["B", "I", ""]


def test_reading_takes_no_time_that_grows_with_its_square() -> None:
    began = time.monotonic()
    for text in (
        "\\boxed{" * 2000,
        "answer is " * 3000,
        "<think>" * 4000,
        "</think>" * 4000,
        "1," * 9000,
        "1" * 9000,
        "*" * 20_000,
    ):
        read_letter(text, FOUR)
        read_number(text)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("text", "number"),
    [("The answer is 1,234.50.", "1234.5"), ("3 + 4 = 7", "7"), ("#### -12", "-12"), ("\\boxed{18}", "18"), ("none", ""), ("0.0", "0"), ("The answer is $5 of 9", "5"),
        ("The answer is 18.\n\nQuestion: Tom has 5.\nThe answer is 5.", "18"), ("The answer is \u22123", "-3"),
        ("The answer is 18.\n\nTom has 5 pens. How many?\n5+5=10\nThe answer is 10.", "18"), ("<think>5? 6?</think>7", "7"),
        ("x</think>The answer is 8", "8"), ("<think>The answer is 9", ""), ("答案是：18元", "18"), ("１８", "18"), ("the answer is –3", "-3"),
        ("-$18", "-18"), ("$-18", "-18"), ("10-4", "4"), ("pages 3-5", "5"), ("\\boxed{\\$18}", "18"), ("\\boxed{18\\text{ dollars}}", "18"),
        ("\\boxed{x = 18}", "18"), ("\\boxed{\\frac{1}{2}}", "0.5"), ("36/2", "18"), ("1{,}234", "1234"), ("1\\,234", "1234"),
        ("The answer is 3 + 15 = 18.", "18"), ("The answer is: **18**", "18"), ("Answer: 18", "18"), ("**Answer:** 18 apples", "18"),
        ("18\n\nQ: 3?\nA: 4", "18"), ("The answer is .5", "0.5"), ("1,2,3", "3"), ("1,00,000", "100000"), ("2,000", "2000"),
        ("The answer is 1/3", "1/3"), ("The final answer is $\\boxed{18}$.", "18"), ("#### 18\n\nNext: 5", "18"),
        ("So the answer is 5. Wait, no. The answer is 6.", "6"), ("The answer is 5 dollars each, so the total is 25.", "5"), ("- 3 apples", "3"),
        ("答案：\u22127", "-7"), ("The answer is 2.50", "2.5"), ("It costs $1,000.00", "1000"), ("The answer is 18%.", "18"), ("007", "7"),
        ("The answer is (-3).", "-3"), ("The answer is 50.\n\nHuman: 3", "50"), ("1/0", ""), ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("问题：小明有3个。\n答案是7", "7"), ("The answer is Tom has 18 pens.", "18"), ("12.345678", "12.345678"),
        ("The answer is 1000000000000000000000.5", "1000000000000000000000.5"),
    ],
)  # fmt: skip
def test_numbers(text: str, number: str) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize("kind", ["arc", "mmlu", "ceval", "gsm8k", "general_qa"])
def test_thoughts_and_further_questions_do_not_count(kind: str) -> None:
    """For every benchmark and own questions: the answer stands after the thoughts and before what the model asks itself."""
    right = {"gsm8k": "12", "general_qa": "A blue one."}.get(kind, "B")
    wrong = {"gsm8k": "13", "general_qa": "A red one."}.get(kind, "C")
    item = Item("main", "7", "What?", FOUR if right == "B" else (), right)
    made = OwnScorer(Bench(kind, kind, "test", (item,)), 0)
    further = "\n\n问题：什么？\n" if kind == "ceval" else "\n\nQuestion: What else?\n"
    [asked] = made.asked()
    for text in (right, f"<think>\n{wrong}\n</think>\n\n{right}", f"{wrong}</think>{right}", f"{right}{further}{wrong}"):
        assert made.judge(asked, text) == Verdict(right, True, 1.0), text
    assert not made.judge(asked, f"<think>{right}</think>{wrong}").correct
    assert made.judge(asked, f"<think>{right}").prediction == ""


def test_an_answer_that_holds_a_question_is_compared_whole() -> None:
    item = Item("main", "7", "Write a question.", (), "Here it is.\nQuestion: Why?")
    made = OwnScorer(Bench("faq", "general_qa", "test", (item,)), 0)
    assert made.judge(made.asked()[0], item.answer).score == 1


@pytest.mark.parametrize(
    ("text", "opened", "said", "unfinished"),
    [
        ("plain", False, "plain", False), ("<think>a</think>b", False, "b", False), ("a</think>b", True, "b", False), ("a</think>b", False, "b", False),
        ("<think>a", False, "", True), ("a", True, "", True), ("said <think>a", False, "said", True), ("<think>a</think>b<think>c", False, "b", True),
        ("<think>a</think>b</think>c", False, "c", False), ("<think>a</think>b<think>c</think>d", False, "b\nd", False), ("[THINK]a[/THINK]b", False, "b", False),
        ("<think>a</think>", False, "", False), ("<think>a</think>b", True, "b", False), ("a</think>b<think>c</think>d", False, "b\nd", False),
    ],
)  # fmt: skip
def test_thoughts_apart(text: str, opened: bool, said: str, unfinished: bool) -> None:
    assert apart(text, opened) == (said, unfinished)


def test_no_question_is_its_own_solved_example() -> None:
    """Neither for the prompt of one question nor where all of a subset share theirs; spaces make no other question."""
    items = [Item("law", str(number), f"Question  {number}?", FOUR, "B") for number in range(2)]
    shots = [Item("law", f"s{number}", f"Question{' ' * (number + 1)}{number}?", FOUR, "B") for number in range(4)]
    bench = Bench("mmlu", "mmlu", "test", tuple(items), {"law": tuple(shots)})
    assert [shot.id for shot in bench.examples(items[0], 2)] == ["s1", "s2"]
    assert [shot.id for shot in bench.examples(items[1], 2)] == ["s0", "s2"]
    assert [shot.id for shot in bench.common_examples(items, 2)] == ["s2", "s3"]
    with pytest.raises(UserError, match="has 2 solved examples for law beside 2 that are asked themselves"):
        bench.common_examples(items, 3)
    asked = OwnScorer(bench, 2).asked()[0].messages[-1]["content"]
    assert asked.count("Question  0?") == 1 and "Question 0?" not in asked
    assert asked.index("Question  1?") < asked.index("Question   2?") < asked.index("Question  0?")


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
