"""One perspective only: eight such students are the experts of `mode` and of the latent analysis (method, sections 5 and 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nsmallest

from mind import config
from mind.errors import DataError
from mind.methods.base import Method, Stage
from mind.outputs import digest_bytes
from mind.records import PERSPECTIVES, Example, Subset


def held_out(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` questions for `mode` to weigh its experts on: those with the most views, drawn by seed and id alone."""
    if not count:
        return []
    return nsmallest(count, examples, key=lambda e: (-len(e.views), digest_bytes(str(seed).encode(), b"held out", e.id.encode())))


def demand_mistakes(examples: Sequence[Example]) -> None:
    """Refuse a dataset without a mistake; reads no further than to the first.

    Raises:
        DataError: nothing in it tells `edit`, or the first stage that `edit` shares, which views were copied.
    """
    if len(examples) and not any(example.mistake for example in examples):
        raise DataError(
            f"none of {len(examples)} questions has a mistaken rationale, which `edit` learns from",
            wanted="a dataset made with synthesis.mistakes: true",
            do="set it and run synthesize and snapshot again; rationales that are there are not bought twice",
        )


class Single(Method):
    caption = "One perspective: plain fine-tuning on one rationale a question."
    options: config.Single

    @classmethod
    def stages(cls, settings: config.Resolved) -> tuple[Stage, ...]:
        return (Stage("", settings, shared=True),)

    @classmethod
    def examples(cls, options: config.Single, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        if options.perspective == "copied":
            demand_mistakes(examples)  # here, since it is EDIT's first stage: it would be trained for nothing
        if 0 < len(examples) <= options.hold_out:
            raise DataError(
                f"all of {len(examples)} questions are held out for `mode` to weigh its experts on ({options.hold_out} are wanted)",
                wanted="questions to train on",
                do="a larger dataset, or a smaller `support` of `mode` (`hold_out` of `single`)",
            )
        apart = {example.id for example in held_out(examples, options.hold_out, seed)}
        return Subset(examples, [place for place, example in enumerate(examples) if example.id not in apart]) if apart else examples

    def select(self, example: Example) -> Mapping[str, str]:
        name = self.options.perspective
        if name == "copied":
            # a question without a mistake has no copied view: the first that it has stands in, so that no question is lost
            name = example.mistake.perspective if example.mistake else min(example.views, key=PERSPECTIVES.index, default="")
        return {name: example.views[name]} if name in example.views else {}
