"""What each method trains on and how its parts act together, on tiny random students."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mind import config
from mind.errors import MindError
from mind.methods.base import Setup
from mind.methods.mind import Mind
from mind.methods.table import CLASSES, build
from mind.records import PERSPECTIVES, Example
from mind.training.layout import Encoded, Group, Outputs, encode_example, packed
from mind.training.loop import Trained, train
from tests import tiny

QUESTIONS = 6


def resolved(method: Any, student: Mapping[str, Any] | None = None, **training: Any) -> config.Resolved:
    return config.Resolved(
        name="x",
        seed=17,
        method=method,
        student=config.Student.model_validate(student or {}),
        training=config.Training.model_validate({"learning_rate": 1e-3, "log_steps": 1, **training}),
    )


def trained(
    method: Any, examples: Sequence[Example] | None = None, student: Mapping[str, Any] | None = None, **training: Any
) -> tuple[Trained, dict[str, torch.Tensor]]:
    """A run on the tiny student, and the weights it learnt."""
    loaded = tiny.load()
    done = train(loaded, resolved(method, student, **training), examples or tiny.examples(QUESTIONS), build)
    return done, {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.requires_grad}


def mind(**options: Any) -> config.Mind:
    """With a MetaNet that is quick to build and to warm up."""
    return config.Mind.model_validate({"metanet": {"width": 16, "heads": 2, "warmup_epochs": 2, "accumulation": 2}, **options})


class Student:
    """A forward pass that counts what it is asked for, and lets the views' losses be anything."""

    def __init__(self) -> None:
        self.model = tiny.model()
        self.runs: list[tuple[int, bool]] = []  # views of a pass, and whether it carried gradient

    def __call__(self, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs:
        self.runs.append((sum(len(group.responses) for group in groups), torch.is_grad_enabled()))
        return packed(self.model, groups, answers_only=answers_only)


def prepared(options: config.Mind, count: int = QUESTIONS) -> tuple[Mind, list[Encoded], Student]:
    tokenizer, student = tiny.tokenizer(), Student()
    questions = [encode_example(tokenizer, example, example.views, i) for i, example in enumerate(tiny.examples(count))]
    method = Mind(options, Setup(questions=count, width=32, batch_questions=1, step_questions=1, seed=3))
    method.prepare(questions, student)
    student.runs.clear()
    return method, questions, student


def test_every_method_of_the_settings_is_in_the_table() -> None:
    assert set(CLASSES) == set(config.METHOD_NAMES)


def test_the_method_that_the_documentation_adds_works() -> None:
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    source = text.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(compile(source, "docs/methods.md", "exec", dont_inherit=True), namespace)
    loaded = tiny.load()
    options = SimpleNamespace(views=2)
    done = train(loaded, resolved(config.WithoutFusion()), tiny.examples(3), lambda _, setup: namespace["Shortest"](options, setup))
    assert done.views == 6 and namespace["Shortest"].caption


def test_without_fusion_may_keep_to_some_views() -> None:
    done, _ = trained(config.WithoutFusion(views=("socratic", "planning")), tiny.examples(3))
    assert done.views == 6


# ------------------------------------------------------------------- ablations


def test_mind_with_all_parts_off_is_without_fusion() -> None:
    off = mind(beta=0, consistency=0, tau_student=1e8)
    plain, plain_weights = trained(config.WithoutFusion())
    done, weights = trained(off)
    for row, expected in zip(done.history, plain.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-6)
    for name, value in plain_weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changed", [{"feedback": "answer"}, {"consistency": 0.0}, {"beta": 0.0}, {"tau_student": 5.0}])
def test_every_ablation_changes_the_course(changed: dict[str, Any]) -> None:
    _, weights = trained(mind(consistency=1.0))
    _, other = trained(mind(**{"consistency": 1.0, **changed}))
    assert any(not torch.equal(weights[name], other[name]) for name in weights)


def test_self_attention_is_all_that_its_ablation_takes_away() -> None:
    """From the same weights, so that not only MetaNet's random numbers differ."""
    with_it, _, _ = prepared(mind(beta=0.0))
    without, _, _ = prepared(mind(beta=0.0, self_attention=False))
    without.net.load_state_dict(with_it.net.state_dict(), strict=False)
    scores = [method._score(torch.tensor([0]))[0] for method in (with_it, without)]
    assert not torch.allclose(*scores, atol=1e-4)
    with torch.no_grad():
        assert with_it.net.attention is not None
        with_it.net.attention.out_proj.weight.zero_()
        with_it.net.attention.out_proj.bias.zero_()
    torch.testing.assert_close(with_it._score(torch.tensor([0]))[0], scores[1])


def test_inertia_0_filters_nothing_and_inertia_lags() -> None:
    instant, _ = trained(mind(inertia=0), epochs=2)
    lagging, _ = trained(mind(inertia=0.9), epochs=2)
    for row in instant.history:
        for name in PERSPECTIVES:
            assert row[f"inertia/filtered/{name}"] == row[f"inertia/instant/{name}"]
    last = lagging.history[-1]
    assert all(last[f"inertia/filtered/{name}"] > last[f"inertia/instant/{name}"] for name in PERSPECTIVES)


def test_single_trains_on_its_perspective_only() -> None:
    examples = tiny.examples(QUESTIONS)
    without = [example.model_copy(update={"views": {**example.views, "intuitive": "?"}}) for example in examples]
    done, weights = trained(config.Single(perspective="planning"), examples)
    _, same = trained(config.Single(perspective="planning"), without)
    assert done.views == QUESTIONS
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_questions_without_the_perspective_are_left_out_and_counted() -> None:
    examples = tiny.examples(QUESTIONS)
    some = [e if i < 4 else e.model_copy(update={"views": {"intuitive": "Easy."}}) for i, e in enumerate(examples)]
    done, _ = trained(config.Single(perspective="planning"), some)
    assert done.questions == 4 and done.left_out == {"views": 0, "questions": 2}


# --------------------------------------------------------------- warm-up, parts


def test_warm_up_leaves_the_student_untouched_and_teaches_metanet_the_order_of_the_losses() -> None:
    warm, questions, student = prepared(mind(metanet={"width": 16, "heads": 2, "warmup_epochs": 40}))
    cold, _, _ = prepared(mind(metanet={"width": 16, "heads": 2, "warmup_epochs": 0}))
    before = tiny.model().state_dict()
    assert all(torch.equal(before[name], value) for name, value in student.model.state_dict().items())
    assert all(p.grad is None for p in warm.net.parameters())  # nothing of it leaks into MetaNet's first joint step
    rows = torch.arange(len(questions))
    with torch.no_grad():
        assert float(warm._score(rows)[1].mean()) < 0.5 * float(cold._score(rows)[1].mean())
    torch.testing.assert_close(warm.memory.inertia.filtered, cold.memory.inertia.filtered)


def test_absent_views_get_no_weight_and_no_loss() -> None:
    examples = [e.model_copy(update={"views": dict(list(e.views.items())[i % 3 : 4])}) for i, e in enumerate(tiny.examples(QUESTIONS))]
    done, _ = trained(mind(beta=0), examples)
    assert not any("counterfactual" in name for row in done.history for name in row)
    for row in done.history:
        weights = [value for name, value in row.items() if name.startswith("metanet/weight/")]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
        assert row["metanet/selected"] == len(weights)


def test_the_loss_is_weighted_cross_entropy_and_weighted_divergence_of_all_pairs() -> None:
    """Sections 2 to 4 of the method, written out view by view."""
    method, questions, student = prepared(mind(consistency=0.7, beta=0.5, tau=0.3, tau_student=0.2))
    choice = method._choose(questions[:2])
    for row, question in enumerate(questions[:2]):
        filtered = method.memory.inertia.filtered[question.index]
        by_score, by_loss = (choice.scores[row] / 0.3).softmax(0), (-filtered / 0.3).softmax(0)
        assert float(choice.loss[row]) == pytest.approx(float((by_score * (by_score / by_loss).log()).sum()), rel=1e-4)
    expected = torch.zeros(())
    for row, question in enumerate(questions[:2]):
        kept = choice.scores[row] >= 0.5 * choice.scores[row].max()
        alpha = (choice.scores[row] / 0.2).exp() * kept
        alpha = alpha / alpha.sum()
        outputs = student([question.group()])
        guesses = outputs.answer_logprobs(range(8)).exp()  # (8, A, V)
        expected = expected + (alpha * outputs.ce()).sum()
        for i, j in combinations(range(8), 2):
            middle = (guesses[i] + guesses[j]) / 2
            halves = [(one * (one / middle).log()).sum(-1).mean() / 2 for one in (guesses[i], guesses[j])]
            expected = expected + 0.7 * alpha[i] * alpha[j] * sum(halves)
    method.net.zero_grad()
    torch.testing.assert_close(method.loss(questions[:2], student).total, expected, atol=1e-4, rtol=1e-5)


def test_metanet_steps_by_the_mean_gradient_of_its_questions() -> None:
    method, questions, student = prepared(mind())
    before = [p.detach().clone() for p in method.net.parameters()]
    method.optimizer = torch.optim.SGD(method.net.parameters(), lr=1.0)
    for question in questions[:2]:
        method.loss([question], student)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in method.net.parameters()]
    method.after_step()
    method.after_step()
    for old, new, gradient in zip(before, method.net.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - gradient / 2)


@pytest.mark.parametrize("count", [1, 8])
def test_a_loss_that_is_no_number_is_not_taken_for_an_absent_view(count: int) -> None:
    method, questions, student = prepared(mind(feedback="answer"))
    outputs = student([questions[2].group()])
    outputs.answer_ce[-count:] = float("nan")
    with pytest.raises(MindError, match=f"question '{questions[2].id}'"):
        method.memory.take_in(questions[2:3], [list(questions[2].views)], replace(outputs, answer_ce=outputs.answer_ce.detach()))


def test_student_gradient_does_not_reach_metanet_and_the_other_way_round() -> None:
    method, questions, student = prepared(mind(consistency=1.0))
    terms = method.loss(questions[:2], student)
    own = {name: p.grad.clone() for name, p in method.net.named_parameters() if p.grad is not None}
    assert own and all(p.grad is None for p in student.model.parameters())
    terms.total.backward()
    assert any(p.grad is not None for p in student.model.parameters())
    for name, parameter in method.net.named_parameters():
        if name in own:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, own[name])


def test_metanet_steps_once_in_its_accumulation() -> None:
    method, questions, student = prepared(mind())
    before = [p.detach().clone() for p in method.net.parameters()]
    moved = []
    for question in questions[:4]:
        method.loss([question], student).total.backward()
        method.after_step()
        moved.append(any(not torch.equal(old, p) for old, p in zip(before, method.net.parameters(), strict=True)))
    assert moved == [False, True, True, True]
    assert method.pending == 0


# ------------------------------------------------------- which passes are run


def test_one_pass_and_two_passes_give_the_same_loss_and_gradient() -> None:
    results = []
    for share in (1.0, 0.0):
        method, questions, student = prepared(mind(consistency=1.0, beta=0.97))
        method.share = share
        terms = method.loss(questions[:3], student)
        terms.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])
        results.append((terms, gradient, method.memory.inertia.filtered, student.runs))
    (one, one_gradient, one_filtered, one_runs), (two, two_gradient, two_filtered, two_runs) = results
    assert one_runs == [(24, True)]
    assert two_runs[0] == (24, False) and two_runs[1][1] and 3 <= two_runs[1][0] < 24
    torch.testing.assert_close(one.total, two.total, atol=1e-5, rtol=1e-5)
    assert one.tokens == two.tokens
    torch.testing.assert_close(one_filtered, two_filtered)
    assert float((one_gradient - two_gradient).norm() / one_gradient.norm()) < 1e-5


def test_refresh_runs_all_views_at_every_third_visit_only() -> None:
    method, questions, student = prepared(mind(refresh=3, beta=0.97))
    looked = []
    for _ in range(6):
        student.runs.clear()
        method.share = 0.0
        method.loss(questions[:1], student)
        looked.append((8, False) in student.runs)
        assert student.runs[-1][0] < 8
    assert looked == [False, False, True, False, False, True]  # the warm-up pass was visit 0


def test_between_refreshes_unselected_views_keep_their_filtered_loss() -> None:
    method, questions, student = prepared(mind(refresh=9, beta=0.97, inertia=0.5))
    before = method.memory.inertia.filtered.clone()
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.1)  # the student has moved: a view that is run has another loss
    method.loss(questions[:1], student)
    changed = (method.memory.inertia.filtered != before)[0]
    assert 1 <= int(changed.sum()) < 8
    assert int(changed.sum()) == student.runs[0][0]
    assert (method.memory.inertia.filtered[1:] == before[1:]).all()


@pytest.mark.parametrize("feedback", ["target", "answer"])
def test_feedback_is_the_loss_over_the_whole_target_or_over_the_answer(feedback: str) -> None:
    method, questions, student = prepared(mind(feedback=feedback))
    for question in questions[:2]:
        outputs = student([question.group()])
        for k, response in enumerate(question.views.values()):
            start, end = response.answer if feedback == "answer" else (0, len(response.ids))
            expected = float(outputs.nll[k, start:end].detach().mean())
            assert float(method.memory.inertia.filtered[question.index, k]) == pytest.approx(expected, rel=1e-5)


def test_the_first_steps_take_one_pass_and_a_narrow_choice_soon_takes_two() -> None:
    method, questions, student = prepared(mind(beta=1.0))
    for question in questions * 3:
        method.loss([question], student)
    assert student.runs[0] == (8, True)
    assert student.runs[-2:] == [(8, False), (1, True)]


# --------------------------------------------------------------- what it is for


def test_a_view_that_cannot_be_learnt_loses_weight() -> None:
    """`contrastive` is planted: its characters are shuffled anew for every question, so there is nothing to learn in it."""
    shuffler, examples = random.Random(5), []
    names = ("formal_symbolic", "intuitive", "planning")
    for example in tiny.examples(12):
        text = example.views["planning"]
        noise = "".join(shuffler.sample(text, len(text)))
        examples.append(example.model_copy(update={"views": {**{name: example.views[name] for name in names}, "contrastive": noise}}))
    options = mind(
        inertia=0.5, tau_student=0.3, metanet={"width": 16, "heads": 2, "accumulation": 1, "learning_rate": 5e-3, "warmup_epochs": 2}
    )
    done, _ = trained(
        options, examples, student={"tuning": "full"}, learning_rate=1e-2, epochs=6, questions_per_step=2, schedule="constant"
    )
    weights = [row["metanet/weight/contrastive"] for row in done.history]
    third = len(weights) // 3
    assert sum(weights[-third:]) / third < 0.5 * sum(weights[:third]) / third
    assert sum(weights[-third:]) / third < 0.1
