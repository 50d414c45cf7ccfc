"""The starter corpus as a teacher: chat messages -> the recorded rationale. Answers for teacher.server; no HTTP in here.

The question is found in the messages by its text, the perspective in the system message by its name, so any client's wording works.
The corpus holds rationales without an answer line; the reply has one, as a teacher's would.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from mind.errors import TeacherError
from mind.records import ANSWER_LINE, Question
from mind.teacher import llm_judge, mistakes
from mind.teacher.perspectives import PROMPTS, perspective_of
from mind.teacher.wire import ApiError

MODEL = "recorded"
FILES = ("primer-train.jsonl", "train.jsonl")
DEFAULT_PERSPECTIVE = "decomposition"
"""What a client gets that asks for no perspective: the plainest of the eight."""


@dataclass(frozen=True)
class Behaviour:
    """How the teacher behaves. Rates are shares of the calls in [0, 1], drawn from `seed`."""

    latency: float = 0.0  # seconds before every answer
    slow_rate: float = 0.0  # calls that take `slow` seconds on top
    slow: float = 5.0
    fail_rate: float = 0.0  # calls that end in status 500
    wrong_rate: float = 0.0  # views answered with the recorded mistake
    max_in_flight: int | None = None  # 429 above it
    retry_after: float = 0.05  # seconds that a 429 asks to wait
    batch_seconds: float = 0.0  # how long a batch takes
    api_key: str | None = None  # 401 for any other
    unknown: str | None = None  # the reply to messages without a recorded question; None = 404
    seed: int = 0


class UnknownQuestion(Exception):
    """No recorded question stands in the messages."""


@dataclass(frozen=True)
class Entry:
    """One question with its eight rationales and its recorded mistake."""

    id: str
    question: str
    answer: str
    rationales: Mapping[str, str]
    mistake: str
    mistaken_answer: str
    mistaken_view: str  # the perspective that the mistake is a copy of

    def reply(self, perspective: str, wrong: bool) -> str:
        text, answer = (self.mistake, self.mistaken_answer) if wrong else (self.rationales[perspective], self.answer)
        return f"{text}\n{ANSWER_LINE.format(answer=answer)}"


class Corpus:
    """All recorded questions, found by their text."""

    def __init__(self, entries: Sequence[Entry], digest: str) -> None:
        self.entries = tuple(entries)
        self.digest = digest
        self._by_text = {_squeeze(entry.question): entry for entry in entries}

    def find(self, messages: Sequence[Mapping[str, Any]]) -> Entry:
        """The recorded question in the last user message that holds one.

        Raises:
            UnknownQuestion: none does.
        """
        for message in reversed(messages):
            text = _squeeze(text_of(message.get("content")))
            found = self._by_text.get(text) or next((entry for known, entry in self._by_text.items() if known in text), None)
            if found and message.get("role") != "assistant":
                return found
        raise UnknownQuestion


def complete(body: Any, behaviour: Behaviour) -> dict[str, Any]:
    """One chat completion request -> one ChatCompletion as JSON.

    Raises:
        ApiError: 400 for a malformed request, 404 for an unknown model or question.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ApiError(400, "'messages' must be a list of at least one message")
    if body.get("model") != MODEL:
        raise ApiError(404, f"no model {body.get('model')!r} here; this server has '{MODEL}'", code="model_not_found")
    messages = [m for m in body["messages"] if isinstance(m, dict)]
    try:
        text = _text(messages, body, behaviour)
    except UnknownQuestion:
        text = _unknown(behaviour)
    room = body.get("max_completion_tokens") or body.get("max_tokens") or math.inf
    cut = text if count_tokens(text) <= room else first_tokens(text, int(room))
    prompt_tokens = sum(count_tokens(text_of(m.get("content"))) for m in messages)
    count = body["n"] if isinstance(body.get("n"), int) else 1
    return {
        "id": f"chatcmpl-{int(share(json.dumps(body, sort_keys=True)) * 16**12):012x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [_choice(i, cut, "stop" if cut == text else "length") for i in range(count)],
        "usage": _usage(prompt_tokens, count * count_tokens(cut)),
    }


def _text(messages: list[dict[str, Any]], body: Mapping[str, Any], behaviour: Behaviour) -> str:
    if any(m.get("content") == llm_judge.SYSTEM for m in messages):
        return _judgement(messages)
    if mistakes.asked_for(messages):
        entry = starter_corpus().find(messages)
        return f"{entry.mistaken_view}\n{entry.reply(entry.mistaken_view, wrong=True)}"
    return _view(messages, body, behaviour)


def _judgement(messages: list[dict[str, Any]]) -> str:
    """As the LLM judge: full marks for a recorded rationale of the perspective that was asked for."""
    rationales = starter_corpus().find(messages).rationales
    text = "\n".join(text_of(m.get("content")) for m in messages if m.get("role") == "user")
    wanted = next((p for p, prompt in PROMPTS.items() if prompt in text), DEFAULT_PERSPECTIVE)
    found = next((p for p, rationale in rationales.items() if rationale in text), None)
    why = "a recorded rationale" if found else "not a recorded rationale"
    return json.dumps({"why": why, "steps": 5 if found else 1, "fidelity": 5 if found == wanted else 1})


def _view(messages: list[dict[str, Any]], body: Mapping[str, Any], behaviour: Behaviour) -> str:
    entry = starter_corpus().find(messages)
    perspective = asked_perspective(messages)
    wrong = share("wrong", behaviour.seed, entry.id, perspective, body.get("seed")) < behaviour.wrong_rate
    return entry.reply(perspective, wrong)


def _unknown(behaviour: Behaviour) -> str:
    if behaviour.unknown is not None:
        return behaviour.unknown
    raise ApiError(
        404,
        "the embedded teacher has recorded replies for the questions of the starter corpus only, "
        "and found none of them in the messages; ask a real endpoint (teacher.base_url) about your own questions",
        code="unknown_question",
    )


def _choice(index: int, text: str, finish: str) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None, "finish_reason": finish}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of typed parts."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def asked_perspective(messages: Sequence[Mapping[str, Any]]) -> str:
    """The perspective that the system message names, or the default one."""
    system = "\n".join(text_of(m.get("content")) for m in messages if m.get("role") in ("system", "developer"))
    return perspective_of(system) or DEFAULT_PERSPECTIVE


def count_tokens(text: str) -> int:
    """Words and signs: an honest size for usage counts, not a model's tokens."""
    return len(_TOKEN.findall(text))


def first_tokens(text: str, limit: int) -> str:
    """`text` up to its token number `limit`."""
    for number, token in enumerate(_TOKEN.finditer(text), 1):
        if number == limit:
            return text[: token.end()]
    return text


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` only: the seeded dice of this server, the same in every process."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def starter_corpus() -> Corpus:
    """The corpus that ships in the package, with the digest of its files."""
    contents = [files("mind.starter").joinpath(name).read_bytes() for name in FILES]
    rows = [json.loads(line) for content in contents for line in content.splitlines()]
    return Corpus([_entry(row) for row in rows], hashlib.sha256(b"".join(contents)).hexdigest())


def _entry(row: Mapping[str, Any]) -> Entry:
    mistake = row["mistake"]
    own = mistake["rationale"], str(mistake["answer"]), mistake["of"]
    return Entry(row["id"], row["question"], str(row["answer"]), row["rationales"], *own)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


_TOKEN = re.compile(r"\w+|[^\w\s]")


def refuse_unknown(questions: Iterable[Question]) -> None:
    """Raises TeacherError for the first question that the embedded teacher has no replies to."""
    for question in questions:
        try:
            starter_corpus().find([{"role": "user", "content": question.question}])
        except UnknownQuestion:
            raise TeacherError(
                f"the embedded teacher does not know question '{question.id}'",
                wanted="questions of the starter corpus: it has recorded replies for no others",
                do="set teacher.base_url and teacher.model to an endpoint that answers any question",
            ) from None
