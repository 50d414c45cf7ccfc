"""The grader: what it accepts, what it refuses on purpose, and that no text breaks it or keeps it busy."""

from __future__ import annotations

import os
import random
import signal
import string
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind import grading
from mind.errors import PassingError
from mind.grading import NO_ANSWER, TOO_SLOW, WRONG, Grade, check_gold, extract, grade, split_answer_line
from mind.records import ANSWER_LINE, Kind

OPTIONS = ("annoy", "eat meat", "open doors", "a bank", "a bank account")

# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("3 + 4 = 7.\nThe answer is 7.", "7"),
        ("The answer is 27.0", "27"),
        ("The answer is 27", "27.0"),
        ("the answer is: 1,234.", "1234"),
        ("The answer is $1,234.50.", "1234.5"),
        ("The answer is 1234", "$1,234"),
        ("The answer is -5 degrees.", "-5"),
        ("The answer is \u22125.", "-5"),
        ("The answer is -$3.", "-3"),
        ("The answer is 12 apples (3 more than 9).", "12"),
        ("The answer is 3 + 4 = 7.", "7"),
        ("The answer is 50%.", "50"),
        ("The answer is 50\\%.", "50"),
        ("The answer is 1/2.", "0.5"),
        ("The answer is 1 1/2 hours.", "1.5"),
        ("so \\boxed{\\frac{3}{4}}", "3/4"),
        ("The answer is $\\boxed{1{,}200}$.", "1200"),
        ("work\n#### 18", "18"),
        ("**Answer:** 12", "12"),
        ("The answer is:\n\n12 cm", "12"),
        ("The answer is 12. No: the answer is 13.", "13"),
        ("\\boxed{12}, but then the answer is 13.", "13"),
        ("He had 3 and then 7", "7"),
        ("The answer is not 5. It is 6.", "6"),
        ("The answer is .5", "0.5"),
        ("The answer is 2e3.", "2000"),
        ("The answer is 12.\n\nThe answer is <number>.", "12"),  # the instruction said again states nothing
        ("3 + 4 = 7.\n\nSo the answer is", "7"),  # cut off
        ("3 + 4 = 7.\n\nSo the answer is \\(", "7"),
        ("Number of ducks = 300 / 50 = 6, which is \\(\\boxed{", "6"),
        ("#### Step 1: Eggs\n16 - 3 = 13\n\n#### Step 2: Money\n13 * 2 = 26 dollars.", "26"),  # headings
        ("#### 1. Eggs\n16 - 3 = 13\n\n#### 2. Money\n13 * 2 = 26 dollars.", "26"),
        ("work\n#### -$1,000", "-1000"),
        ("The answer is 42. So the answer is correct.", "42"),  # a statement without a number states none
        ("\\boxed{42}\n\nSo the answer is correct.", "42"),
        ("Answer: Let's solve it step by step.\n3 + 4 = 7 apples.\nSo he has 7.", "7"),
        ("The final answer is the total cost of the pens.\nTotal cost = 12 dollars", "12"),
        ("The answer to the problem is 12 (3 more than 9).", "12"),
        ("\\boxed{\\text{42}}", "42"),
        ("\\boxed{2\\frac{1}{2}}", "2.5"),
        ("\\boxed{-\\frac{1}{2}}", "-0.5"),
        ("The answer is - 5", "-5"),
        ("The answer is negative 5.", "-5"),
        ("The answer is minus $5.", "-5"),
        ("The answer is x = - 5.", "-5"),
        ("The answer is 10 minus 5.", "10"),
        ("The answer is:\n- 5 apples", "5"),  # a bullet
    ],
)
def test_numbers_that_are_right(text: str, gold: str) -> None:
    assert grade(text, gold).correct, extract(text)


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        ("The answer is a dozen.", "12", NO_ANSWER),  # on purpose: digits only
        ("The answer is 5 or 6.", "5", NO_ANSWER),
        ("The answer is 5 apples or 6 apples.", "5", NO_ANSWER),
        ("The answer is 5-6.", "5", NO_ANSWER),
        ("The answer is 3, 4, 5.", "3", NO_ANSWER),
        ("The answer is 1/0.", "1", NO_ANSWER),
        ("The answer is 5 million.", "5", NO_ANSWER),  # neither 5 nor all in digits
        ("The answer is $5\\text{ million}$.", "5", NO_ANSWER),
        ("He has **5** thousand", "5", NO_ANSWER),
        ("\\boxed{5\\text{ or }6}", "56", NO_ANSWER),
        ("The answer is 5. The answer is 5 or 6.", "5", NO_ANSWER),  # several are not passed over
        ("", "1", NO_ANSWER),
        ("I do not know.", "1", NO_ANSWER),
        ("The answer is 50%.", "0.5", WRONG),  # percent is a unit
        ("The answer is 0.333.", "1/3", WRONG),  # exact, not near
        ("The answer is 70.", "7", WRONG),
        ("5. The answer is 6.", "5", WRONG),
    ],
)
def test_numbers_that_are_not(text: str, gold: str, reason: str) -> None:
    result = grade(text, gold)
    assert (result.correct, result.reason) == (False, reason)


@given(st.fractions(max_denominator=40).filter(lambda f: abs(f) < 10**9))
def test_a_number_equals_itself_however_it_is_written(value: Fraction) -> None:
    spellings = [f"{value.numerator}/{value.denominator}"]
    if value.denominator in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40):
        spellings += [f"{float(value):.5f}", f"{float(value):,.5f}"]
    if value.denominator == 1:
        spellings += [str(value.numerator), f"{value.numerator:,}", f"{value.numerator}.0"]
    golds = [spelling for spelling in spellings if check_gold(spelling) is None]
    assert golds == spellings
    for spelling in spellings:
        for gold in golds:
            assert grade(ANSWER_LINE.format(answer=spelling), gold).correct


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12))
def test_different_numbers_differ(one: int, other: int) -> None:
    assert grade(ANSWER_LINE.format(answer=one), str(other)).correct == (one == other)


# ------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "text",
    [
        "The answer is C.",
        "The answer is c.",
        "The answer is (C).",
        "The answer is C) open doors.",
        "The answer is **C**.",
        "The answer is option C.",
        "The answer is C because cats push.",
        "The answer is open doors.",
        "The answer is to open doors.",
        "A cat would open doors",
        "C",
        "I choose (C)",
        "C) open doors\n\nStep 1: a cat reaches the handle.\nStep 2: and then",  # answers first, then is cut off
        "\\boxed{\\text{C}}",
        "Answer: C) annoy",  # the letter wins over the text
        "The correct answer is C) open doors. Doors open.\n\nThe answer is <letter>.",
        "A) annoy: no.\nB) eat meat: no.\nC) open doors: yes.\nD) a bank: no.\n\nC) open doors",
        "#### Conclusion\nThe best option is C) open doors",
        "Answer: Let's consider each option.\nA) annoy: no\nSo it is C) open doors.",
        "The answer is C. So the answer is correct.",
        "work\n#### C",
    ],
)
def test_options_that_are_right(text: str) -> None:
    assert grade(text, "C", "choice", OPTIONS).correct


@pytest.mark.parametrize(
    "text",
    [
        "The answer is A or C.",
        "The answer is C, not B.",
        "The answer is F.",
        "The answer is annoy or open doors.",
        "The answer is to sleep.",
        "Cats sleep.",
        "",
        "The answer is not C.",
        "A\nB\nC) open doors",  # the options said again, and none of them chosen
        "C\nD\nNow, a cat is a clever animal",
        "A) annoy: cats do.\n\nB) eat meat: cats do.\n\nC) open doors: cats rarely",  # cut off while it goes through the options
        "2. **Option B: eat meat**\n   - Cats do.\n\n3. **Option C:",
        "- **B) eat meat**\n- **C) open doors**\n  - A cat may open doors",
        "The answer is C.\nThe answer is A or B.",
        "The answer is C.\nThe answer is annoy or eat meat.",
        "The answer is C.\nThe answer is F.",
    ],
)
def test_several_options_or_none_are_wrong(text: str) -> None:
    assert grade(text, "C", "choice", OPTIONS) == Grade(False, None, NO_ANSWER)


def test_the_longer_option_is_not_also_the_shorter() -> None:
    assert extract("The answer is in a bank account.", "choice", OPTIONS) == "E"
    assert extract("The answer is at a bank.", "choice", OPTIONS) == "D"


def test_an_article_is_no_letter() -> None:
    assert extract("The answer is A bank account", "choice", OPTIONS) == "E"


@given(st.sampled_from("ABCDE"), st.sampled_from("ABCDE"))
def test_letter_and_text_of_an_option_agree(letter: str, gold: str) -> None:
    text = OPTIONS["ABCDE".index(letter)]
    for answer in (letter, f"({letter})", f"{letter})", f"{letter}) {text}", text):
        assert grade(ANSWER_LINE.format(answer=answer), gold, "choice", OPTIONS).correct == (letter == gold)


# ------------------------------------------------------------------------- yes / no


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is yes.", "yes"),
        ('The answer is "No"', "no"),
        ("The answer is <yes>.", "yes"),
        ('To see if the answer to the question "Is it?" is "yes," we think.', None),
        ("The answer is no, since there is no way.", "no"),
        ("Yes, a potato has no milk. The answer is no.", "no"),
        ("There is no reason to doubt it. So, yes.", "yes"),
        ("Yes, it can be done.", "yes"),
        ("**No**", "no"),
        ("The answer is true.", "yes"),
        ("\\boxed{\\text{Yes}}", "yes"),
        ("The answer is definitely yes.", "yes"),
        ("The answer is, in short, no: it is true that cats have fur.", "no"),
        ("The answer is no. Whether it is true or false does not matter.", "no"),
        ("Therefore, the answer to the question is yes.", "yes"),
        ('The answer to the question "Is chaff produced by hydropower? " is yes.', "yes"),
        ("The answer to \u201cIs chaff true?\u201d is **no**.", "no"),
        ("The statement is true.", "yes"),
        ("Therefore, the statement is false.", "no"),
        ("The answer is no. So the answer is correct.", "no"),
        ("work\n#### no", "no"),
        ("The answer is that this is not true.", None),
        ("The answer is there is no reason to doubt it.", None),
        ("The answer is that he would have no problem doing so.", None),
        ("The statement is not true.", None),
        ("If the statement is true, cats fly", None),
        ("The answer is yes. The answer is yes or no.", None),
        ("The answer is yes or no.", None),
        ("There is no way to say", None),
        ("No one can.", None),
        ("", None),
    ],
)
def test_yes_and_no(text: str, answer: str | None) -> None:
    assert extract(text, "yesno") == answer
    assert grade(text, "Yes", "yesno").correct == (answer == "yes")


# ---------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is $\\frac12$.", "\\frac{1}{2}"),
        ("The answer is 0.5.", "\\frac{1}{2}"),
        ("so \\boxed{x=5}", "5"),
        ("The answer is $x^2+2x+1$", "(x+1)^2"),
        ("thus $a = 3$", "3"),
        ("The answer is (3, \\pi/2).", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("The answer is Evelyn.", "\\text{Evelyn}"),
        ("The answer is **5**.", "5"),
        ("The answer is `5`.", "5"),
        ("The answer is 15 (since 3*5=15).", "15"),
        ("The answer is $15$, because $3*5=15$.", "15"),
        ("The answer is 5 cm^2.", "5"),
        ("The answer is 90\u00b0.", "90"),
        ("The answer is 90\u00b0.", "90^\\circ"),
        ("\\boxed{10\\%}", "10"),
        ("\\boxed{10}", "10\\%"),
        ("#### Step 2: Simplify\nWe get $x = 4$.", "4"),
        ("work\n#### \\frac{1}{2}", "0.5"),
        ("\\boxed{42}\n\nSo the answer is correct.", "42"),
        ("Answer: Let's solve it step by step.\nSo $x = 4$.", "4"),
        ("\\boxed{\\{1,2,3\\}}", "\\{3,2,1\\}"),
    ],
)
def test_expressions_that_are_right(text: str, gold: str) -> None:
    assert grade(text, gold, "math").correct


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("The answer is 2/3.", "\\frac12"),
        ("Hm.", "1"),
        ("The answer is \\frac{1", "1"),
        ("The answer is $5\\text{ million}$.", "5"),
        ("The answer is 10\\%.", "0.1"),
        ("\\[ x = \\frac15 + \\frac23 \\]\nand \\[ \\frac15 = \\frac{3}{15}", "\\frac{13}{15}"),  # cut off long before its result
    ],
)
def test_expressions_that_are_wrong(text: str, gold: str) -> None:
    assert not grade(text, gold, "math").correct


def test_a_comparison_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grade("\\boxed{1+1}", "2", "math").correct  # the process is up: its start is not on the answer's time
    monkeypatch.setattr(grading, "MATH_SECONDS", 0.5)
    started = time.monotonic()
    result = grade("The answer is $9^{9^{9^{9}}}$.", "3", "math")
    assert result.reason == TOO_SLOW
    assert time.monotonic() - started < 10  # half a second of processor time, six by the clock
    monkeypatch.undo()
    assert grade("\\boxed{1+1}", "2", "math").correct  # and a new process serves the next answer


@pytest.mark.skipif(os.name == "nt", reason="no SIGSTOP")
def test_a_busy_machine_takes_no_time_from_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grade("\\boxed{1+1}", "2", "math").correct
    assert grading._math._process
    process = grading._math._process.pid
    monkeypatch.setattr(grading, "MATH_SECONDS", 0.5)
    os.kill(process, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (process, signal.SIGCONT)).start()
    assert grade("\\boxed{1+2}", "3", "math").correct


def test_a_start_that_fails_is_tried_again_and_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = grading._MathProcess._ask
    failing = [True]
    one = grading._MathProcess()
    monkeypatch.setattr(one, "_ask", lambda *args: "" if failing and failing.pop() else ask(*args))
    try:
        assert one.equal("2", "1+1", 5.0)
        one._stop()
        monkeypatch.setattr(one, "_ask", lambda *args: "")
        with pytest.raises(PassingError, match="did not start"):
            one.equal("2", "1+1", 5.0)
    finally:
        one._stop()


def test_expressions_are_compared_outside_the_main_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(grade("\\boxed{2+2}", "4", "math").correct))
    thread.start()
    thread.join()
    assert results == [True]


# ------------------------------------------------------------------- gold, answer line


@pytest.mark.parametrize(
    ("answer", "kind", "choices"),
    [
        ("many", "number", ()),
        ("5 or 6", "number", ()),
        ("room 5", "number", ()),
        ("5 million", "number", ()),
        ("", "number", ()),
        ("maybe", "yesno", ()),
        ("F", "choice", OPTIONS),
        ("c", "choice", OPTIONS),
        ("AB", "choice", OPTIONS),
        ("A", "choice", ("only one",)),
        ("", "math", ()),
        ("\\frac{1}{2", "math", ()),
    ],
)
def test_gold_answers_that_nothing_could_equal_are_refused(answer: str, kind: Kind, choices: tuple[str, ...]) -> None:
    assert check_gold(answer, kind, choices)


@pytest.mark.parametrize(
    ("answer", "kind", "choices"),
    [("1,200", "number", ()), ("5 cm", "number", ()), ("No", "yesno", ()), ("E", "choice", OPTIONS), ("x^2", "math", ())],
)
def test_gold_answers_that_can_be_graded(answer: str, kind: Kind, choices: tuple[str, ...]) -> None:
    assert check_gold(answer, kind, choices) is None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("So h = 8.\nThe answer is 8.", ("So h = 8.", "8")),
        ("So h = 8. The answer is 8.", ("So h = 8.", "8")),
        ("x\n\n**The answer is 1.5.**", ("x", "1.5")),
        ("x\nthe final answer is: (C)", ("x", "(C)")),
        ("The answer is 8.", ("", "8")),
        ("The answer is 8.\nI hope that helps.", ("The answer is 8.\nI hope that helps.", None)),
        ("We see that the answer is 8.", ("We see that the answer is 8.", None)),  # cutting it would leave half a sentence
        ("no more", ("no more", None)),
        ("", ("", None)),
    ],
)
def test_the_answer_line_is_split_off(text: str, parts: tuple[str, str | None]) -> None:
    assert split_answer_line(text) == parts


@given(st.text(string.ascii_lowercase + " .,\n", max_size=80), st.integers(0, 10**6))
def test_what_was_joined_is_split_again(body: str, answer: int) -> None:
    text = f"{body.strip()}\n{ANSWER_LINE.format(answer=answer)}"
    assert split_answer_line(text) == (body.strip(), str(answer))


# ------------------------------------------------------------------------------ fuzz

PIECES = [
    "The answer is ",
    "answer",
    "####",
    "\\boxed{",
    "}",
    "{",
    "$",
    "\\frac",
    "1",
    "12,345",
    "/",
    ".",
    "-",
    "=",
    "\n",
    " ",
    "yes",
    "no",
    "(A)",
    "B)",
    "or",
    "*",
    "\\(",
]
noise = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


@given(noise, noise)
@settings(max_examples=300)
def test_no_text_breaks_the_grader(text: str, gold: str) -> None:
    kind: Kind
    for kind in ("number", "choice", "yesno"):
        result = grade(text, gold, kind, OPTIONS if kind == "choice" else ())
        assert result.correct == (result.reason == "")
        check_gold(gold, kind, OPTIONS)
    extract(text, "math")
    body, _ = split_answer_line(text)
    assert text.strip().startswith(body)


@given(noise, st.sampled_from(["1", "\\frac{1}{2}", "x^2", "(1, 2)"]))
@settings(max_examples=60, deadline=None)
def test_no_expression_breaks_the_grader(text: str, gold: str) -> None:
    grade(text, gold, "math")


SLOW = [
    "answer to ",
    'answer to "',
    "answer to a ",
    "the answer is it.\n",
    "answer is *",
    "since ",
    "- ",
    "= - ",
    "5 million ",
    "yes or ",
    "\\text{",
]


@pytest.mark.parametrize("piece", [*PIECES, "1,234", "1 ", "\\(", "the answer is 1 ", "1.5,", "**", "yes ", ". yes ", "a bank ", *SLOW])
def test_a_very_long_text_is_read_at_once(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    kind: Kind
    started = time.monotonic()
    for kind in ("number", "choice", "yesno"):
        grade(text, "1", kind, OPTIONS)
    extract(text, "math")
    split_answer_line(text)
    assert time.monotonic() - started < 2


def test_a_long_random_text_is_read_at_once() -> None:
    random.seed(5)
    text = "".join(random.choice(PIECES) for _ in range(50_000))
    started = time.monotonic()
    for kind in ("number", "choice", "yesno", "math"):
        extract(text, kind, OPTIONS)  # type: ignore[arg-type]
    assert time.monotonic() - started < 2
