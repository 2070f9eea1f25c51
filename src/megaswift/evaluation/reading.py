"""What an answer says: the letter that it chooses, the number that it ends with. Thoughts and further questions do not count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megaswift.evaluation.items import LETTERS
from megaswift.inference.thoughts import apart

_CHARACTER = r"[^\W\u3400-\u9fff]"  # a letter or digit; not Chinese
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: 0x20
}  # full-width ASCII, as Chinese keyboards type it
_MINUS = dict.fromkeys(map(ord, "\u2212\ufe63\u2010\u2011"), "-")

# A line with which a model asks itself the next question, as in the solved examples that it has seen.
_FURTHER = re.compile(
    r"^[ \t]*(?:[#>*\-]+[ \t]*)?(?:(?:Next |New )?(?:Question|Problem|Q|Human|User|Exercise)\s*(?:\d+|#\d+)?\s*[*]*\s*[:：.)]"
    r"|(?:下一题|(?:问题|题目|问|用户|习题)\s*[\d一二三四五六七八九十]*\s*[*]*\s*[:：]|【(?:问题|题目)】)"
    r"|<\|im_start\|>\s*user|\[INST\]|<\|start_header_id\|>\s*user)",
    re.MULTILINE | re.IGNORECASE,
)


def segments(text: str) -> list[str]:
    """An answer without its thoughts, cut where further questions begin; the first part that can be read counts.

    A question that the answer begins with is the one that was asked, said again.
    """
    said, _ = apart(text)
    said = said.translate(_WIDE).translate(_MINUS).strip()
    cuts = [match.start() for match in _FURTHER.finditer(said) if said[: match.start()].strip()]
    return [said[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(said)])]


def own_words(text: str, reference: str) -> str:
    """An answer in words: without thoughts, and without further questions unless the right answer holds such a line itself."""
    if _FURTHER.search(reference):
        return apart(text)[0]
    said, _ = apart(text)
    cut = next((match.start() for match in _FURTHER.finditer(said) if said[: match.start()].strip()), len(said))
    return said[:cut].strip()


def read_letter(text: str, choices: Sequence[str]) -> str:
    r"""The letter that an answer chooses; "" where it chooses none, several, or cannot be read.

    What counts, in this order: the choice's whole text and nothing else, a letter in \boxed{} or alone on a line, one that is
    named as the answer, one that is called right, one at the beginning, one that is chosen in other words ("I would say B",
    "Option B"), a choice that is repeated word for word if it is the only one, a letter that is the only one in the text.
    """
    rules = _letter_rules(LETTERS[: len(choices)])
    for segment in segments(text):
        segment = re.sub(r"\\(?:text|math|bf|rm)\w*", "", segment)
        letter = _whole_choice(segment, choices) or _by_rules(segment, choices, rules)
        if letter:
            return letter if letter != _SEVERAL else ""
    return ""


_SEVERAL = "?"  # chosen together: "A or B"


def _by_rules(text: str, choices: Sequence[str], rules: Sequence[tuple[re.Pattern[str] | None, bool]]) -> str:
    """The letter that the first rule finds which finds one; `_SEVERAL` where that is two joined by "or"."""
    for pattern, must_agree in rules:
        if pattern is None:
            said = [letter for letter, choice in zip(LETTERS, choices) if _says(normal(text), normal(choice))]
            if len(said) == 1:
                return said[0]
            continue
        found = list(pattern.finditer(text))
        if not found or (must_agree and len({match.group(1).upper() for match in found}) > 1):
            continue
        last = found[-1]
        joined = re.match(rf"{_JOIN}([{LETTERS[: len(choices)]}])(?![A-Za-z'’])", text[last.end(1) :])
        return last.group(1).upper() if joined is None or joined.group(1) == last.group(1).upper() else _SEVERAL
    return ""


_JOIN = r"[\s)\]*\"'.$]*(?:\bor\b|\band\b|/|&|或者?|和|与|及|、)[\s(\[*\"'$]*"


def _letter_rules(letters: str) -> list[tuple[re.Pattern[str] | None, bool]]:
    """(pattern, whether all it finds must be one letter, else the last counts), strongest first; None: a choice word for word."""
    # "A dog", "I think" and "the answer is a dog" name no choice; "A because" does.
    article = r"(?![AaIi]\s+(?!(?:because|since|as|and|or|is|in)\b)[a-z])"
    wrong = (
        r"(?![\s)*\"']*(?:(?:is|are|was|were|seems?|looks?)\s+(?:wrong|incorrect|not\b|false)|(?:is|was)n['’]t|cannot|can['’]t"
        r"|(?:选项|项)?\s*(?:是)?(?:错|不)))"
    )
    end = rf"(?![A-Za-z0-9'’+#]){wrong}"
    any_case, capital = rf"{article}([{letters}{letters.lower()}]){end}", rf"{article}([{letters}]){end}"
    noun = r"(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:answer|option|choice|letter)"
    verb = r"(?:is|are|was|would be|should be|must be|will be|has to be)"
    about = r"(?:\s+(?:to|for|of|here)\b[^.\n]{0,60}?)?"
    mark = r"[^\w\u3400-\u9fff]*"
    is_word = r"(?:应该|应当|应|就|只能|便)?(?:是|为|选择|选)?(?:选项)?"
    named = (
        rf"(?:(?i:{noun}{about}{mark}{verb}\b{mark}(?:{noun}\b)?|{noun}{mark}:|\banswer\b(?:{mark}{noun}\b)?)"
        rf"|(?:答案|正确选项){mark}{is_word}|(?<![不勿别可])选(?:择|项是|项为|的是)?(?!项)){mark}"
    )
    chosen = (
        r"(?:(?i:\b(?:option|choice|letter|say|said|choose|chose|pick|select|with|for|think|believe|guess|be|is|it['’]s|therefore|thus|so|hence)\b)"
        r"|选项|(?:应该|应当|就|因此|所以|故|我认为)?(?:是|为))"
    )
    says_right = (
        rf"\b{capital}[\s)*\"']*(?:(?i:(?:is|was|seems|looks|would be|must be)\s+(?:the\s+|definitely\s+|clearly\s+|also\s+)?"
        r"(?:right|correct|best|true|answer|most))|(?:选项|项)?(?:是|为)?(?:最)?(?:正确|对的|合适|答案))"
    )
    lone = rf"[{letters.lower()[1:]}]\W*(?:[.,;!\n]|\Z)|(?<=\()[{letters.lower()}]\)"  # "a" is a word
    alone = rf"(?m)^[^\w\n]*([{letters}{letters.lower()}])[^\w\n]*$"
    rules = (
        (rf"boxed\s*\{{[\s({{$\\]*{any_case}", False),
        (alone, True),
        (named + any_case, False),
        (says_right, True),
        (rf"\A\W*(?=[{letters}]|[{letters.lower()}][.):]\s){any_case}(?!\W*\n\W*[{letters}]\W*(?:\n|\Z))", False),
        (rf"{chosen}[\s(\[*\"'$:,]*(?=[{letters}]|{lone}){any_case}", False),
        (None, False),
        (rf"(?<![A-Za-z0-9'’])(?:(?<=[a-z,;] )(?=A)|{article})([{letters}]){end}", True),  # within a sentence A is no article
    )
    return [(None if pattern is None else re.compile(pattern), agree) for pattern, agree in rules]


def _whole_choice(text: str, choices: Sequence[str]) -> str:
    """The letter of the choice that a text is, and nothing else; choices that are letters themselves are left to the rules."""
    said = text.strip(" .。\n").casefold()
    same = [letter for letter, choice in zip(LETTERS, choices) if said == choice.strip(" .。").casefold()]
    return same[0] if len(same) == 1 and not (len(said) == 1 and said.isalpha()) else ""


def _says(text: str, choice: str) -> bool:
    """Whether a choice stands in a text as whole words; Chinese has no borders of words."""
    before = rf"(?<!{_CHARACTER})" if re.match(_CHARACTER, choice) else ""
    after = rf"(?!{_CHARACTER})" if re.match(_CHARACTER, choice[::-1]) else ""
    return bool(choice) and re.search(before + re.escape(choice) + after, text) is not None


_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])[-–](?=[$€£¥￥]?(?:\.?\d|\\[dt]?frac))|(?<=[$€£¥￥])-(?=\.?\d))?[$€£¥￥]?"
    rf"(?:\\[dt]?frac\s*\{{(?P<over>\d+)\}}\s*\{{(?P<under>\d+)\}}|(?P<digits>{_DIGITS})(?:\s*/\s*(?P<divisor>\d+(?:\.\d+)?))?)"
)
_REACH = 200  # characters behind "the answer is" in which the number stands
_STATED = re.compile(
    r"(?i:answer\b[\s*_]*(?:is\b|:|=|would be|should be|must be)|答案[\s*]*(?:应该|应)?(?:是|为|:)|####|boxed\s*\{)"
)
_LINE = re.compile(
    r"(?im)^[\s*#>]*(?:(?:so|thus|therefore|hence)?,?\s*(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)|答案(?:是|为|:)|####)(?P<rest>[^\n]*)$"
)


def read_number(text: str) -> str:
    """The number that an answer ends with, without thousands separators and trailing zeros; "" where there is none.

    A line that holds nothing but the answer ends it. Else the last number that is stated as the answer counts, else the last one.
    """
    return next((number for segment in segments(text) if (number := _number_in(segment))), "")


def _number_in(text: str) -> str:
    text = re.sub(r"(?<=\d)(?:\\[,!;]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3})", "", text).replace("\\$", "$")
    for line in _LINE.finditer(text):
        numbers = list(_NUMBER.finditer(line["rest"]))
        if len(numbers) == 1 and not re.search(r"\w", _NUMBER.sub("", re.sub(r"\\?boxed|\\text\w*", "", line["rest"]))):
            return _plain(numbers[0])
    for stated in reversed(list(_STATED.finditer(text))):
        rest = _stated_part(text, stated)
        if numbers := list(_NUMBER.finditer(rest.rpartition("=")[2])) or list(_NUMBER.finditer(rest)):
            return _plain(numbers[0])
    found = list(_NUMBER.finditer(text))
    return _plain(found[-1]) if found else ""


def _stated_part(text: str, stated: re.Match[str]) -> str:
    """What stands behind "the answer is" up to the end of its sentence, or within the braces of a box."""
    rest = text[stated.end() : stated.end() + _REACH]
    if not stated.group().endswith("{"):
        return re.split(r"\n|[.。!?](?=\s|$)", rest.lstrip(" *_:"), maxsplit=1)[0]
    depth = 1
    for place, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:place]
    return rest


def _plain(number: re.Match[str]) -> str:
    """A number as decimal digits without trailing zeros; a fraction that is no decimal number as it is, in lowest terms."""
    over, under = number["over"] or number["digits"].replace(",", ""), number["under"] or number["divisor"] or "1"
    try:
        value = Fraction(over) / Fraction(under)
    except (ZeroDivisionError, ValueError):  # or more digits than Python reads
        return ""
    value = -value if number["sign"] else value
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def normal(text: str) -> str:
    """Text without case, punctuation and repeated spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())
