"""What the student is asked, in training and in evaluation: one wording for each kind of answer.

Training and evaluation must use the same text, id for id; both call `student_ids` and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mind.records import Kind

INSTRUCTIONS: dict[Kind, str] = {
    "number": "Think step by step. End with the line: The answer is <number>.",
    "math": "Think step by step. End with the line: The answer is <expression>.",
    "choice": "Think step by step. End with the line: The answer is <letter>.",
    "yesno": "Think step by step. End with the line: The answer is <yes or no>.",
}

PLACEHOLDERS = tuple(re.findall(r"<[^>]+>", "".join(INSTRUCTIONS.values())))
"""What stands where the answer is to go; students say the instruction again."""


def student_prompt(question: str, kind: Kind = "number", choices: Sequence[str] = ()) -> str:
    """The user turn: how to end, then the problem. What all prompts share comes first: it is computed once."""
    return f"{INSTRUCTIONS[kind]}\n{problem(question, choices)}"


def problem(question: str, choices: Sequence[str] = ()) -> str:
    """The question with its lettered options."""
    options = [f"{chr(ord('A') + i)}) {text}" for i, text in enumerate(choices)]
    return "\n".join([question, *options])


def student_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids up to where the student's answer begins, through the model's own chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(f"Question: {prompt}\nAnswer:\n")["input_ids"])  # a space would be a token that no answer begins behind
