"""A reply -> its verdict: kept, or dropped with the reason. Called by teacher.interview.

The deterministic judge reads the reply as it really is (thinking blocks, truncation, refusals, other answer formats) and compares the
final answer exactly (grading). Reasons begin with one of REASONS, so that they can be counted; what follows the colon is for people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mind.grading import grade, split_answer_line
from mind.records import Question
from mind.teacher.language import foreign
from mind.teacher.replies import DECLINED, Reply

REASONS = ("unanswered", "declined", "refused", "truncated", "empty", "language", "no answer", "wrong", "judge", "duplicate")
"""In the order in which they are looked for: a view has the first that applies."""

SHINGLE = 3  # words


@dataclass(frozen=True)
class Verdict:
    """`text`: the reasoning without thinking blocks and answer line. `reason` is empty when accepted."""

    accepted: bool
    text: str
    answer: str | None
    reason: str = ""


def verdict(question: Question, reply: Reply) -> Verdict:
    """The deterministic judge."""
    text = reply.visible()
    body, _ = split_answer_line(text)
    body = without_closing(body)
    grading = grade(text, question.answer, question.kind, question.choices)
    reason = _fault(question, reply, body, grading.answer) or (
        "" if grading.correct else _wrong(grading.answer, question.answer, grading.reason)
    )
    return Verdict(not reason, body, grading.answer, reason)


def without_closing(text: str) -> str:
    """`text` without a last line that only states the answer in another form: '**Answer:** 12', '#### 12', '\\boxed{12}'."""
    head, _, line = text.rpartition("\n")
    return head.rstrip() if _CLOSING.fullmatch(line.strip()) else text.rstrip()


_CLOSING = re.compile(
    r"[\W_]*(?:####.*|\$*\\boxed\{.*\}[\W_]*|(?:(?:so|thus|therefore|hence)\W+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\W*(?:\s|is\b|:|=).{0,200})",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\W*(?:i\W?m\s+(?:very\s+)?sorry|sorry\b|i\s+(?:cannot|can\W?t|am\s+unable|am\s+not\s+able|won\W?t)\b|as\s+an\s+ai\b)", re.I
)


def _fault(question: Question, reply: Reply, body: str, answer: str | None) -> str:
    """What is wrong with the reply before its answer is compared; empty when nothing is."""
    if reply.finish == DECLINED:
        return f"declined: {reply.refusal}"
    if reply.refusal or reply.finish == "content_filter":
        return f"refused: {reply.refusal[:200] or 'content filter'}"
    if reply.truncated:
        return f"truncated: after {reply.completion_tokens} tokens"
    if not body:
        return "empty: thinking, but no reasoning in the reply" if reply.text.strip() and answer is None else "empty: no reasoning"
    if answer is None and _REFUSAL.match(body):
        return f"refused: {body[:200]}"
    language = foreign("\n".join([question.question, *question.choices]), body)
    return f"language: {language}" if language else ""


def _wrong(answer: str | None, gold: str, reason: str) -> str:
    return (
        "no answer: nothing that could be graded"
        if answer is None
        else f"wrong: {answer} in place of {gold}" + (f" ({reason})" if reason not in ("", "wrong answer") else "")
    )


def duplicates(texts: Mapping[str, str], threshold: float) -> dict[str, str]:
    """Views that repeat an earlier one: later view -> the earlier. Compared are sets of word triples (Jaccard index above `threshold`)."""
    kept: dict[str, frozenset[tuple[str, ...]]] = {}
    found: dict[str, str] = {}
    for name, text in texts.items():
        own = shingles(text)
        twin = next((other for other, theirs in kept.items() if similarity(own, theirs) > threshold), None)
        if twin:
            found[name] = twin
        else:
            kept[name] = own
    return found


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def similarity(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    """Jaccard index, in [0, 1]."""
    return len(a & b) / len(a | b)
