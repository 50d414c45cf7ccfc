"""Tensors -> losses. Called by the layout (token_nll) and by the methods (all others). Pure functions, no configuration.

Letters: R supervised rows, S sequences (views), T tokens, A positions of the answer span, V vocabulary, Q questions, K perspectives.
Everything is float32 and in nats, whatever the model's dtype. Divergences carry gradient into both sides.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of each row: (R, V), (R,) -> (R,). Row and target are already shifted against each other (see layout)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def weighted_ce(nll: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """sum(w * nll) / sum(mask) of each sequence: three (S, T) -> (S,). Weights of any sign; weights = mask is the plain mean CE."""
    return (weights * nll).sum(dim=1) / mask.sum(dim=1)


def mean_ce(nll: Tensor, mask: Tensor) -> Tensor:
    """CE_k: the mean over the supervised tokens of each sequence, (S, T), (S, T) -> (S,)."""
    return weighted_ce(nll, mask.to(nll.dtype), mask)


def span_logprobs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-distributions of the rows that predict an answer span: (A, V) -> (A, V)."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of log-distributions (..., A, V), mean over the A positions -> (...); 0 <= JSD <= ln 2."""
    left, right = _jsd_terms(log_p, log_q)
    return (left + right).sum(dim=-1).mean(dim=-1)


def _jsd_terms(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p / 2 * log(p / m) and q / 2 * log(q / m), m = (p + q) / 2: what JSD is the sum of, and its slopes in log p and in log q."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * log_p.exp() * (log_p - log_m), 0.5 * log_q.exp() * (log_q - log_m)


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1/2 [KL(p || q) + KL(q || p)], shapes as in `jsd`; unbounded, and for close distributions 4 x JSD (MCC, part 3)."""
    return (0.5 * (log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1).mean(dim=-1)


def pairwise_consistency(log_p: Tensor, alpha: Tensor) -> Tensor:
    """sum over i < j of alpha_i * alpha_j * JSD(P_i || P_j) (method, section 4): (S, A, V), (S,) -> scalar. Gradient into log_p only."""
    return _PairwiseConsistency.apply(log_p, alpha)


class _PairwiseConsistency(torch.autograd.Function):
    """The slopes add up to the value, so both are found pair by pair: autograd would keep a dozen tensors (S (S - 1) / 2, A, V)."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, alpha: Tensor) -> Tensor:
        slopes = torch.zeros_like(log_p)
        for i, j in combinations(range(len(log_p)), 2):
            left, right = _jsd_terms(log_p[i], log_p[j])
            weight = alpha[i] * alpha[j] / log_p.shape[1]
            slopes[i].add_(weight * left)
            slopes[j].add_(weight * right)
        ctx.save_for_backward(slopes)
        return slopes.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return gradient * slopes, None


def listnet_kl(scores: Tensor, losses: Tensor, present: Tensor, tau: float) -> Tensor:
    """KL( softmax(s / tau) || softmax(-L / tau) ) over the views present (method, section 3): three (Q, K) -> (Q,).

    Gradient flows into both arguments that carry any; the method detaches the losses.
    """
    log_s = masked_log_softmax(scores / tau, present)
    log_l = masked_log_softmax(-losses / tau, present)
    terms = log_s.exp() * (log_s - log_l)
    return terms.masked_fill(~present, 0.0).sum(dim=-1)


def masked_log_softmax(values: Tensor, present: Tensor) -> Tensor:
    """Log-softmax over the entries present, 0 where absent (so that no NaN reaches a gradient): (Q, K) -> (Q, K)."""
    kept = values.float().masked_fill(~present, float("-inf"))
    return F.log_softmax(kept, dim=-1).masked_fill(~present, 0.0)
