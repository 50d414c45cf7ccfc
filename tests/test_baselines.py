"""The published methods beside MIND: every property that ../docs/methods.md promises of SbS, MCC, MoDE and EDIT, on tiny random students."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mind import config
from mind.errors import ConfigError, DataError
from mind.methods.base import Method, Setup, Stage, Terms
from mind.methods.edit import CORRECT, MISTAKEN, Edit, Pair, edit_marks
from mind.methods.mcc import Mcc, jaccard, pick_diverse
from mind.methods.mode import Mode, merge, search
from mind.methods.sbs import EXPLAIN, PREDICT, Sbs, Tasks
from mind.methods.single import Single, held_out
from mind.methods.table import build, method_class
from mind.prompts import student_ids
from mind.records import PERSPECTIVES, Example
from mind.students.loading import LoadedStudent, add_adapter, put_adapter
from mind.training.corpus import encode_all
from mind.training.layout import Encoded, Group, Outputs, Response, encode_example, packed, padded
from mind.training.loop import train
from mind.training.losses import symmetric_kl
from tests import tiny
from tests.test_methods import resolved

SETUP = Setup(questions=4, width=32, batch_questions=4, step_questions=4, seed=5)


class Seen:
    """A forward pass on a student with a noisy adapter (at its zero start every adapter is the base), which remembers what it gave."""

    def __init__(self, layout: Any = packed) -> None:
        self.model = noisy(tiny.model())
        self.layout = layout
        self.outputs: list[Outputs] = []

    def __call__(self, groups: Sequence[Group], *, answers_only: bool = False) -> Outputs:
        self.outputs.append(self.layout(self.model, groups, answers_only=answers_only))
        self.outputs[-1].states.retain_grad()
        return self.outputs[-1]


def noisy(model: Any, seed: int = 1) -> Any:
    """With LoRA matrices that are not zero."""
    adapted = add_adapter(model, config.Lora(r=2, alpha=4))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return adapted


def terms(method: Method, examples: Sequence[Example] | None = None, forward: Any = None) -> Terms:
    questions = [method.encode(tiny.tokenizer(), example, i) for i, example in enumerate(examples or tiny.examples(4))]
    return method.loss([question for question in questions if question.views], forward or Seen())


def sbs(**options: Any) -> Sbs:
    return Sbs(config.Sbs.model_validate(options), SETUP)


def mcc(**options: Any) -> Mcc:
    return Mcc(config.Mcc.model_validate(options), SETUP)


def edit(**options: Any) -> Edit:
    return Edit(config.Edit.model_validate(options), SETUP)


# ------------------------------------------------------------------------- SbS


def test_sbs_is_linear_in_the_weight_of_the_label() -> None:
    losses = {a: float(terms(sbs(label_weight=a)).total) for a in (0.0, 0.3, 1.0)}
    assert losses[0.3] == pytest.approx(0.3 * losses[1.0] + 0.7 * losses[0.0], rel=1e-5)


def test_sbs_with_all_weight_on_the_label_does_not_look_at_the_rationale() -> None:
    examples = tiny.examples(2)
    others = [e.model_copy(update={"views": {**e.views, "decomposition": "Something else entirely."}}) for e in examples]
    assert float(terms(sbs(label_weight=1.0), examples).total) == pytest.approx(float(terms(sbs(label_weight=1.0), others).total), abs=1e-6)
    assert float(terms(sbs(label_weight=0.5), examples).total) != pytest.approx(float(terms(sbs(label_weight=0.5), others).total), abs=1e-3)


def test_sbs_predicts_the_answer_and_the_end_alone_and_its_prompts_differ_in_the_marker_only() -> None:
    tokenizer, example = tiny.tokenizer(), tiny.examples(1)[0]
    tasks = sbs().encode(tokenizer, example, 0)
    assert tokenizer.decode(tasks.views["predict"].ids[:-1]) == example.answer
    assert tasks.views["predict"].ids[-1] == tokenizer.eos_token_id
    prompts = [tokenizer.decode(ids) for ids in (tasks.prompt, tasks.explain["decomposition"].prompt)]
    assert prompts[0].replace(PREDICT, "", 1) == prompts[1].replace(EXPLAIN, "", 1) and prompts[0] != prompts[1]


@pytest.mark.parametrize("answers", ["predict", "explain"])
def test_sbs_is_asked_in_the_words_of_its_training(answers: str) -> None:
    tokenizer, example = tiny.tokenizer(), tiny.examples(1)[0]
    options = config.Sbs.model_validate({"answers": answers})
    tasks = sbs().encode(tokenizer, example, 0)
    trained = tasks.prompt if answers == "predict" else tasks.explain["decomposition"].prompt
    assert tuple(student_ids(tokenizer, Sbs.prompt(options, example))) == trained


def test_sbs_does_not_see_padding() -> None:
    assert float(terms(sbs(), forward=Seen(packed)).total) == pytest.approx(float(terms(sbs(), forward=Seen(padded)).total), rel=1e-5)


def test_both_rows_of_sbs_are_one_training() -> None:
    stages = [Sbs.stages(resolved(config.Sbs.model_validate({"answers": answers})))[0] for answers in ("predict", "explain")]
    assert stages[0] == stages[1]


def test_sbs_with_all_views_explains_another_at_every_visit() -> None:
    method = sbs(view="all")
    question = method.encode(tiny.tokenizer(), tiny.examples(1)[0], 0)
    assert isinstance(question, Tasks)
    drawn = [method._pair(question)[1].responses for _ in range(20)]
    assert len(set(drawn)) > 3


def test_sbs_leaves_a_question_out_whose_explanation_is_too_long() -> None:
    tasks = sbs().encode(tiny.tokenizer(), tiny.examples(1)[0], 0)
    assert tasks.up_to(tasks.longest) == tasks
    assert not tasks.up_to(tasks.longest - 1).views


def test_sbs_leaves_a_question_out_whose_answer_is_too_long() -> None:
    example = tiny.examples(1)[0].model_copy(update={"answer": "1" * 300})
    tasks = sbs().encode(tiny.tokenizer(), example, 0)
    assert not tasks.up_to(tasks.longest - 1).views


def test_an_explanation_too_long_for_sbs_is_refused_or_counted() -> None:
    method, examples = sbs(view="all"), tiny.examples(1)
    limit = method.encode(tiny.tokenizer(), examples[0], 0).longest - 1
    with pytest.raises(DataError, match=f"question 'sum-0' has {limit + 1} tokens with its longest view"):
        encode_all(tiny.tokenizer(), method, examples, limit, "refuse")
    found = encode_all(tiny.tokenizer(), method, examples, limit, "drop")
    assert found.left_out == {"views": 1, "questions": 0}
    (kept,) = found.questions
    assert isinstance(kept, Tasks) and len(kept.explain) == 7 and kept.longest <= limit


def test_sbs_leaves_out_a_question_without_an_explanation() -> None:
    one, other = tiny.examples(2)
    found = encode_all(tiny.tokenizer(), sbs(), [one.model_copy(update={"views": {}}), other], 1000, "refuse")
    assert [question.id for question in found.questions] == [other.id]
    assert found.left_out == {"views": 0, "questions": 1}


# ------------------------------------------------------------------------- MCC


def test_mcc_without_consistency_is_plain_cross_entropy() -> None:
    forward = Seen()
    found = float(terms(mcc(consistency=0), forward=forward).total)
    assert found == pytest.approx(float(forward.outputs[0].ce().view(-1, 2).mean(dim=1).sum()), rel=1e-6)


def test_mcc_does_not_care_which_view_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for order in (1, -1):
        forward, method = Seen(), mcc(consistency=1.0)
        monkeypatch.setattr(random.Random, "sample", lambda self, names, count, order=order: sorted(names)[:count][::order])
        loss = terms(method, forward=forward).total
        loss.backward()
        gradients.append([float(loss), *(p.grad for p in forward.model.parameters() if p.grad is not None)])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for one, other in zip(gradients[0][1:], gradients[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_views_that_agree_have_no_divergence_and_no_gradient_from_it() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    same = torch.log_softmax(logits, -1)
    divergence = symmetric_kl(same, same)
    divergence.backward()
    assert float(divergence) == 0 and logits.grad is not None and not logits.grad.any()


def test_mcc_pulls_at_the_rows_that_predict_the_answer_and_at_no_other() -> None:
    forward = Seen()
    method = mcc(consistency=1.0)
    questions = [method.encode(tiny.tokenizer(), example, i) for i, example in enumerate(tiny.examples(2))]
    outputs = forward([question.group(list(question.views)[:2]) for question in questions])
    method._apart(outputs, 0).backward()
    assert outputs.states.grad is not None
    moved = outputs.states.grad.abs().sum(dim=1) > 0
    wanted = torch.zeros_like(moved)
    for view in (0, 1):
        wanted[slice(*outputs.answers[view])] = True
    assert torch.equal(moved, wanted)
    values = [outputs.states[slice(*outputs.answers[view])].shape for view in (0, 1)]
    assert values[0] == values[1]


def test_the_pool_holds_the_views_that_are_least_alike() -> None:
    texts = {"a": "one two three", "b": "one two four", "c": "five six seven", "d": "one two three four", "e": "eight nine"}
    dice = random.Random(0)
    assert set(pick_diverse(texts, 3, dice)) >= {"c", "e"}
    assert pick_diverse(texts, 5, dice) == list(texts)
    assert jaccard(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
    assert len(mcc(pool=4).select(tiny.examples(1)[0])) == 4


def test_a_question_with_one_view_is_left_out_of_mcc() -> None:
    assert not mcc().select(tiny.examples(1, views=1)[0])


def test_mcc_leaves_out_a_question_of_which_one_view_is_short_enough() -> None:
    method, (long, short) = mcc(), tiny.examples(2)
    short = short.model_copy(update={"views": {name: f"{k}." for k, name in enumerate(PERSPECTIVES)}})
    whole = method.encode(tiny.tokenizer(), long, 0)
    shortest, second, *_ = sorted(len(whole.prompt) + len(view.ids) for view in whole.views.values())
    assert len(whole.up_to(second).views) == 2
    found = encode_all(tiny.tokenizer(), method, [long, short], shortest, "drop")
    assert [question.id for question in found.questions] == [short.id]
    assert found.left_out == {"views": 4, "questions": 1}
    method.loss(found.questions, Seen())


def test_the_temperature_of_mcc_softens_both_distributions() -> None:
    def consistency(temperature: float) -> tuple[float, Tensor]:
        """What the method finds for one question, and the two views' logits before their answers: (2, A, V)."""
        forward = Seen()
        (row,) = terms(mcc(temperature=temperature), tiny.examples(1), forward).rows
        (outputs,) = forward.outputs
        return row["train/consistency"], torch.stack([outputs.head(outputs.states[slice(*outputs.answers[view])]) for view in (0, 1)])

    found, logits = consistency(2.0)
    p, q = torch.log_softmax(logits / 2, dim=-1)
    both = F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(p, q, log_target=True, reduction="none")
    assert found == pytest.approx(float(both.sum(dim=-1).mean() / 2), rel=1e-4)
    assert found < 0.9 * consistency(1.0)[0]


# ------------------------------------------------------------------------ MoDE


def adapters(count: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """A student with an adapter, and `count` different values for it."""
    from peft import get_peft_model_state_dict

    found = []
    for seed in range(count):
        model = noisy(tiny.model(), seed)
        found.append({name: value.clone() for name, value in get_peft_model_state_dict(model).items()})
    return model, found


def logits_with(values: dict[str, Tensor], widening: int = 1) -> Tensor:
    model = add_adapter(tiny.model(), config.Lora(r=2, alpha=4), widening)
    put_adapter(model, values)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("mode", ["lorahub", "exact"])
def test_one_expert_alone_is_that_expert_and_none_is_the_base(mode: Any) -> None:
    _, experts = adapters(3)
    widening = 3 if mode == "exact" else 1
    one = logits_with(merge(experts, [0, 1, 0], mode), widening)
    torch.testing.assert_close(one, logits_with(experts[1]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        base = tiny.model()(torch.arange(12)[None]).logits
    torch.testing.assert_close(logits_with(merge(experts, [0, 0, 0], mode), widening), base, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one, base, atol=1e-3)


def test_lorahub_does_not_see_a_sign() -> None:
    _, experts = adapters(3)
    weights = [0.5, -1.5, 2.0]
    plus, minus = (logits_with(merge(experts, [sign * w for w in weights], "lorahub")) for sign in (1, -1))
    torch.testing.assert_close(plus, minus, rtol=1e-5, atol=1e-5)


def test_exact_merging_is_linear_in_the_weights() -> None:
    _, experts = adapters(2)
    name = next(name for name in experts[0] if ".lora_A." in name)

    def change(weights: Sequence[float], mode: Any) -> Tensor:
        mixed = merge(experts, weights, mode)
        return mixed[name.replace("lora_A", "lora_B")] @ mixed[name]

    summed = 2 * change([1, 0], "exact") - 3 * change([0, 1], "exact")
    torch.testing.assert_close(change([2, -3], "exact"), summed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(change([2, -3], "lorahub"), summed, atol=1e-3)


def test_the_search_is_no_worse_than_its_start_stays_in_the_box_and_repeats_itself() -> None:
    tried: list[list[float]] = []

    def score(weights: Sequence[float]) -> float:
        tried.append(list(weights))
        return sum((w - 5) ** 2 for w in weights)

    point, lowest, course = search(score, 3, box=3, trials=60, seed=4)
    assert lowest <= course[0] == 75 and lowest == min(course) and len(course) == 61
    assert all(abs(w) <= 3 for weights in tried for w in weights)
    assert point == pytest.approx([3, 3, 3], abs=0.5)
    again, other = (search(score, 3, box=3, trials=9, seed=seed) for seed in (4, 5))
    assert search(score, 3, box=3, trials=9, seed=4) == again != other


def test_an_expert_learns_in_its_own_adapter_and_never_in_the_base() -> None:
    student = tiny.load()
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    expert = Mode.stages(resolved(config.Mode()))[2]
    train(student, expert.settings, tiny.examples(4), build)
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in student.model.named_parameters()}
    assert any("lora_B" in name and p.any() for name, p in after.items())
    for name, p in before.items():
        assert torch.equal(p, after[name]), name


def test_experts_are_the_single_students_and_their_support_is_trained_on_by_none() -> None:
    stages = Mode.stages(resolved(config.Mode(support=2)))
    assert [stage.name for stage in stages] == list(PERSPECTIVES)
    assert all(stage.fresh and stage.shared for stage in stages)
    examples = tiny.examples(6)
    support = {example.id for example in held_out(examples, 2, seed=17)}
    options = stages[0].settings.method
    assert isinstance(options, config.Single)
    assert len(support) == 2 and not support & {e.id for e in Single.examples(options, examples, seed=17)}
    alone = resolved(config.Single(perspective="formal_symbolic", hold_out=2))
    assert stages[0] == Stage("formal_symbolic", alone, fresh=True, shared=True)
    assert stages[0].settings == Single.stages(alone)[0].settings


def test_experts_without_a_question_to_train_on_are_refused() -> None:
    with pytest.raises(DataError, match="all of 5 questions are held out"):
        Single.examples(config.Single(perspective="socratic", hold_out=5), tiny.examples(5), seed=17)


def mixed(folder: Path, settings: config.Resolved) -> tuple[dict[str, float], Any, list[dict[str, Tensor]]]:
    """What `conclude` says of eight noisy experts and four questions; the student's model then; the experts."""
    from safetensors.torch import save_file

    _, experts = adapters(8)
    parts = []
    for k, expert in enumerate(experts):
        (folder / str(k) / "adapter").mkdir(parents=True)
        save_file(expert, folder / str(k) / "adapter" / "adapter_model.safetensors")
        parts.append(folder / str(k))
    student = LoadedStudent(tiny.model(), tiny.tokenizer(), "tiny")
    return Mode.conclude(student, settings, parts, tiny.examples(4)), student.model, experts


@torch.no_grad()
def nll_by_hand(model: Any, questions: Sequence[Encoded]) -> float:
    """Mean over all tokens of all views, every view run alone."""
    total, count = 0.0, 0
    for question in questions:
        for view in question.views.values():
            ids = torch.tensor([*question.prompt, *view.ids])
            start = len(question.prompt)
            total += float(F.cross_entropy(model(ids[None]).logits[0, start - 1 : -1], ids[start:], reduction="sum"))
            count += len(view.ids)
    return total / count


def held(settings: config.Resolved) -> list[Encoded]:
    """The support of `mixed`."""
    assert isinstance(settings.method, config.Mode)
    support = held_out(tiny.examples(4), settings.method.support, settings.seed)
    return [encode_example(tiny.tokenizer(), example, example.views, 0) for example in support]


@pytest.mark.parametrize("mode", ["lorahub", "exact"])
def test_the_mixture_is_found_on_the_support_and_is_no_worse_than_the_base(tmp_path: Path, mode: Any) -> None:
    settings = resolved(config.Mode(merge=mode, support=2, trials=6), student={"lora": {"r": 2, "alpha": 4}})
    row, model, experts = mixed(tmp_path, settings)
    assert row["mode/objective"] <= row["mode/start"]
    weights = [row[f"mode/weight/{name}"] for name in PERSPECTIVES]
    with torch.no_grad():
        found = model(torch.arange(12)[None]).logits
    torch.testing.assert_close(found, logits_with(merge(experts, weights, mode), 8 if mode == "exact" else 1), rtol=1e-5, atol=1e-5)


def test_the_objective_is_the_mean_nll_of_the_support_and_the_penalty(tmp_path: Path) -> None:
    settings = resolved(config.Mode(support=2, trials=12, l1=0.5), student={"lora": {"r": 2, "alpha": 4}})
    row, model, _ = mixed(tmp_path, settings)
    size = sum(abs(row[f"mode/weight/{name}"]) for name in PERSPECTIVES) / 8
    assert size > 0.1
    assert row["mode/start"] == pytest.approx(nll_by_hand(tiny.model(), held(settings)), rel=1e-5)  # at 0 nothing is added
    assert row["mode/objective"] == pytest.approx(nll_by_hand(model, held(settings)) + 0.5 * size, rel=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["of the settings", "of the student"])
def test_the_mixture_is_weighed_on_no_view_that_training_would_leave_out(
    tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = resolved(config.Mode(support=2, trials=1), student={"lora": {"r": 2, "alpha": 4}})
    whole = held(settings)
    limit = len(whole[0].prompt) + 80
    kept = [question.up_to(limit) for question in whole]
    lost, views = (sum(len(question.views) for question in questions) for questions in (whole, kept))
    assert 0 < views < lost
    if own:
        monkeypatch.setitem(tiny.SHAPE, "max_position_embeddings", limit)
    else:
        settings = settings.model_copy(update={"training": settings.training.model_copy(update={"max_tokens": limit})})
    row, _, _ = mixed(tmp_path, settings)
    assert row["mode/start"] == pytest.approx(nll_by_hand(tiny.model(), kept), rel=1e-5)
    assert f"{lost - views} of {lost} held-out views have more than {limit} tokens" in capsys.readouterr().err


def test_a_mixture_without_a_view_to_weigh_it_on_is_refused(tmp_path: Path) -> None:
    settings = resolved(config.Mode(support=2, trials=1), student={"lora": {"r": 2, "alpha": 4}}, max_tokens=20)
    with pytest.raises(DataError, match="no question is left"):
        mixed(tmp_path, settings)


@pytest.mark.parametrize(("options", "stages"), [(config.Mode(), 8), (config.Edit(), 2)], ids=["mode", "edit"])
def test_a_budget_below_the_number_of_stages_stays_one(options: Any, stages: int) -> None:
    def shares(tokens: int | None) -> list[int | None]:
        return [stage.settings.training.tokens for stage in method_class(options.method).stages(resolved(options, tokens=tokens))]

    for whole, share in ((None, None), (1, 1), (stages - 1, 1), (10 * stages, 10)):
        assert shares(whole) == [share] * stages


def test_full_tuning_has_no_adapters_to_mix() -> None:
    with pytest.raises(ConfigError, match="tuning: lora"):
        Mode.stages(resolved(config.Mode(), student={"tuning": "full"}))


# ------------------------------------------------------------------------ EDIT


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Edit distance, the slow and obvious way."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return distance(a[:-1], b[:-1])
    return 1 + min(distance(a[:-1], b), distance(a, b[:-1]), distance(a[:-1], b[:-1]))


def test_marks_lie_on_a_shortest_edit_path_of_200_random_pairs() -> None:
    dice = random.Random(1)
    for _ in range(200):
        a, b = ([dice.randrange(4) for _ in range(dice.randrange(7))] for _ in range(2))
        marks_a, marks_b = edit_marks(a, b)
        kept_a = [token for token, mark in zip(a, marks_a, strict=True) if not mark]
        kept_b = [token for token, mark in zip(b, marks_b, strict=True) if not mark]
        assert kept_a == kept_b, "what is not marked is common to both"
        # substitutions mark both sides, deletions and insertions one; the fewest operations cover both counts of marks
        assert max(sum(marks_a), sum(marks_b)) <= distance(a, b) <= sum(marks_a) + sum(marks_b)
        assert operations(marks_a, marks_b) == distance(a, b)


def operations(marks_a: Sequence[int], marks_b: Sequence[int]) -> int:
    """Of marks that lie on one path: between two kept tokens, marks of both sides pair up as substitutions."""
    return sum(max(one, other) for one, other in zip(gaps(marks_a), gaps(marks_b), strict=True))


def gaps(marks: Sequence[int]) -> list[int]:
    found = [0]
    for mark in marks:
        if mark:
            found[-1] += 1
        else:
            found.append(0)
    return found


def test_marks_are_zero_on_the_shared_prefix_and_for_equal_texts() -> None:
    assert edit_marks([1, 2, 3], [1, 2, 3]) == ([0, 0, 0], [0, 0, 0])
    assert edit_marks([1, 2, 3, 9], [1, 2, 4, 9]) == ([0, 0, 1, 0], [0, 0, 1, 0])
    assert edit_marks([1, 2, 9], [1, 9]) == ([0, 1, 0], [0, 0])
    assert edit_marks([], [5]) == ([], [1])


def test_equal_texts_give_no_loss_and_no_gradient() -> None:
    examples = [
        e.model_copy(update={"mistake": e.mistake.model_copy(update={"text": e.views[e.mistake.perspective], "answer": e.answer})})
        for e in tiny.examples(2)
        if e.mistake
    ]
    forward = Seen()
    found = terms(edit(), examples, forward)
    found.total.backward()
    assert float(found.total) == 0
    assert all(p.grad is None or not p.grad.any() for p in forward.model.parameters())


def test_edit_on_all_tokens_of_the_correct_side_is_plain_cross_entropy() -> None:
    forward = Seen()
    found = float(terms(edit(alpha=1, gamma=1, beta=0), forward=forward).total)
    assert found == pytest.approx(float(forward.outputs[0].ce()[0::2].sum()), rel=1e-6)


def test_edit_is_linear_in_alpha_and_in_beta() -> None:
    def total(**options: float) -> float:
        return float(terms(edit(**options)).total)

    up, down = total(alpha=1, beta=0), total(alpha=0, beta=1)
    assert total(alpha=3, beta=0.5) == pytest.approx(3 * up + 0.5 * down, rel=1e-4)
    assert up > 0 > down


def test_without_beta_the_mistaken_text_does_not_matter_while_its_marks_stay() -> None:
    method, forward = edit(beta=0), Seen()
    pair = method.encode(tiny.tokenizer(), tiny.examples(1)[0], 0)
    noise = Response(tuple(reversed(pair.views[MISTAKEN].ids)), pair.views[MISTAKEN].answer)
    other = Pair(0, pair.id, pair.prompt, {**pair.views, MISTAKEN: noise}, pair.marks)
    assert float(method.loss([pair], forward).total) == pytest.approx(float(method.loss([other], forward).total), rel=1e-6)


def test_padding_does_not_move_the_loss_of_edit() -> None:
    alone = sum(float(terms(edit(beta=1), [example]).total) for example in tiny.examples(4))
    assert float(terms(edit(beta=1), tiny.examples(4)).total) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(("side", "options"), [(CORRECT, {"alpha": 1, "beta": 0}), (MISTAKEN, {"alpha": 0, "beta": 1})])
def test_a_step_raises_the_correct_key_token_and_lowers_the_mistaken_one(side: str, options: dict[str, float]) -> None:
    method, forward = edit(**options), Seen()
    pair = method.encode(tiny.tokenizer(), tiny.examples(1)[0], 0)
    row = 0 if side == CORRECT else 1
    key = torch.tensor(pair.marks[side], dtype=torch.bool)
    method.loss([pair], forward).total.backward()
    before = forward.outputs[-1].nll[row, : len(key)][key].sum()
    with torch.no_grad():
        for p in forward.model.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad
    after = forward([pair.group([CORRECT, MISTAKEN])]).nll[row, : len(key)][key].sum()
    assert (after < before) if side == CORRECT else (after > before)


def test_a_mistaken_token_beyond_the_ceiling_is_pushed_no_further() -> None:
    forward = Seen()
    found = terms(edit(alpha=0, beta=1, ceiling=1e-9), forward=forward)
    found.total.backward()
    assert float(found.total) == 0
    assert all(p.grad is None or not p.grad.any() for p in forward.model.parameters())


def test_edit_goes_on_from_its_first_stage_with_a_fortieth_of_the_rate() -> None:
    settings = resolved(config.Edit(), learning_rate=4e-4, tokens=1000)
    first, second = Edit.stages(settings)
    assert first.shared and not second.fresh
    assert first.settings.method == config.Single(perspective="copied")
    assert second.settings.training.learning_rate == pytest.approx(1e-5)
    assert first.settings.training.tokens == second.settings.training.tokens == 500


def test_the_first_stage_learns_the_view_that_the_mistake_copies() -> None:
    method = Single(config.Single(perspective="copied"), SETUP)
    for example in tiny.examples(5):
        assert example.mistake and list(method.select(example)) == [example.mistake.perspective]
    without = tiny.examples(1)[0].model_copy(update={"mistake": None})
    assert list(method.select(without)) == ["formal_symbolic"]
    assert not edit().encode(tiny.tokenizer(), without, 0).views


def test_edit_leaves_out_a_pair_of_which_one_text_is_too_long() -> None:
    method, (one, other) = edit(), tiny.examples(2)
    assert one.mistake
    longer = one.model_copy(update={"mistake": one.mistake.model_copy(update={"text": one.mistake.text + " So it is." * 50})})
    limit = method.encode(tiny.tokenizer(), other, 0).longest
    found = encode_all(tiny.tokenizer(), method, [longer, other], limit, "drop")
    assert [question.id for question in found.questions] == [other.id]
    assert found.left_out == {"views": 2, "questions": 1}
    method.loss(found.questions, Seen())
    with pytest.raises(DataError, match=f"question '{one.id}' has"):
        encode_all(tiny.tokenizer(), method, [longer, other], limit, "refuse")


def test_edit_wants_mistakes_before_its_first_stage() -> None:
    without = [example.model_copy(update={"mistake": None}) for example in tiny.examples(3)]
    first = Edit.stages(resolved(config.Edit()))[0].settings.method
    for options in (first, config.Edit()):
        method = method_class(options.method)
        with pytest.raises(DataError, match="synthesis.mistakes: true"):
            method.examples(options, without, seed=17)
        some = [*without, tiny.examples(4)[3]]  # the others are left out, or learnt by another view
        assert list(method.examples(options, some, seed=17)) == some
