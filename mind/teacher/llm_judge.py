"""The LLM judge: a rationale with the right answer -> scores for its steps and for its perspective. Used by teacher.interview.

Only replies that the deterministic judge accepted are put to it, so it never decides about the final answer. Its prompt, model and
endpoint are its own; its replies are cached and paid like the teacher's.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mind.records import Question
from mind.teacher.perspectives import PROMPTS, Message, user_prompt
from mind.teacher.replies import Reply

SYSTEM = (
    "You judge a worked solution whose final answer is known to be right. Judge two things, each from 1 (bad) to 5 (good).\n"
    "steps: does every step follow and hold, from the problem to the answer? 5: all do. 4: one is loose, but true. "
    "3: a gap that matters. 2: a false step. 1: the answer does not come from the steps at all.\n"
    "fidelity: does the solution follow the instruction about the way of thinking that its author was given? "
    "5: throughout. 3: in parts. 1: not at all.\n"
    "Be strict: a false intermediate statement is at most 2 for steps, even when the answer is right. "
    "Reply with one JSON object and nothing else, with the reason first: "
    '{"why": "<one sentence>", "steps": <1-5>, "fidelity": <1-5>}'
)


@dataclass(frozen=True)
class Opinion:
    steps: int
    fidelity: int
    why: str


def messages(question: Question, perspective: str, rationale: str) -> list[Message]:
    """What the judge is sent."""
    user = "\n\n".join(
        [
            f"PROBLEM\n{user_prompt(question)}",
            f"INSTRUCTION TO THE AUTHOR\n{PROMPTS[perspective]}",
            f"SOLUTION\n{rationale}",
            f"FINAL ANSWER (right)\n{question.answer}",
        ]
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def read(reply: Reply) -> Opinion | None:
    """The last JSON object in the reply that holds both scores in range; None without one."""
    for text in reversed(_OBJECT.findall(reply.visible())):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        steps, fidelity = found.get("steps"), found.get("fidelity")
        if all(isinstance(score, int) and 1 <= score <= 5 for score in (steps, fidelity)):
            return Opinion(steps, fidelity, " ".join(str(found.get("why", "")).split())[:300])
    return None


_OBJECT = re.compile(r"\{[^{}]*\}")
