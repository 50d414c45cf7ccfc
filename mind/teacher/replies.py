"""Request -> key, and bytes of a chat completion -> Reply. What teacher.client sends and teacher.cache keeps.

A reply is read from the raw JSON and not from the client library's objects, because those are built without validation: an endpoint
that sends `choices: null` or a number as content must end in a clear "malformed", never in an AttributeError somewhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mind.outputs import digest_json

LONGEST_REPLY = 2_000_000
"""Characters. No teacher thinks that long; what is longer is an endpoint gone wrong and is not kept."""

DECLINED = "declined"
"""finish_reason of a request that the endpoint would not take (content policy, context length): the answer to that one view."""


class MalformedReply(Exception):
    """Status 200, but no chat completion in it. Worth another try."""


@dataclass(frozen=True)
class Request:
    """One call: the JSON body as it leaves the machine, and which sample of it this is."""

    body: Mapping[str, Any]
    sample: int = 0

    def key(self, endpoint: str) -> str:
        """sha256 (hex) over everything that leaves the machine: endpoint, model, messages, every parameter, sample index."""
        return digest_json([endpoint, self.sample, self.body])

    def prompt_bytes(self) -> int:
        return sum(len(m["content"].encode()) for m in self.body["messages"])

    def room(self) -> int:
        """Most tokens that the reply may have."""
        return int(self.body.get("max_completion_tokens") or self.body["max_tokens"])


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back and was paid for. `reasoning` is the hidden thinking of a reasoning model, where the endpoint shows it."""

    text: str
    finish: str = "stop"
    reasoning: str = ""
    refusal: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def dump(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def load(cls, stored: str) -> Reply:
        """Raises ValueError or TypeError for what `dump` did not write."""
        return cls(**json.loads(stored))

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    def visible(self) -> str:
        """The text without `<think>` blocks, closed or not."""
        return _THINKING.sub("", self.text).strip()


_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.DOTALL | re.IGNORECASE)


def read_completion(content: bytes, prompt_bytes: int) -> Reply:
    """The body of a chat completion -> Reply. Missing usage counts are estimated at four bytes a token.

    Raises:
        MalformedReply: not JSON, an error in place of a completion, no choice, or a text beyond LONGEST_REPLY.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise MalformedReply(f"the body is not JSON: {content[:80]!r}") from None
    choice = _first_choice(body)
    message = choice["message"]
    text, reasoning = _text(message.get("content")), _text(message.get("reasoning_content") or message.get("reasoning"))
    if len(text) + len(reasoning) > LONGEST_REPLY:
        raise MalformedReply(f"a reply of {len(text) + len(reasoning):,} characters")
    found = body.get("usage")
    usage: Mapping[str, Any] = found if isinstance(found, dict) else {}
    return Reply(
        text=text,
        finish=str(choice.get("finish_reason") or "stop"),
        reasoning=reasoning,
        refusal=_text(message.get("refusal")),
        model=str(body.get("model") or ""),
        prompt_tokens=_count(usage.get("prompt_tokens"), prompt_bytes),
        completion_tokens=_count(usage.get("completion_tokens"), len((text + reasoning).encode())),
    )


def _first_choice(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise MalformedReply(f"JSON, but {type(body).__name__} in place of a completion")
    if body.get("error"):
        raise MalformedReply(f"an error with status 200: {json.dumps(body['error'])[:200]}")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise MalformedReply("a completion without a choice that holds a message")
    return choice


def _text(content: Any) -> str:
    """A string, or a list of typed parts; anything else is no text."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _count(found: Any, size: int) -> int:
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else -(-size // 4)
