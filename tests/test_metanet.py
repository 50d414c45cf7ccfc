"""The laws of MetaNet, of the selection rule and of the inertia filter."""

from __future__ import annotations

import pytest
import torch

from mind.methods.inertia import Inertia
from mind.methods.metanet import MetaNet
from mind.methods.mind import select_views, view_weights

Q, K, H = 3, 8, 16


def net(*, self_attention: bool = True) -> MetaNet:
    torch.manual_seed(0)
    return MetaNet(H, K, width=32, heads=4, self_attention=self_attention)


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.ones(Q, K, dtype=torch.bool)
    present[1, 2] = present[2, 5:] = False
    return torch.randn(Q, H, generator=generator), torch.randn(Q, K, H, generator=generator), present


def test_scores_lie_between_0_and_1_and_absent_views_have_none() -> None:
    questions, views, present = batch()
    scores = net()(questions, views, present)
    assert scores.shape == (Q, K)
    assert ((scores[present] > 0) & (scores[present] < 1)).all()
    assert (scores[~present] == 0).all()


@pytest.mark.parametrize("self_attention", [True, False])
def test_what_stands_in_an_absent_view_changes_nothing(self_attention: bool) -> None:
    questions, views, present = batch()
    other = views.clone()
    other[~present] = float("nan")
    scorer = net(self_attention=self_attention)
    torch.testing.assert_close(scorer(questions, views, present), scorer(questions, other, present))


def test_questions_of_a_batch_do_not_see_each_other() -> None:
    questions, views, present = batch()
    scorer = net()
    alone = torch.cat([scorer(questions[i : i + 1], views[i : i + 1], present[i : i + 1]) for i in range(Q)])
    torch.testing.assert_close(scorer(questions, views, present), alone)


def test_with_self_attention_a_score_depends_on_the_other_views_without_it_not() -> None:
    questions, views, present = batch()
    fewer = present.clone()
    fewer[0, 7] = False
    for attention, depends in ((True, True), (False, False)):
        scorer = net(self_attention=attention)
        change = (scorer(questions, views, present) - scorer(questions, views, fewer))[0, :7].abs().max()
        assert bool(change > 1e-6) is depends


def test_permuting_views_with_their_embeddings_and_heads_permutes_the_scores() -> None:
    questions, views, present = batch()
    scorer, order = net(), torch.randperm(K, generator=torch.Generator().manual_seed(3))
    before = scorer(questions, views, present)
    with torch.no_grad():
        scorer.view_embedding.copy_(scorer.view_embedding[order].clone())
    scorer.heads = torch.nn.ModuleList([scorer.heads[i] for i in order.tolist()])
    torch.testing.assert_close(scorer(questions, views[:, order], present[:, order]), before[:, order])


def test_standardised_features_do_not_depend_on_the_units_of_the_hidden_states() -> None:
    questions, views, present = batch()
    plain, scaled = net(), net()
    parts = [[values[:1] for values in batch()], [values[1:] for values in batch()]]
    plain.standardise(lambda: [(questions, views, present)])
    scaled.standardise(lambda: [(100 * q + 5, 100 * v - 7, there) for q, v, there in parts])
    torch.testing.assert_close(plain.center[1], views[present].mean(dim=0))
    torch.testing.assert_close(plain.scale[1], views[present].std(dim=0, correction=0))
    torch.testing.assert_close(
        scaled(100 * questions + 5, 100 * views - 7, present), plain(questions, views, present), atol=1e-5, rtol=1e-4
    )


def test_what_never_varied_is_not_blown_up() -> None:
    made, one = net(), (torch.ones(1, H), torch.ones(1, K, H), torch.ones(1, K, dtype=torch.bool))
    made.standardise(lambda: [one])
    assert torch.equal(made.scale, torch.ones_like(made.scale))


def test_selection_keeps_what_reaches_beta_times_the_best_and_never_an_absent_view() -> None:
    scores = torch.tensor([[0.9, 0.75, 0.7, 0.1], [0.2, 0.9, 0.1, 0.19]])
    present = torch.tensor([[True, True, True, True], [True, False, True, True]])
    expected = torch.tensor([[True, True, False, False], [True, False, False, True]])
    assert select_views(scores, present, 0.8).equal(expected)
    assert select_views(scores, present, 0.0).equal(present)
    assert select_views(scores, present, 1.0).sum(dim=1).tolist() == [1, 1]


def test_weights_are_a_softmax_over_the_selected_and_carry_no_gradient() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.3]], requires_grad=True)
    selected = torch.tensor([[True, True, False]])
    alpha = view_weights(scores, selected, 0.2)
    torch.testing.assert_close(alpha[0, :2], torch.softmax(torch.tensor([4.5, 4.0]), dim=0))
    assert alpha[0, 2] == 0
    assert not alpha.requires_grad


def test_a_high_temperature_makes_weights_uniform() -> None:
    selected = torch.tensor([[True, True, False, True]])
    torch.testing.assert_close(view_weights(torch.tensor([[0.9, 0.1, 0.5, 0.2]]), selected, 1e8), torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3]]))


def test_inertia_is_the_moving_average_from_the_first_loss_on() -> None:
    inertia = Inertia(questions=2, views=2, mu=0.75)
    rows, seen = torch.tensor([1]), torch.tensor([[True, False]])
    for loss in (4.0, 2.0, 1.0):
        inertia.update(rows, torch.tensor([[loss, 9.0]]), seen)
    assert inertia.filtered[1, 0] == 0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 1
    assert inertia.filtered[1, 1].isnan() and inertia.filtered[0].isnan().all()


def test_without_inertia_the_filtered_loss_is_the_instant_one() -> None:
    inertia = Inertia(questions=1, views=3, mu=0)
    for _ in range(3):
        losses = torch.rand(1, 3)
        inertia.update(torch.tensor([0]), losses, torch.ones(1, 3, dtype=torch.bool))
        torch.testing.assert_close(inertia.filtered, losses)


def test_inertia_lets_the_filtered_loss_lag() -> None:
    inertia = Inertia(questions=1, views=1, mu=0.9)
    for loss in (1.0, 0.0):
        inertia.update(torch.tensor([0]), torch.tensor([[loss]]), torch.ones(1, 1, dtype=torch.bool))
    assert float(inertia.filtered) == pytest.approx(0.9)
