"""Answer text -> extracted answer -> right or wrong. The one grader of the teacher's judge and of the evaluation.

What is read, in this order:
1. the last explicit statement in the text that holds a candidate: "The answer is X", "The answer to ... is X", "Answer: X", `\\boxed{X}`
   or `#### 12`; passed over are the instruction said again ("The answer is <letter>"), a statement that is cut off ("The answer is \\(")
   and one without a candidate ("So the answer is correct.", "Answer: Let's see.");
2. without one, what the text ends on: its last number; the last expression; the option that the last line names (else the option
   that the first line consists of, for students who answer first); the last sentence that begins and ends with "yes" or "no".

An answer that names several candidates ("5 or 6", "A and C", "yes or no") is no answer, and nor is a list of the options, or a walk
through them, that the text ends in. Numbers are digits: "a dozen" is left wrong on purpose, because a grader that guesses at words
cannot be checked, and "5 million" is no answer. Currency, percent signs and units are passed over, so 50 % equals 50 and not 0.5. No
text makes anything here raise, or work longer than `MATH_SECONDS` on an answer.
"""

from __future__ import annotations

import atexit
import json
import re
import signal
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

from mind.errors import DataError, PassingError
from mind.prompts import PLACEHOLDERS
from mind.records import Kind, Question

MATH_SECONDS = 5.0
"""The processor time in which two symbolic answers are compared; beyond it the answer counts as wrong. Load on the machine is no matter."""

WALL, START_SECONDS = 12, 120.0
"""By the clock: so many times `MATH_SECONDS` (processor time may not pass, and Windows does not count it), and the time of a start-up."""

READ_CHARACTERS = 20_000
"""Only the end of a longer text is read: answers stand there, and every pattern below stays fast."""

MATH_CHARACTERS = 400
"""A symbolic answer longer than this is prose; it is not handed to the parser."""

NO_ANSWER, WRONG, TOO_SLOW = "no answer", "wrong answer", "too slow to compare"
"""The reasons of a `Grade` that is not correct."""

_Reader = Callable[[str], str | None]


@dataclass(frozen=True)
class Grade:
    """`answer` as extracted (None: nothing gradable was found); `reason` is empty when correct."""

    correct: bool
    answer: str | None
    reason: str = ""


def grade(text: str, gold: str, kind: Kind = "number", choices: Sequence[str] = ()) -> Grade:
    """Compare the answer that `text` arrives at with `gold`. Never raises for any `text`."""
    answer = extract(text, kind, choices)
    if answer is None:
        return Grade(False, None, NO_ANSWER)
    same = _EQUAL[kind](answer, gold)
    if same is None:
        return Grade(False, answer, TOO_SLOW)
    return Grade(same, answer, "" if same else WRONG)


def extract(text: str, kind: Kind = "number", choices: Sequence[str] = ()) -> str | None:
    """The answer that `text` arrives at: a plain number, an option letter, yes / no, or an expression as written."""
    text = _plain(text)
    readers: dict[Kind, tuple[_Reader, _Reader]] = {
        "number": (_stated_number, _last_number),
        "choice": (partial(_named, choices=choices), partial(_unstated_choice, choices=choices)),
        "yesno": (_stated_yesno, _last_yesno),
        "math": (_expression, _last_expression),
    }
    stated, unstated = readers[kind]
    for statement in _statements(text):
        answer = stated(statement)
        if answer is not None:
            return answer or None  # UNCLEAR is no answer
    return unstated(text)


def check_gold(answer: str, kind: Kind = "number", choices: Sequence[str] = ()) -> str | None:
    """Why `answer` cannot serve as the gold answer of a question of this kind; None when it can."""
    if kind == "number":
        return None if _gold_number(answer) is not None else f"the answer {answer!r} is not a number"
    if kind == "yesno":
        return None if answer.strip().lower() in _YESNO else f"the answer {answer!r} is not 'yes' or 'no'"
    if kind == "math":
        return (
            None
            if answer.strip() and answer.count("{") == answer.count("}")
            else f"the answer {answer!r} is empty or has unbalanced braces"
        )
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        return f"{len(choices)} options; wanted 2 to {len(string.ascii_uppercase)}"
    letters = string.ascii_uppercase[: len(choices)]
    return None if len(answer) == 1 and answer in letters else f"the answer {answer!r} is not one of the letters {', '.join(letters)}"


def refuse_ungradable(source: object, questions: Iterable[Question]) -> None:
    """Raises DataError for the first of the questions of `source` whose gold answer cannot be graded."""
    for question in questions:
        if fault := check_gold(question.answer, question.kind, question.choices):
            raise DataError(f"{source}, question '{question.id}': {fault}", wanted=f"an answer that can be graded as '{question.kind}'")


def split_answer_line(text: str) -> tuple[str, str | None]:
    """`text` without a final "The answer is X.", and X (None when its last line does not hold that sentence)."""
    head, newline, line = text.strip().rpartition("\n")
    sentences = list(_FINAL_LINE.finditer(line))
    if not sentences:
        return head + newline + line, None
    last = sentences[-1]
    body = head + newline + line[: last.start("sentence")]
    answer = line[last.end() :].strip("*_ ").removesuffix(".").rstrip("*_ ")
    return body.rstrip(), answer or None


# ------------------------------------------------------- where the answer stands

_FINAL_LINE = re.compile(r"(?:^|[.!?:;)]\s)\s*(?P<sentence>[*_#>\s]{0,6}the (?:final |correct )?answer is:?)", re.IGNORECASE)
_STATEMENT = re.compile(
    r"(?<!\bif the )(?<!\bwhether the )"
    r"\banswer(?:[*_]*\s?(?:is\b|:|=)|\sto\s[^.\n\"]{0,100}?(?:\"[^\"\n]{0,200}\"[^.\n\"]{0,40}?)?\sis\b)[*_]{0,4}:?"
    r"(?![\s:*_]{0,8}(?:not\b|correct[.!]))\s*(?:(?<=\n)[-*\u2022]\s+)?"  # a bullet on the next line is no minus
    r"|####[ \t]*(?=[-+]?[$.\d\\])(?!\d+[.:)][ \t]+\w)"  # GSM8K's form; "#### 2. The cost" is a heading
    r"|\\boxed\s*\{",
    re.IGNORECASE,
)
_STATEMENTS = 5  # from the end: a text of nothing but empty statements must not cost the square of its length
_SIGNS = str.maketrans("\u2212\u2013\u00a0\u202f\u2019\u201c\u201d", '--  \'""')  # minus, dash, hard spaces, apostrophe, quotes
UNCLEAR = ""
"""What a reader of statements returns for one with several candidates, or one that it cannot read; None: with no candidate at all."""


def _plain(text: str) -> str:
    return text[-READ_CHARACTERS:].translate(_SIGNS).strip()


def _statements(text: str) -> Iterator[str]:
    """What the last explicit statements say, the last one first: the rest of its line, or the content of its box."""
    for found in [*_STATEMENT.finditer(text)][: -_STATEMENTS - 1 : -1]:
        said = _braced(text, found.end()) if found[0].endswith("{") else text[found.end() :].split("\n", 1)[0]
        if re.search(r"\w", said) and not said.startswith(PLACEHOLDERS):
            yield said.strip()


def _braced(text: str, start: int) -> str:
    """From `start`, just after an opening brace, to the brace that closes it (or to the end of the text)."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


# ------------------------------------------------------------------------ numbers

_NUMBER = re.compile(
    r"(?<![\w.])-?(?:(?P<mixed>\d+) (?=\d+/\d))?(?P<head>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/(?P<under>\d+)|(?P<power>[eE][+-]?\d{1,2})(?!\w))?"
    r"(?P<scale>[\s*_-]{0,4}(?i:dozen|hundred|thousand|million|billion|trillion)s?\b)?"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_DRESS = re.compile(r"\\[,!; ]|\\?[$%]|[£€₹¥]")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED = re.compile(r"(?<=\d)(?=\\[dt]?frac)")
_MINUS = re.compile(r"((?:^|=)[\s*(\\]{0,6})(?:-|(?i:minus|negative)\b)\s?(?=[.\d])")  # in "10 minus 5" it is no sign
_UNIT = re.compile(r"[\s.]*(?:[^\W\d][^\d]*)?")
_ANOTHER = re.compile(r"[\s*]*(?:[A-Za-z]+\.?\s+)?(?:,?\s*\b(?:or|and|to)\b|[-,;/~])[\s*]*(?:maybe |perhaps )?")
_NEAR = 40  # characters: what stands farther off is no rival
_DIGITS = 60  # a longer run of digits is noise, and costs quadratic time to read as a number


def _undressed(text: str) -> str:
    """Without currency, percent signs and LaTeX dress: $1{,}234$ -> 1,234, 2\\frac{3}{4} -> 2 3/4 and negative 5 -> -5."""
    text = _TEXT.sub(r" \1 ", text.replace("{,}", ","))
    return _MINUS.sub(r"\1-", _DRESS.sub("", _FRACTION.sub(r"\1/\2", _MIXED.sub(" ", text))))


def _fraction(found: re.Match[str]) -> Fraction | None:
    """None for what cannot be read: noise, 1/0, and "5 million", which is neither 5 nor all in digits."""
    under, mixed, head = found["under"], found["mixed"], found["head"].replace(",", "")
    if max(len(part) for part in (head, under or "", mixed or "")) > _DIGITS or (under is not None and int(under) == 0) or found["scale"]:
        return None
    value = Fraction(head + (found["power"] or "")) / int(under or 1) + int(mixed or 0)
    return -value if found[0].startswith("-") else value


def _written(value: Fraction | None) -> str | None:
    """27, 0.5 or 1/3: one spelling for each number."""
    if value is None or value.denominator == 1:
        return None if value is None else str(value.numerator)
    places = next((n for n in range(_DIGITS) if (value * 10**n).denominator == 1), None)
    if places is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value * 10**places)).zfill(places + 1)
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _stated_number(statement: str) -> str | None:
    """The first number after the last "=", unless another candidate stands right beside it."""
    text = _undressed(statement.rsplit("=", 1)[-1])
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    value = _fraction(numbers[0])
    for before, after in pairwise(numbers):
        if after.start() - before.end() > _NEAR or not _ANOTHER.fullmatch(text, before.end(), after.start()):
            break
        if _fraction(after) != value:
            return UNCLEAR
    return _written(value) or UNCLEAR


def _last_number(text: str) -> str | None:
    numbers = list(_NUMBER.finditer(_undressed(text)))
    return _written(_fraction(numbers[-1])) if numbers else None


def _gold_number(text: str) -> str | None:
    """The number that `text` consists of, with nothing but a unit after it."""
    text = _undressed(_plain(text)).strip()
    found = _NUMBER.match(text)
    return _written(_fraction(found)) if found and _UNIT.fullmatch(text, found.end()) else None


# ------------------------------------------------------------------------ options

_LEADING = re.compile(r"^(?:option |choice )?[(\[]?(?P<letter>[A-Za-z])(?:[)\].:]+(?:\s+(?P<rest>.*))?|\s*)$", re.IGNORECASE)
_LABEL = re.compile(r"[\s\d.*_#-]*(?:[Oo]ption |[Cc]hoice )?\(?(?P<letter>[A-Z])[).:\]]")
_BULLET = re.compile(r"\s*[-*\u2022]\s")
_LETTER = re.compile(r"(?<![A-Za-z'])(?:\(([A-Za-z])\)|([A-Z])(?![A-Za-z'-]))")
_ARTICLE = re.compile(r"A (?!because\b|since\b|as\b|for\b|and\b|or\b|is\b)[a-z]")
_DENIED = re.compile(r"\b(?:not|isn't)\s+(?:option )?\(?[A-Z]\b")


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _bare(line: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", line).strip(" *_$`\"'.")


def _options(choices: Sequence[str]) -> dict[str, str]:
    """Letter -> the words of its option; all letters, without words, where no options are given."""
    return {letter: _words(text) for letter, text in zip(string.ascii_uppercase, choices or [""] * 26, strict=False)}


def _is(line: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that `line` consists of: "C", "(C)", "C) its text" or its text."""
    bare, options = _bare(line), _options(choices)
    exact = [letter for letter, text in options.items() if text and text == _words(bare)]
    if len(exact) == 1:
        return exact[0]
    leading = _LEADING.match(bare)
    letter = leading["letter"].upper() if leading else ""
    if leading and letter in options and (not leading["rest"] or _words(leading["rest"]) == options[letter]):
        return letter
    return None


def _named(line: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option that `line` names, by letter or by text; the letter wins over the text."""
    if whole := _is(line, choices):
        return whole
    bare, options = _bare(line), _options(choices)
    if _DENIED.search(bare):
        return UNCLEAR
    articles = {found.start() for found in _ARTICLE.finditer(bare)}
    letters = {(found[1] or found[2]).upper() for found in _LETTER.finditer(bare) if found.start() not in articles}
    if named := letters & set(options):
        return named.pop() if len(named) == 1 else UNCLEAR
    by_text = _by_text(_words(bare), options)
    return UNCLEAR if by_text is None and letters - {"I"} else by_text  # "F" of five options is an answer, and no option


def _unstated_choice(text: str, choices: Sequence[str]) -> str | None:
    """The option that the last line names, else the one that the first line is; but going through the options chooses none of them."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not (_lists(lines[-2:], choices) or _walks(lines)) and (named := _named(text.rpartition("\n")[2], choices)):
        return named
    return None if _lists(lines[:2], choices) else _is(text.partition("\n")[0], choices)


def _lists(lines: Sequence[str], choices: Sequence[str]) -> bool:
    """Whether these two lines are two different options."""
    options = {_is(line, choices) for line in lines}
    return len(options) == 2 and None not in options


def _walks(lines: Sequence[str]) -> bool:
    """Whether the lines end under the label of one option ("C) no, ...") and the label before was that of the one before ("B) no, ...")."""
    found = [(_LABEL.match(line), line) for line in lines]
    labels = [label["letter"] if label else "" for label, line in found if label or not _BULLET.match(line)]
    earlier = [label for label in labels[:-1] if label]
    return bool(earlier and labels[-1]) and ord(labels[-1]) == ord(earlier[-1]) + 1


def _by_text(words: str, options: dict[str, str]) -> str | None:
    """The one option whose words stand in `words`; "bank account" is not also "bank"."""
    found = {letter: text for letter, text in options.items() if text and f" {text} " in f" {words} "}
    longest = [
        letter for letter, text in found.items() if not any(text != other and f" {text} " in f" {other} " for other in found.values())
    ]
    if not longest:
        return None
    return longest[0] if len(longest) == 1 else UNCLEAR


# ------------------------------------------------------------------------- yes / no

_YESNO = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}
_LEADS = re.compile(r"^\W*(yes|no|true|false)\b", re.IGNORECASE)
_ENDS = re.compile(r"(?<!not )\b(yes|no)\W*$", re.IGNORECASE)
_EITHER = re.compile(r"\b(?:yes|no|true|false)\b\W{0,3}(?:or\b|and\b|/)\W{0,3}(?:yes|no|true|false)\b", re.IGNORECASE)
_VERDICT = re.compile(  # a clause of its own: ", yes." or "the statement is false.", but not "there is no reason" or "this is not true"
    r"(?:^|[\n.!?:;,]|\bso\b|\btherefore\b)[\s*_#\"'(]{0,8}(?:th(?:e|is) (?:statement|claim) is )?"
    r"\b(yes|no|true|false)\b(?=[\s*_\"')]{0,8}(?:[.,!;:\n]|$))",
    re.IGNORECASE,
)


def _stated_yesno(statement: str) -> str | None:
    """What a statement begins with, else its last verdict, else what it ends on ("definitely yes")."""
    said = _TEXT.sub(r"\1", statement)
    leads, either, ends = _LEADS.match(said), _EITHER.search(said), _ENDS.search(said)
    if either and (not leads or either.start() <= leads.start(1)):
        return UNCLEAR
    if leads:
        return _YESNO[leads[1].lower()]
    return _last_yesno(said) or (_YESNO[ends[1].lower()] if ends else None)


def _last_yesno(text: str) -> str | None:
    verdicts = _VERDICT.findall(text)
    return _YESNO[verdicts[-1].lower()] if verdicts else None


# ---------------------------------------------------------------------- expressions

_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.{1,400}?)(?:\\\)|\Z)|\\\[(.{1,400}?)(?:\\\]|\Z)", re.DOTALL)
"""The last one may be cut off: what stood before it is not what the text ends on."""

_MARKDOWN = " \t\r\n*_`"
_REASON = re.compile(r"[\s,;(]{0,3}\b(?:since|because)\b", re.IGNORECASE)


def _expression(statement: str) -> str | None:
    """The expression that a statement gives: its only formula, else the statement without its reason, full stop and Markdown."""
    text = _REASON.split(statement, maxsplit=1)[0].strip(_MARKDOWN)
    formulas = _FORMULA.findall(text)
    if len(formulas) == 1:
        text = next(part for part in formulas[0] if part)
    text = text.strip(_MARKDOWN).removesuffix(".").strip(_MARKDOWN)
    prose = not re.search(r"[\d\\=^+]", text) and len(re.findall(r"[^\W\d]{3,}", text)) > 3  # "the total cost of the pens"
    return text if 0 < len(text) <= MATH_CHARACTERS and not prose else None


def _last_expression(text: str) -> str | None:
    formulas = _FORMULA.findall(text)
    last = text.rpartition("\n")[2]
    if formulas:
        return _expression(next(part for part in formulas[-1] if part).rsplit("=", 1)[-1])
    return _expression(last.rsplit("=", 1)[-1]) if "=" in last else _last_number(text)


# what math-verify does not pass over by itself
_MEASURE = re.compile(r"\\?%|\s*°|(?<=\d)\s?(?:[ckm]m|ft|in|feet|inches|meters|units)\s?\^\s?\{?[23]\}?$")
_SCALE = re.compile(r"\b(?:dozen|hundred|thousand|million|billion|trillion)", re.IGNORECASE)


def _tight(latex: str) -> str:
    return re.sub(r"\\left|\\right|\\[,!; ]|[\s$]", "", latex.replace("dfrac", "frac").replace("tfrac", "frac"))


def _same_expression(answer: str, gold: str) -> bool | None:
    """By spelling, else by math-verify in a process of its own; None when that ran out of time."""
    answer, gold = _MEASURE.sub("", answer), _MEASURE.sub("", gold)
    if _SCALE.findall(answer) != _SCALE.findall(gold):
        return False  # for math-verify every word is a unit
    if _tight(answer) == _tight(gold):
        return True
    return _math.equal(gold, answer, MATH_SECONDS)


class _MathProcess:
    """math-verify behind a pipe.

    Its own time limit is an alarm signal, which works in the main thread only and cannot interrupt a long integer power; a process can
    always be killed, and counts its own processor time. It is started by the first symbolic answer and serves until this process ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, gold: str, answer: str, seconds: float) -> bool | None:
        """Whether they are equal; None when that took more than `seconds`. Raises PassingError when the process does not start."""
        with self._lock:
            process = self._started()
            reply = self._ask(process, [gold, answer, seconds], seconds * WALL)
            if not reply:
                self._stop()
            return json.loads(reply) if reply else None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        for _ in range(2):  # the machine may have been too busy
            self._stop()
            command = [sys.executable, "-c", "from mind.grading import serve_math; serve_math()"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if self._ask(self._process, ["1", "1", START_SECONDS], START_SECONDS):  # the imports are not on the answer's time
                return self._process
        self._stop()
        todo = f"run `{sys.executable} -c 'import math_verify'`; if that works, the machine was too busy: try again later"
        raise PassingError(f"the process that compares symbolic answers did not start in {START_SECONDS:g} s, twice", do=todo)

    @staticmethod
    def _ask(process: subprocess.Popen[str], pair: list[str | float], seconds: float) -> str:
        """Its reply; empty when it died, or took longer than `seconds` by the clock and was killed."""
        assert process.stdin and process.stdout
        alarm = threading.Timer(seconds, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # it died while we wrote
            return ""
        finally:
            alarm.cancel()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_math = _MathProcess()
atexit.register(_math._stop)


def serve_math() -> None:
    """The other end of `_MathProcess`: JSON [gold, answer, seconds] a line in, true or false a line out; killed when out of seconds."""
    from math_verify import LatexExtractionConfig, parse, verify

    def read(expression: str) -> list[object]:
        return parse(f"${expression}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    def limit(seconds: float) -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its default action kills, inside C code too
            signal.setitimer(signal.ITIMER_PROF, seconds)

    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        limit(seconds)
        try:
            same = bool(verify(read(gold), read(answer), timeout_seconds=None))
        except Exception:  # sympy raises of every kind on what is no expression: not equal, then
            same = False
        limit(0)
        print(json.dumps(same), flush=True)


_EQUAL: dict[Kind, Callable[[str, str], bool | None]] = {
    "number": lambda answer, gold: answer == _gold_number(gold),
    "choice": lambda answer, gold: answer == gold.strip().upper(),
    "yesno": lambda answer, gold: answer == _YESNO.get(gold.strip().lower()),
    "math": _same_expression,
}
