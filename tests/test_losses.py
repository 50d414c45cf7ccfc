"""The laws of every loss, on random tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from mind.training import losses

LN2 = math.log(2)


def logprobs(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return log_softmax(scale * torch.randn(*shape, generator=generator), dim=-1)


def test_token_nll_is_the_negative_log_probability() -> None:
    logits, targets = torch.randn(5, 11), torch.tensor([0, 3, 10, 4, 4])
    expected = -log_softmax(logits, dim=-1)[torch.arange(5), targets]
    torch.testing.assert_close(losses.token_nll(logits, targets), expected)


def test_losses_are_float32_in_a_bfloat16_model() -> None:
    logits = torch.randn(3, 7, dtype=torch.bfloat16)
    assert losses.token_nll(logits, torch.tensor([1, 2, 3])).dtype == torch.float32
    assert losses.span_logprobs(logits).dtype == torch.float32


def test_weighted_ce_with_the_mask_as_weights_is_the_mean() -> None:
    nll = torch.rand(2, 4)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    expected = torch.stack([nll[0].mean(), nll[1, :2].mean()])
    torch.testing.assert_close(losses.mean_ce(nll, mask), expected)


def test_weighted_ce_is_linear_in_weights_of_any_sign_and_divides_by_the_mask() -> None:
    nll, mask = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    both = losses.weighted_ce(nll, 2 * a - b, mask)
    torch.testing.assert_close(both, 2 * losses.weighted_ce(nll, a, mask) - losses.weighted_ce(nll, b, mask))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0.1, 30))
def test_jsd_is_a_bounded_symmetric_divergence(one: int, other: int, scale: float) -> None:
    p, q = logprobs(one, 3, 17, scale=scale), logprobs(other, 3, 17, scale=scale)
    value = float(losses.jsd(p, q))
    assert float(losses.jsd(p, p)) == pytest.approx(0, abs=1e-6)
    assert value == pytest.approx(float(losses.jsd(q, p)), abs=1e-6)
    assert -1e-6 <= value <= LN2 + 1e-6


def test_jsd_of_distributions_that_never_meet_is_ln_2() -> None:
    p = log_softmax(torch.tensor([[100.0, 0, 0]]), dim=-1)
    q = log_softmax(torch.tensor([[0.0, 0, 100]]), dim=-1)
    assert float(losses.jsd(p, q)) == pytest.approx(LN2, abs=1e-6)


def test_jsd_sends_gradient_to_both_sides() -> None:
    p, q = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    losses.jsd(log_softmax(p, -1), log_softmax(q, -1)).backward()
    assert p.grad is not None and p.grad.abs().sum() > 0
    assert q.grad is not None and q.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_symmetric_kl_is_the_mean_of_both_directions(scale: float) -> None:
    p, q = logprobs(1, 3, 2, 17, scale=scale), logprobs(2, 3, 2, 17, scale=scale)
    there, back = (F.kl_div(b, a, log_target=True, reduction="none").sum(dim=-1).mean(dim=-1) for a, b in ((p, q), (q, p)))
    assert not torch.allclose(there, back, rtol=1e-3)
    torch.testing.assert_close(losses.symmetric_kl(p, q), (there + back) / 2, rtol=1e-4, atol=1e-6)


def test_symmetric_kl_of_close_distributions_is_four_times_their_jsd() -> None:
    logits, change = torch.randn(2, 3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p, q = log_softmax(logits, dim=-1), log_softmax(logits + 1e-3 * change, dim=-1)
    assert float(losses.symmetric_kl(p, q)) == pytest.approx(4 * float(losses.jsd(p, q)), rel=1e-4)


def test_a_temperature_divides_the_logits_of_an_answer() -> None:
    logits = 5 * torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(losses.span_logprobs(logits, 2.5), log_softmax(logits / 2.5, dim=-1))
    assert not torch.allclose(losses.span_logprobs(logits, 2.5), losses.span_logprobs(logits), atol=0.1)


def test_consistency_is_the_weighted_sum_over_pairs() -> None:
    p, alpha = logprobs(1, 4, 2, 9), torch.tensor([0.1, 0.2, 0.3, 0.4])
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = sum(float(alpha[i] * alpha[j] * losses.jsd(p[i], p[j])) for i, j in pairs)
    assert float(losses.pairwise_consistency(p, alpha)) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_consistency_is_that_of_the_sum_over_pairs() -> None:
    logits, alpha = (
        torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(6)).mul(30).requires_grad_(),
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
    )
    log_p = log_softmax(logits, -1)
    pairs = torch.stack([alpha[i] * alpha[j] * losses.jsd(log_p[i], log_p[j]) for i in range(4) for j in range(i + 1, 4)]).sum()
    (expected,) = torch.autograd.grad(3 * pairs, logits, retain_graph=True)
    (found,) = torch.autograd.grad(3 * losses.pairwise_consistency(log_p, alpha), logits)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_consistency_is_zero_for_views_that_agree_and_for_a_single_view() -> None:
    same = logprobs(2, 1, 2, 9).expand(3, 2, 9)
    assert float(losses.pairwise_consistency(same, torch.full((3,), 1 / 3))) == pytest.approx(0, abs=1e-6)
    assert float(losses.pairwise_consistency(logprobs(3, 1, 2, 9), torch.ones(1))) == 0


def test_consistency_does_not_depend_on_the_order_of_the_views() -> None:
    p, alpha, order = logprobs(4, 4, 2, 9), torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(losses.pairwise_consistency(p[order], alpha[order]), losses.pairwise_consistency(p, alpha))


def test_listnet_is_zero_where_scores_mirror_the_losses() -> None:
    filtered = torch.rand(3, 8)
    present = torch.ones(3, 8, dtype=torch.bool)
    torch.testing.assert_close(losses.listnet_kl(5 - filtered, filtered, present, 0.3), torch.zeros(3), atol=1e-6, rtol=0)
    assert (losses.listnet_kl(filtered, filtered, present, 0.3) > 0).all()


def test_listnet_ignores_absent_views_and_their_gradient() -> None:
    scores = torch.rand(1, 4, requires_grad=True)
    filtered, present = torch.rand(1, 4), torch.tensor([[True, False, True, True]])
    value = losses.listnet_kl(scores, filtered, present, 0.5)
    short = losses.listnet_kl(scores[:, [0, 2, 3]], filtered[:, [0, 2, 3]], present[:, [0, 2, 3]], 0.5)
    torch.testing.assert_close(value, short)
    value.sum().backward()
    assert scores.grad is not None and torch.isfinite(scores.grad).all()
    assert scores.grad[0, 1] == 0


def test_listnet_of_a_lone_view_is_zero() -> None:
    present = torch.tensor([[False, True]])
    assert float(losses.listnet_kl(torch.rand(1, 2), torch.rand(1, 2), present, 0.5)) == pytest.approx(0, abs=1e-7)


def test_listnet_teaches_to_score_the_lower_loss_higher() -> None:
    scores = torch.full((1, 2), 0.5, requires_grad=True)
    losses.listnet_kl(scores, torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool), 0.5).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]
