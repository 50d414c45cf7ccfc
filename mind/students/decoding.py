"""Prompts -> answers, greedy or sampled, in a batch that is kept full. Called by mind.answering with a student of students.loading.

A row leaves the batch as soon as it has written its answer line (or its end token), and the next prompts take its place. All
rows share one key-value store: each row fills its own columns from 0, so nothing is padded while decoding, and what all prompts
have in common (the chat template's opening) is computed once. Measured against `transformers.generate`: docs/evaluation.md.

A sampled token is found from one random number of its row's own stream, so that it depends on the row's seed and on nothing else.

Letters: N active rows, L new tokens of a row, T columns in use, H key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from mind.prompts import PLACEHOLDERS
from mind.students.loading import only_attends

REFILL = 0.75
"""New prompts are admitted when the batch has shrunk to this share: one big prefill is cheaper than many small ones."""

_ECHO = "|".join(map(re.escape, PLACEHOLDERS))

ANSWERED = re.compile(rf"\bThe answer is:?+[ \t]*+(?!{_ECHO}|not\b)(?=[^\n]*\w)[^\n]*(?<!:)\n")
"""An answer line that its newline has closed. With a capital: "so the answer is what we add up to" goes on. So does a line whose value
comes below it ("The answer is \\[", "... is found so:"), and the instruction said again ("The answer is <letter>")."""

STATED = re.compile(rf"\banswer is:?+[ \t]*+(?!{_ECHO})", re.IGNORECASE)
"""What stands before the tokens whose probability is an answer's confidence."""


@dataclass(frozen=True)
class Completion:
    """What the student wrote (without special tokens), and how many tokens it took (with them).

    `confidence`: the probability it gave to the last stated answer, all of its tokens together, at temperature 1; None without a statement.
    """

    text: str
    tokens: int
    confidence: float | None = None


def until_answered(text: str) -> str:
    """What `generate` would have written of this text: a server, or another engine, does not know where to stop."""
    found = ANSWERED.search(text)
    return text[: found.end()] if found else text


Finish = Callable[[int, list[int], list[float]], None]
"""Takes the index of a prompt, the tokens of its answer and their log probabilities."""

Step = Callable[[float], None]
"""Takes what the unfinished answers have used of their allowances, summed: 3 answers at half of theirs are 1.5."""


@dataclass
class _Row:
    index: int  # of its prompt
    last: int  # the token that is fed next
    column: int  # where that token goes
    written: list[int] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)  # log probability of each written token


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    on_done: Callable[[int, Completion], None] | None = None,
    on_step: Step = lambda under_way: None,
) -> list[Completion]:
    """Answer every prompt.

    Args:
        prompts: token ids, none empty.
        batch_tokens: most positions (prompt and answer) that are held at a time; bounds the memory.
        temperature: 0: the most likely token, always; above, tokens are drawn.
        seeds: one a prompt, where tokens are drawn: the same seed draws the same answer, whatever else is asked beside it.
        on_done: called with the prompt's index as soon as its answer is finished, in any order.
        on_step: called after each step. Answers that were begun together end together; until then nothing else tells how fast it goes.

    Returns:
        One completion a prompt, in the order of `prompts`; in float32 independent of `batch_tokens` up to ties of the logits.
    """
    assert temperature == 0 or len(seeds) == len(prompts), (temperature, len(seeds), len(prompts))
    done: dict[int, Completion] = {}
    ends = _Endings(model, tokenizer, max_new_tokens)
    pick = _Picker(temperature, seeds)

    def finish(index: int, tokens: list[int], logs: list[float]) -> None:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        done[index] = Completion(text, len(tokens), _confidence(tokenizer, text, tokens, logs))
        if on_done is not None:
            on_done(index, done[index])

    for group in _of_like_length(prompts, max_new_tokens):
        longest = len(prompts[group[0]]) + max_new_tokens
        capacity = max(1, min(len(group), batch_tokens // longest))
        decode = _decode if only_attends(model) and _attends_to_all(model.config, longest) else _decode_plainly
        decode(model, _Work({index: prompts[index] for index in group}, capacity, longest, ends, pick, finish, on_step))
    return [done[index] for index in range(len(prompts))]


def _of_like_length(prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Indices of the prompts, longest first, cut where one needs less than half the positions of its group's first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        if groups and 2 * (len(prompts[index]) + max_new_tokens) >= len(prompts[groups[-1][0]]) + max_new_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class _Picker:
    """The next token of each row, with its log probability."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self._streams = [Random(seed) for seed in seeds] if temperature else []

    def __call__(self, logits: Tensor, indices: Sequence[int]) -> tuple[list[int], list[float]]:
        """Logits (N, V) of the rows whose prompts are `indices` -> N tokens and N log probabilities."""
        tokens = self._drawn(logits, indices) if self.temperature else logits.argmax(-1)
        logs = logits.gather(-1, tokens[:, None])[:, 0].float() - logits.float().logsumexp(-1)
        return tokens.tolist(), logs.tolist()

    def _drawn(self, logits: Tensor, indices: Sequence[int]) -> Tensor:
        """The token at which the summed probabilities pass a uniform random number; in float64, so that neighbours hardly matter."""
        passed = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        numbers = torch.tensor([self._streams[index].random() for index in indices], dtype=torch.float64, device=logits.device)
        return torch.searchsorted(passed, (numbers * passed[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _confidence(tokenizer: Any, text: str, tokens: list[int], logs: list[float]) -> float | None:
    """Probability of the tokens between the last "answer is" and the end of its line, its full stop left out."""
    statements = list(STATED.finditer(text))
    if not statements:
        return None
    start = statements[-1].end()
    answer = text[start:].split("\n", 1)[0].rstrip().removesuffix(".")
    if not answer:
        return None
    first, after = (_tokens_until(tokenizer, tokens, place) for place in (start, start + len(answer) - 1))
    return math.exp(sum(logs[first : after + 1]))


def _tokens_until(tokenizer: Any, tokens: list[int], place: int) -> int:
    """Which token writes the character at `place` of the text, by bisection."""
    low, high = 0, len(tokens) - 1
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(tokens[: middle + 1], skip_special_tokens=True)) > place:
            high = middle
        else:
            low = middle + 1
    return low


class _Endings:
    """Whether a row is finished: an end token, a closed answer line, or its allowance spent."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        configured = getattr(model, "generation_config", None)
        ends = getattr(configured, "eos_token_id", None)
        self.tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.pad = next(iter(self.tokens), 0)
        self.max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._newline: dict[int, bool] = {}

    def __call__(self, written: list[int]) -> bool:
        last = written[-1]
        if last in self.tokens or len(written) >= self.max_new_tokens:
            return True
        if last not in self._newline:
            self._newline[last] = "\n" in self._tokenizer.decode([last])
        return self._newline[last] and ANSWERED.search(self._tokenizer.decode(written)) is not None


@dataclass(frozen=True)
class _Work:
    """Prompts of like length, and what both ways of decoding need to answer them."""

    prompts: Mapping[int, list[int]]
    capacity: int  # rows at a time
    longest: int  # positions of the longest prompt with its answer
    ends: _Endings
    pick: _Picker
    finish: Finish
    step: Step


class _Store(Cache):
    """Keys and values of all rows, (capacity, H, columns, D) a layer, written in place.

    `aim` says where the next forward pass writes and how far it sees.
    """

    def __init__(self, capacity: int, columns: int) -> None:
        super().__init__(layers=[])
        self.capacity, self.columns = capacity, columns
        self.stored: list[tuple[Tensor, Tensor]] = []

    def aim(self, rows: slice, columns: Tensor, seen: int) -> None:
        """Row i of the pass writes to `columns[i]` (N, L) of store row `rows.start + i` and sees columns 0 .. seen - 1."""
        self.rows, self.seen, self.at = rows, seen, columns
        self.index = torch.arange(rows.start, rows.stop, device=columns.device)[:, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.stored):
            _, heads, _, size = key_states.shape
            shape = (self.capacity, heads, self.columns, size)
            self.stored.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))  # zeros: a masked NaN would spread
        for stored, new in zip(self.stored[layer_idx], (key_states, value_states), strict=True):
            stored[self.index, :, self.at] = new.transpose(1, 2)  # (N, L, H, D)
        keys, values = (stored[self.rows, :, : self.seen] for stored in self.stored[layer_idx])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def share(self, columns: int) -> None:
        """Copy the first `columns` of row 0 to every row."""
        for stored in (tensor for layer in self.stored for tensor in layer):
            stored[1:, :, :columns] = stored[:1, :, :columns]

    def move(self, sources: list[int], targets: list[int], columns: int) -> None:
        for stored in (tensor for layer in self.stored for tensor in layer):
            stored[targets, :, :columns] = stored[sources, :, :columns]


def _decode(model: Any, work: _Work) -> None:
    shared = _shared_prefix(list(work.prompts.values()))
    store = _Store(work.capacity, work.longest)
    device = next(model.parameters()).device
    waiting = [*work.prompts][::-1]  # the longest are taken first, from the end
    rows: list[_Row] = []
    if shared:
        _forward(
            model,
            store,
            torch.tensor([work.prompts[waiting[0]][:shared]], device=device),
            slice(0, 1),
            torch.arange(shared, device=device)[None],
        )
        store.share(shared)
    while waiting or rows:
        if waiting and len(rows) <= REFILL * work.capacity:
            admitted = [waiting.pop() for _ in range(min(work.capacity - len(rows), len(waiting)))]
            _prefill(model, store, [work.prompts[index] for index in admitted], len(rows), shared, work.ends.pad)
            rows += [_Row(index, work.prompts[index][-1], len(work.prompts[index]) - 1) for index in admitted]
        tokens = torch.tensor([[row.last] for row in rows], device=device)
        columns = torch.tensor([[row.column] for row in rows], device=device)
        logits = _forward(model, store, tokens, slice(0, len(rows)), columns)
        for row, token, log in zip(rows, *work.pick(logits, [row.index for row in rows]), strict=True):
            row.written.append(token)
            row.logs.append(log)
            row.last, row.column = token, row.column + 1
        rows = _without_finished(rows, store, work.ends, work.finish)
        work.step(sum(len(row.written) for row in rows) / work.ends.max_new_tokens)


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is left to be fed."""
    low, high = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if low[place] != high[place]), most)


def _prefill(model: Any, store: _Store, prompts: list[list[int]], first: int, shared: int, pad: int) -> None:
    """Store all but the last token of each prompt: the last one is fed by the first decoding step, for every row alike.

    Rows are padded on the right; the padding's keys lie in columns that the answer overwrites before it sees them.
    """
    bodies = [prompt[shared:-1] for prompt in prompts]
    width = max(map(len, bodies))
    if width == 0:
        return
    device = next(model.parameters()).device
    tokens = torch.tensor([body + [pad] * (width - len(body)) for body in bodies], device=device)
    columns = torch.arange(shared, shared + width, device=device).expand(len(bodies), -1)
    _forward(model, store, tokens, slice(first, first + len(bodies)), columns)


def _forward(model: Any, store: _Store, tokens: Tensor, rows: slice, columns: Tensor) -> Tensor:
    """Logits (N, K) behind the last of `tokens` (N, L), which stand at `columns` (N, L) of their rows."""
    seen = int(columns.max()) + 1
    visible = torch.arange(seen, device=tokens.device) <= columns[:, None, :, None]  # (N, 1, L, T)
    store.aim(rows, columns, seen)
    out = model(tokens, attention_mask=visible, position_ids=columns, past_key_values=store, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


def _without_finished(rows: list[_Row], store: _Store, ends: _Endings, finish: Finish) -> list[_Row]:
    """Report the finished rows and close the holes they leave with rows from the end."""
    keep = []
    for place, row in enumerate(rows):
        if ends(row.written):
            finish(row.index, row.written, row.logs)
        else:
            keep.append(place)
    taken = set(keep)
    holes = [place for place in range(len(keep)) if place not in taken]
    movers = [place for place in keep if place >= len(keep)]
    if holes:
        store.move(movers, holes, max(rows[place].column for place in movers))
    for hole, mover in zip(holes, movers, strict=True):
        rows[hole] = rows[mover]
    return rows[: len(keep)]


# ------------------------------------------------- models whose layers do not all see everything


def _attends_to_all(settings: Any, columns: int) -> bool:
    """Whether every layer sees all of `columns`, through scaled-dot-product attention, which takes our mask."""
    text = settings.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if "sliding_attention" in kinds or "layer_types" not in text:
        window = getattr(text, "sliding_window", None)
        kinds = kinds - {"sliding_attention"} if window is None or window >= columns else kinds | {"sliding_attention"}
    return kinds <= {"full_attention"} and text._attn_implementation == "sdpa"


class _Choice(LogitsProcessor):
    """Our picker inside `transformers.generate`: all tokens but the picked one become impossible, and a greedy search then takes it."""

    def __init__(self, pick: _Picker, indices: Sequence[int]) -> None:
        self.pick, self.indices = pick, indices
        self.logs: list[list[float]] = [[] for _ in indices]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logs = self.pick(scores, self.indices)
        for own, log in zip(self.logs, logs, strict=True):
            own.append(log)
        picked = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, picked, 0.0)


class _Stop(StoppingCriteria):
    def __init__(self, width: int, ends: _Endings, step: Step) -> None:
        self.width, self.ends, self.step = width, ends, step

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.step(len(input_ids) * (input_ids.shape[1] - self.width) / self.ends.max_new_tokens)
        return torch.tensor([self.ends(row[self.width :].tolist()) for row in input_ids], device=input_ids.device)


def _decode_plainly(model: Any, work: _Work) -> None:
    """The same through `transformers.generate`: padded on the left. For sliding windows, and layers that do not only attend."""
    device = next(model.parameters()).device
    order = list(work.prompts)
    for start in range(0, len(order), work.capacity):
        batch = order[start : start + work.capacity]
        prompts = [work.prompts[index] for index in batch]
        width = len(prompts[0])
        tokens = torch.tensor([[work.ends.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        choice = _Choice(work.pick, batch)
        output = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=work.ends.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # a hub model's own setting would make this way differ from the other
            logits_processor=LogitsProcessorList([choice]),
            pad_token_id=work.ends.pad,
            eos_token_id=sorted(work.ends.tokens) or None,
            stopping_criteria=StoppingCriteriaList([_Stop(width, work.ends, work.step)]),
        )
        for index, row, logs in zip(batch, output[:, width:].tolist(), choice.logs, strict=True):
            written = _until_end(row, work.ends)
            work.finish(index, written, logs[: len(written)])


def _until_end(row: list[int], ends: _Endings) -> list[int]:
    """A generated row without the padding that follows its end."""
    return next((row[:length] for length in range(1, len(row) + 1) if ends(row[:length])), row)
