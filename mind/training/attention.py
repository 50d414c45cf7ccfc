"""Attention in which a view sees its prompt and itself, and nothing else is computed. Called by the layout, inside the student's layers.

A question's tokens are one flat row: prompts and views one after another. A dense mask over it would compute every view against every
other and throw that away: three quarters of attention's work with eight views. Here the prompts attend in one call, the views of about
equal length in another, each with its prompt's keys before its own; heads that share a key stand below each other.

Letters: N tokens of the row, G prompts of at most P tokens, S views of at most T tokens, H query heads on K key heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "mind_blocks"
STRETCH = 2
"""Views of one call differ in length by at most this factor: the shorter are padded to the longest."""


@dataclass(frozen=True)
class Span:
    """Where a prompt's or view's tokens stand in the row: [start, start + length)."""

    start: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Views that attend in one call."""

    queries: Tensor  # (S, T) places in the row; a shorter view repeats its last
    keys: Tensor  # (S, P + T): its prompt's places, then its own
    mask: Tensor  # (S, 1, T, P + T) additive


@dataclass(frozen=True)
class Blocks:
    """Who sees whom in a row."""

    prompts: Tensor  # (G, P)
    batches: tuple[Batch, ...]
    order: Tensor  # (N,): where a token's result stands among those of the prompts and of all batches, one after another


def blocks(prompts: Sequence[Span], views: Sequence[Sequence[Span]], device: torch.device, dtype: torch.dtype) -> Blocks:
    """Of a row in which `views[g]` follow the prompt `prompts[g]`."""
    owners = [(view, prompt) for prompt, own in zip(prompts, views, strict=True) for view in own if view.length]
    width = max(prompt.length for prompt in prompts)
    results = [place for prompt in prompts for place in _padded(prompt, width)]  # the token that each result is of
    batches = []
    for part in _alike(owners):
        longest = max(view.length for view, _ in part)
        batches.append(_batch(part, longest, device, dtype))
        results += [place for view, _ in part for place in _padded(view, longest)]
    order = {place: result for result, place in reversed(list(enumerate(results)))}
    return Blocks(
        torch.tensor([_padded(prompt, width) for prompt in prompts], device=device),
        tuple(batches),
        torch.tensor([order[place] for place in range(len(order))], device=device),
    )


def _alike(owners: Sequence[tuple[Span, Span]]) -> list[list[tuple[Span, Span]]]:
    """The views in batches of about equal length."""
    batches: list[list[tuple[Span, Span]]] = []
    for view, prompt in sorted(owners, key=lambda pair: pair[0].length):
        if not batches or view.length > STRETCH * batches[-1][0][0].length:
            batches.append([])
        batches[-1].append((view, prompt))
    return batches


def _batch(part: Sequence[tuple[Span, Span]], longest: int, device: torch.device, dtype: torch.dtype) -> Batch:
    width = max(prompt.length for _, prompt in part)
    queries = torch.tensor([_padded(view, longest) for view, _ in part], device=device)
    before = torch.tensor([_padded(prompt, width) for _, prompt in part], device=device)
    lengths = torch.tensor([prompt.length for _, prompt in part], device=device)
    prompt = (torch.arange(width, device=device) < lengths[:, None])[:, None, :].expand(-1, longest, -1)  # (S, T, P)
    places = torch.arange(longest, device=device)
    own = (places[:, None] >= places).expand(len(part), -1, -1)  # (S, T, T)
    seen = torch.cat([prompt, own], dim=2)[:, None]
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return Batch(queries, torch.cat([before, queries], dim=1), mask)


def _padded(span: Span, width: int) -> list[int]:
    last = span.start + span.length - 1
    return [min(span.start + i, last) for i in range(width)]


# ------------------------------------------------------------- in the layers


def understands(model: Any) -> bool:
    """Whether this model's layers attend by `attend` from now on. Those with an attention of their own (Gemma 2 caps its scores) do not."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    blocks: Blocks | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention: (1, H, N, D), (1, K, N, D) twice -> (1, N, H, D). Without `blocks` it is the usual one."""
    if blocks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (N, H or K, D)
    _, heads, width = query.shape
    asked, seen, told = (_take(states, blocks.prompts).transpose(1, 2) for states in (query, key, value))  # (G, H or K, P, D)
    shared = heads != key.shape[1]
    first = F.scaled_dot_product_attention(asked, seen, told, None, dropout, True, scale=scaling, enable_gqa=shared)
    results = [first.transpose(1, 2).reshape(-1, heads, width)]
    results += [_views(batch, query, key, value, dropout, scaling) for batch in blocks.batches]
    return _take(torch.cat(results), blocks.order)[None], None


def _views(batch: Batch, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """Results of the views of a batch: (S * T, H, D)."""
    count, longest = batch.queries.shape
    heads, keys = query.shape[1], key.shape[1]
    each = heads // keys  # query heads on one key head: as rows of one product
    asked = _take(query, batch.queries).unflatten(2, (keys, each)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (S, K, each * T, D)
    seen, told = (_take(states, batch.keys).transpose(1, 2) for states in (key, value))  # (S, K, P + T, D)
    mask = batch.mask.repeat(1, 1, each, 1)
    found = F.scaled_dot_product_attention(asked, seen, told, mask, dropout, scale=scaling)
    return found.unflatten(2, (each, longest)).permute(0, 3, 1, 2, 4).reshape(count * longest, heads, -1)


def _take(states: Tensor, places: Tensor) -> Tensor:
    """states[places]; the gradient of this one is a sum of rows, that of an index a slow scatter."""
    return states.index_select(0, places.flatten()).unflatten(0, places.shape)
