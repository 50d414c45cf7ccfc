"""Examples -> token ids -> one forward pass -> per-view losses, answer distributions and features. Called by the loop and the methods.

A target is y_k = rationale + "\\n" + "The answer is {answer}." + EOS. Prompt, rationale, lead-in and answer are encoded apart and their
ids joined, so the answer's span is exact and its ids are the same in all views.

Two layouts give the same `Outputs`:
- packed: all questions are ONE row without padding. A prompt stands once, its views follow; a view sees the prompt and itself
  (training.attention), and its positions go on from the prompt's end.
- padded: a view is a row, prompt repeated. Slow and plain; the oracle of the first in the tests, and the way of students whose layers
  convolve or recur.

Letters: G groups (a prompt with its views), S views over all groups, B rows, N tokens of a row, R supervised rows, T tokens of a view,
H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from mind.prompts import student_ids, student_prompt
from mind.records import ANSWER_LINE, Example
from mind.students.loading import only_attends
from mind.training.attention import Span, blocks, understands
from mind.training.losses import mean_ce, span_logprobs, token_nll

LOGITS = 2**23
"""Logits that exist at a time: 32 MiB in float32, about what a processor's cache holds."""

Head = Callable[[Tensor], Tensor]
"""(R, H) hidden states -> (R, V) logits."""


@dataclass(frozen=True)
class Response:
    """What follows the prompt: its ids (EOS included) and where the answer's value stands in them, [start, end).

    A text without an answer line (`encode_text`) is all answer.
    """

    ids: tuple[int, ...]
    answer: tuple[int, int]


@dataclass(frozen=True)
class Group:
    """A prompt and the responses that share it."""

    prompt: tuple[int, ...]
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Encoded:
    """A question ready for training: `index` is its place in the dataset, `views` are in the order of PERSPECTIVES."""

    index: int
    id: str
    prompt: tuple[int, ...]
    views: Mapping[str, Response]

    def group(self, names: Sequence[str] | None = None) -> Group:
        """The question with the views of these names; all of them by default."""
        return Group(self.prompt, tuple(self.views[name] for name in (self.views if names is None else names)))

    def up_to(self, limit: int) -> Encoded:
        """Only the views that, with the prompt, have at most `limit` tokens."""
        return replace(self, views={name: view for name, view in self.views.items() if len(self.prompt) + len(view.ids) <= limit})

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest view."""
        return len(self.prompt) + max((len(view.ids) for view in self.views.values()), default=0)


@dataclass(frozen=True)
class Outputs:
    """What one forward pass says of S views."""

    nll: Tensor  # (S, T) float32, 0 where mask is False
    mask: Tensor  # (S, T) bool
    states: Tensor  # (R, H): the hidden states that predict the supervised tokens, view after view
    head: Head
    answers: tuple[tuple[int, int], ...]  # a view's answer, as rows of `states`
    answer_ce: Tensor  # (S,) float32: mean over the answer's tokens only
    prompt_features: Tensor  # (G, H) float32, detached: mean last hidden state of the prompt
    view_features: Tensor  # (S, H) float32, detached: the same of the view's own tokens

    def ce(self) -> Tensor:
        """CE_k of each view: (S,)."""
        return mean_ce(self.nll, self.mask)

    def answer_logprobs(self, views: Sequence[int], temperature: float = 1.0) -> Tensor:
        """Log-distributions that predict the answer's tokens of one question's views, the only logits kept: (len(views), A, V)."""
        rows = torch.cat([self.states[slice(*self.answers[view])] for view in views])
        return span_logprobs(self.head(rows), temperature).unflatten(0, (len(views), -1))

    def part(self, groups: Sequence[int], views: Sequence[int]) -> Outputs:
        """The same of these groups and views only."""
        answers = tuple(self.answers[view] for view in views)
        places = list(views)
        return Outputs(
            self.nll[places],
            self.mask[places],
            self.states,
            self.head,
            answers,
            self.answer_ce[places],
            self.prompt_features[list(groups)],
            self.view_features[places],
        )


class Forward(Protocol):
    """A pass of the student over some groups. `answers_only`: losses and logits of the answers' tokens only (features are the same);
    no logits of a rationale are made, a sixth of the work of a small student."""

    def __call__(self, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs: ...


# ------------------------------------------------------------------ encoding


def encode(tokenizer: Any, prompt: str, body: str, answer: str) -> tuple[tuple[int, ...], Response]:
    """Prompt ids and the response `body` + answer line + EOS, its pieces encoded apart."""
    return tuple(student_ids(tokenizer, prompt)), _response(tokenizer, body, _tail(tokenizer, answer))


def encode_text(tokenizer: Any, prompt: str, text: str) -> Group:
    """Prompt and one response: `text` + EOS, without an answer line."""
    ids = (*_ids(tokenizer, text.strip()), tokenizer.eos_token_id)
    return Group(tuple(student_ids(tokenizer, prompt)), (Response(ids, (0, len(ids))),))


def encode_example(tokenizer: Any, example: Example, views: Mapping[str, str], index: int, prompt: str | None = None) -> Encoded:
    """`example` with these of its views (perspective -> rationale); `prompt` in place of the common one."""
    tail = _tail(tokenizer, example.answer)
    asked = prompt or student_prompt(example.question, example.kind, example.choices)
    ids = student_ids(tokenizer, asked)
    bodies = tokenizer([body.strip() for body in views.values()], add_special_tokens=False)["input_ids"] if views else []
    return Encoded(index, example.id, tuple(ids), {name: _ended(own, tail) for name, own in zip(views, bodies, strict=True)})


def _response(tokenizer: Any, body: str, tail: tuple[list[int], list[int], list[int]]) -> Response:
    return _ended(_ids(tokenizer, body.strip()), tail)


def _ended(body: Sequence[int], tail: tuple[list[int], list[int], list[int]]) -> Response:
    lead, value, end = tail
    before = [*body, *lead]
    return Response((*before, *value, *end), (len(before), len(before) + len(value)))


def _tail(tokenizer: Any, answer: str) -> tuple[list[int], list[int], list[int]]:
    """Ids of the lead-in, the answer's value and what closes it. The space between goes where the tokenizer itself would put it."""
    lead, closing = ("\n" + ANSWER_LINE).split("{answer}")
    whole = _ids(tokenizer, lead + answer)
    pieces = _ids(tokenizer, lead), _ids(tokenizer, answer)
    if [*pieces[0], *pieces[1]] != whole:  # " yes" is one token for most: the space then belongs to the value
        pieces = _ids(tokenizer, lead.rstrip(" ")), _ids(tokenizer, " " + answer)
    return *pieces, [*_ids(tokenizer, closing), tokenizer.eos_token_id]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ------------------------------------------------------------------- forward


class Layout(Protocol):
    """As `Forward`, with the model."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs: ...


def packed(model: nn.Module, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs:
    """All groups in one flat row. Equal to `padded` to float32 rounding, at a fraction of its tokens.

    A student with layers that no mask reaches (LFM2, Qwen3-Next) goes through `padded` itself: its views would mix.
    """
    if not only_attends(_causal(model)):
        return padded(model, groups, answers_only=answers_only)
    row = _pack(groups)
    return _run(model, _inputs(model, row), groups, row.predicting, row.prompts, answers_only)


def padded(model: nn.Module, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs:
    """One row a view, prompt repeated, padded on the right: the oracle."""
    device = _device(model)
    sequences = [(*group.prompt, *response.ids[:-1]) for group in groups for response in group.responses]
    owners = [group for group in groups for _ in group.responses]
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    where = [list(range(b * width + len(g.prompt) - 1, b * width + len(s))) for b, (g, s) in enumerate(zip(owners, sequences, strict=True))]
    firsts = [sum(len(before.responses) for before in groups[:g]) for g in range(len(groups))]
    prompts = [range(first * width, first * width + len(group.prompt)) for first, group in zip(firsts, groups, strict=True)]
    return _run(model, {"input_ids": ids, "attention_mask": mask}, groups, where, prompts, answers_only)


def view_states(model: nn.Module, group: Group) -> Tensor:
    """(S, H) float32: mean last hidden state of each view's fed tokens, as `Outputs.view_features`, without the logits of rationales."""
    if not only_attends(_causal(model)):
        return padded(model, [group], answers_only=True).view_features
    row = _pack([group])
    return _pool(_hidden(model, _inputs(model, row)), [view[1:] for view in row.predicting])


LAYOUTS: dict[str, Layout] = {"packed": packed, "padded": padded}


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    positions: list[int]
    prompts: list[range]  # the places of each group's prompt
    views: list[list[Span]]  # of each group: the places of its views
    predicting: list[list[int]]  # for each view of all groups, the places whose hidden states predict its tokens


def _pack(groups: Sequence[Group]) -> _Row:
    """Prompt and views of one group after another. The last token of a view (EOS) is predicted and never fed."""
    row = _Row([], [], [], [], [])
    for group in groups:
        start, length = len(row.ids), len(group.prompt)
        row.ids.extend(group.prompt)
        row.positions.extend(range(length))
        row.prompts.append(range(start, start + length))
        row.views.append([])
        for response in group.responses:
            fed, place = len(response.ids) - 1, len(row.ids)
            row.ids.extend(response.ids[:-1])
            row.positions.extend(range(length, length + fed))
            row.views[-1].append(Span(place, fed))
            row.predicting.append([start + length - 1, *range(place, place + fed)])
    return row


def _inputs(model: nn.Module, row: _Row) -> dict[str, Any]:
    """What the student is fed; who sees whom as blocks, or as a dense mask for an attention that knows no blocks."""
    device, dtype = _device(model), _dtype(model)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([row.ids], device=device),
        "position_ids": torch.tensor([row.positions], device=device),
    }
    if understands(_causal(model)):
        prompts = [Span(prompt.start, len(prompt)) for prompt in row.prompts]
        # a mask that no attention but ours can use: one that passed the blocks over would fail and not mix the views
        return {**inputs, "blocks": blocks(prompts, row.views, device, dtype), "attention_mask": torch.empty(1, 1, 0, 0, device=device)}
    return {**inputs, "attention_mask": _dense_mask(row, device, dtype)}


def _dense_mask(row: _Row, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Additive mask (1, 1, N, N): a token sees what stands before it in its prompt and in its own view."""
    seen = torch.zeros(len(row.ids), len(row.ids), dtype=torch.bool, device=device)
    for prompt, views in zip(row.prompts, row.views, strict=True):
        seen[prompt.start : prompt.stop, prompt.start : prompt.stop] = True
        for view in views:
            own = slice(view.start, view.start + view.length)
            seen[own, prompt.start : prompt.stop] = True
            seen[own, own] = True
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen.tril(), torch.finfo(dtype).min)[None, None]


def _run(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    groups: Sequence[Group],
    where: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    answers_only: bool,
) -> Outputs:
    """`where`: for each view the flat places (of B * N) that predict its tokens; `prompts`: those of each group's prompt."""
    device = inputs["input_ids"].device
    responses = [response for group in groups for response in group.responses]
    views = [view[1:] for view in where]  # without the prompt's last token, which predicts a view's first
    if answers_only:
        where = [view[slice(*response.answer)] for view, response in zip(where, responses, strict=True)]
        responses = [Response(r.ids[slice(*r.answer)], (0, r.answer[1] - r.answer[0])) for r in responses]
    places = torch.tensor([place for view in where for place in view], device=device)
    targets = torch.tensor([token for response in responses for token in response.ids], device=device)
    hidden = _hidden(model, inputs)  # (B * N, H)
    states, head = hidden.index_select(0, places), _head(model)  # (R, H)
    starts = [0]
    for response in responses:
        starts.append(starts[-1] + len(response.ids))
    lengths = torch.tensor([len(response.ids) for response in responses], device=device)
    mask = torch.arange(int(lengths.max()), device=device)[None, :] < lengths[:, None]  # (S, T)
    flat = _rows_nll(model, states, targets, head)
    nll = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    spans = tuple((start + r.answer[0], start + r.answer[1]) for start, r in zip(starts, responses, strict=False))
    answer_ce = torch.stack([flat[start:end].mean() for start, end in spans])
    return Outputs(nll, mask, states, head, spans, answer_ce, _pool(hidden.detach(), prompts), _pool(hidden.detach(), views))


def _hidden(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """All last hidden states, (B * N, H)."""
    return _causal(model).get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def _head(model: nn.Module) -> Head:
    """The model itself from its last hidden states on: (R, H) -> (R, V).

    What an architecture does between hidden states and logits (Gemma 2 caps them, Granite scales them) needs no knowledge here.
    """
    causal = _causal(model)
    decoder, kind = causal.get_decoder(), _device(model).type
    precision = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))  # as in the pass itself

    def head(states: Tensor) -> Tensor:
        nothing = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states[None])
        try:
            with precision():
                return causal(input_ids=nothing, use_cache=False).logits[0]
        finally:
            del decoder.forward

    return head


def _rows_nll(model: nn.Module, states: Tensor, targets: Tensor, head: Head) -> Tensor:
    """-log p of each target, (R,), with no more logits at a time than `LOGITS` where the head does not learn."""
    if torch.is_grad_enabled() and not _is_frozen(model):
        return token_nll(head(states), targets)
    return _ChunkedNll.apply(states, targets, head, max(1, LOGITS // _causal(model).config.vocab_size))


class _ChunkedNll(torch.autograd.Function):
    """A row's loss depends on that row alone, so its gradient is known up to a factor as soon as its logits are: that is kept, (R, H), and
    never the logits, (R, V), fifty times as large."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
        learns = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for own, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            with torch.set_grad_enabled(learns):
                own = own.detach().requires_grad_(learns)
                loss = token_nll(head(own), wanted)
                slopes += torch.autograd.grad(loss.sum(), own) if learns else ()
            losses.append(loss.detach())
        ctx.save_for_backward(*([torch.cat(slopes)] if slopes else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None


def _is_frozen(model: nn.Module) -> bool:
    """Whether nothing learns between the last hidden states and the logits."""
    causal = _causal(model)
    within = {id(p) for p in causal.get_decoder().parameters()} - {id(p) for p in causal.get_output_embeddings().parameters()}
    return not any(p.requires_grad and id(p) not in within for p in causal.parameters())


def _pool(hidden: Tensor, segments: Sequence[Sequence[int]]) -> Tensor:
    """Mean hidden state of each segment: (B * N, H) -> (len(segments), H) float32."""
    weights = torch.zeros(len(segments), len(hidden), device=hidden.device)
    for row, segment in enumerate(segments):
        weights[row, torch.tensor(list(segment), device=hidden.device)] = 1 / max(len(segment), 1)
    return weights @ hidden.float()


def _causal(model: Any) -> Any:
    """The model with its language-model head, out of PEFT's and DDP's wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
