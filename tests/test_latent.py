"""mind.latent: each measure against an independent one, then planted and absent clusters, then a real (tiny) student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from mind import latent, separation
from mind.answering import Examinee
from mind.config import Config, Latent, Synthesis
from mind.errors import ConfigError, DataError, StudentError
from mind.grading import split_answer_line
from mind.params import validate
from mind.prompts import student_ids, student_prompt
from mind.records import PERSPECTIVES, Example, Question, Rationale, write_jsonl
from mind.stages import evaluate
from mind.students import decoding
from mind.workspace import Workspace
from tests import tiny

QUESTIONS, VIEWS, WIDTH = 16, len(PERSPECTIVES), 64
GROUPS = np.repeat(np.arange(QUESTIONS), VIEWS)
LABELS = np.tile(np.arange(VIEWS), QUESTIONS)
IDS = [f"q{i}" for i in GROUPS]
NAMES = [PERSPECTIVES[k] for k in LABELS]


def planted(apart: float, seed: int = 0) -> np.ndarray:
    """States of 16 questions x 8 perspectives: a large vector a question, `apart` times one a perspective, noise."""
    random = np.random.default_rng(seed)
    views, questions = random.normal(size=(VIEWS, WIDTH)), random.normal(size=(QUESTIONS, WIDTH))
    return apart * views[LABELS] + 5 * questions[GROUPS] + random.normal(size=(len(GROUPS), WIDTH))


def report(apart: float, seed: int = 0) -> latent.LatentReport:
    return latent.measure(planted(apart, seed), IDS, NAMES, Latent(), seed=17)


@pytest.fixture(scope="module")
def clear() -> latent.LatentReport:
    return report(1.0)


@pytest.fixture(scope="module")
def none() -> latent.LatentReport:
    return report(0.0)


# ------------------------------------------------------------- each measure


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=4, max_size=40))
def test_agreement_is_that_of_sklearn(rows: list[tuple[int, int]]) -> None:
    clusters, labels = map(np.array, zip(*[*rows, (0, 0), (1, 1)], strict=True))  # at least two of both
    found = separation.agreement(separation.contingency(clusters, labels, np.zeros(len(labels), int)))
    assert found["ari"][0] == pytest.approx(adjusted_rand_score(labels, clusters), abs=1e-12)
    assert found["nmi"][0] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-9)
    majority = sum(np.bincount(labels[clusters == c]).max() for c in set(clusters))
    assert found["purity"][0] == pytest.approx(majority / len(labels))
    assert 1 - 1e-12 <= found["components"][0] <= len(set(clusters)) + 1e-9


def test_effective_components_count_equal_ones() -> None:
    for kinds in (1, 3, 8):
        clusters = np.arange(48) % kinds
        table = separation.contingency(clusters, np.arange(48) % 8, np.zeros(48, int))
        assert separation.agreement(table)["components"][0] == pytest.approx(kinds)


def test_tables_of_questions_add_up_to_the_whole_table() -> None:
    clusters = np.random.default_rng(0).integers(0, 5, len(LABELS))
    by_question = separation.contingency(clusters, LABELS, GROUPS)
    assert (by_question.sum(0) == separation.contingency(clusters, LABELS, np.zeros_like(GROUPS))[0]).all()
    assert (by_question.sum((1, 2)) == VIEWS).all()


def test_what_is_said_of_a_question_does_not_count() -> None:
    states = planted(1.0)
    moved = states + 100 * np.random.default_rng(9).normal(size=(QUESTIONS, WIDTH))[GROUPS]
    assert np.allclose(separation.without_question(states, GROUPS), separation.without_question(moved, GROUPS))


def test_rounding_is_not_structure() -> None:
    """Three equal numbers less their mean are not always 0; brought to unit variance, what is left would be as large as any finding."""
    equal = np.repeat(np.random.default_rng(0).normal(size=(QUESTIONS, WIDTH)), 3, axis=0)
    groups = np.repeat(np.arange(QUESTIONS), 3)
    assert (equal != np.add.reduceat(equal, np.arange(0, len(equal), 3))[groups] / 3).any()
    assert not separation.without_question(equal, groups).any()


def test_dimensions_that_never_vary_do_no_harm() -> None:
    states = planted(1.0)
    states[:, 3] = 7.0
    assert np.isfinite(separation.without_question(states, GROUPS)).all()


def test_shuffles_stay_within_a_question() -> None:
    shuffled = separation.shuffle_within(LABELS, GROUPS, np.random.default_rng(0))
    assert shuffled.shape == (separation.PERMUTATIONS, len(LABELS))
    assert (np.sort(shuffled.reshape(-1, QUESTIONS, VIEWS), axis=2) == np.arange(VIEWS)).all()
    assert len({tuple(row) for row in shuffled}) == separation.PERMUTATIONS


def test_variance_falls_to_what_was_planted() -> None:
    random = np.random.default_rng(0)
    of_question, of_view = random.normal(size=(QUESTIONS, 500)), random.normal(size=(VIEWS, 500))
    shares = separation.variance_shares(
        3 * of_question[GROUPS] + 2 * of_view[LABELS] + random.normal(size=(len(GROUPS), 500)), GROUPS, LABELS
    )
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["question"] == pytest.approx(9 / 14, abs=0.05)
    assert shares["perspective"] == pytest.approx(4 / 14, abs=0.05)
    assert separation.variance_shares(np.ones((len(GROUPS), 4)), GROUPS, LABELS) == {"question": 0, "perspective": 0, "rest": 1}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50))
def test_cka_sees_geometry_not_axes(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    states = random.normal(size=(30, 12))
    turn, _ = np.linalg.qr(random.normal(size=(12, 12)))
    assert separation.cka(states, scale * states @ turn + 3) == pytest.approx(1)
    other = random.normal(size=(30, 7))
    assert separation.cka(states, other) == pytest.approx(separation.cka(other, states))


def test_cka_of_unrelated_states_is_about_zero_in_many_dimensions() -> None:
    """The plain estimate is near 0.8 here."""
    random = np.random.default_rng(0)
    values = [separation.cka(random.normal(size=(48, 200)), random.normal(size=(48, 200))) for _ in range(20)]
    assert abs(np.mean(values)) < 0.02
    mixed = random.normal(size=(48, 200))
    assert 0.2 < separation.cka(mixed, mixed + random.normal(size=(48, 200))) < 0.8


# ------------------------------------------------- planted and absent clusters


def test_planted_perspectives_are_found(clear: latent.LatentReport) -> None:
    assert clear.components.value == pytest.approx(8, abs=1)
    assert clear.components.chance < 3
    assert clear.ari.value > 0.9 and clear.nmi.value > 0.9 and clear.purity.value > 0.9
    assert clear.silhouette.value > 0.2
    assert all(m.p < 0.01 for m in (clear.ari, clear.nmi, clear.purity, clear.silhouette))
    assert "separate almost perfectly" in clear.sentence


def test_absent_perspectives_are_not(none: latent.LatentReport) -> None:
    assert abs(none.ari.value) < 0.05
    assert none.silhouette.value < 0.02
    assert "cannot be told apart" in none.sentence
    assert none.components.value < 3


def test_chance_is_where_absent_perspectives_lie(clear: latent.LatentReport, none: latent.LatentReport) -> None:
    for name in ("ari", "nmi", "purity", "silhouette"):
        chance = getattr(none, name)
        assert chance.value == pytest.approx(chance.chance, abs=0.05)
    assert clear.ari.chance == pytest.approx(0, abs=0.02)
    assert clear.purity.chance > 1 / VIEWS  # a majority is found in any cluster: purity without its baseline misleads


def test_intervals_hold_their_value_and_narrow_with_agreement(clear: latent.LatentReport) -> None:
    """The weaker case has views missing, as where a judge dropped some."""
    kept = np.random.default_rng(0).random(len(LABELS)) < 0.8
    kept[::VIEWS] = kept[1::VIEWS] = True
    states, ids, names = planted(0.6)[kept], np.array(IDS)[kept].tolist(), np.array(NAMES)[kept].tolist()
    weaker = latent.measure(states, ids, names, Latent(), seed=17)
    for found in (clear, weaker):
        for measure in (found.components, found.ari, found.nmi, found.purity, found.silhouette):
            assert measure.low <= measure.value <= measure.high
    assert clear.ari.value > weaker.ari.value > weaker.ari.chance
    assert clear.ari.high - clear.ari.low < weaker.ari.high - weaker.ari.low


def test_silhouette_interval_holds_the_mean_of_many_questions() -> None:
    """Against 2000 questions whose reduction and centres are known: 16 of them at a time, intervals hold it nine times in ten or more."""
    random = np.random.default_rng(3)
    per_question = random.normal(0.2, 0.1, size=(100, QUESTIONS))
    held = 0
    for row in per_question:
        draws = random.multinomial(QUESTIONS, np.full(QUESTIONS, 1 / QUESTIONS), size=500)
        low, high = np.quantile(separation.means(np.repeat(row, VIEWS), GROUPS, draws), [0.025, 0.975])
        held += low <= 0.2 <= high
    assert held >= 88


def test_the_same_seed_gives_the_same_report(none: latent.LatentReport) -> None:
    again = report(0.0)
    assert again.metrics() == none.metrics()
    assert (again.map.coordinates == none.map.coordinates).all()


def test_states_that_are_all_the_same_are_reported_not_fatal() -> None:
    flat = latent.measure(np.ones((32, 8)), IDS[:32], NAMES[:32], Latent(), seed=1)
    assert flat.ari.value == pytest.approx(0, abs=1e-9)
    assert "cannot be told apart" in flat.sentence


def test_as_many_perspectives_as_rationales_are_refused_with_what_to_do() -> None:
    """Four questions with two views each, no perspective twice: no rationale has another of its kind."""
    ids, names = [f"q{i // 2}" for i in range(8)], list(PERSPECTIVES)
    with pytest.raises(DataError, match="8 rationales of 8 perspectives") as caught:
        latent.measure(planted(1.0)[:8], ids, names, Latent(), seed=1)
    assert "more rationales" in caught.value.wanted and "latent.questions" in caught.value.do
    found = latent.measure(planted(1.0)[:8], ids, [*names[:7], names[0]], Latent(), seed=1)  # one of them twice is enough to go on
    assert np.isfinite([found.ari.value, found.nmi.value, found.silhouette.value]).all()


def test_metrics_are_plain_numbers_and_words(clear: latent.LatentReport) -> None:
    metrics = json.loads(json.dumps(clear.metrics(), allow_nan=False))
    assert set(metrics["ari"]) == {"value", "low", "high", "chance", "p"}
    assert (metrics["questions"], metrics["rationales"]) == (16, 128)


# --------------------------------------------------------- beside the base


def test_a_student_has_not_moved_from_itself(clear: latent.LatentReport) -> None:
    change = latent.against(clear.map, clear.map)
    assert (change.silhouette, change.low, change.high) == (0, 0, 0)
    assert change.drift == pytest.approx(0, abs=1e-9)
    assert change.sentence("mind", "base").startswith("No difference between mind and base was seen in how separable the perspectives are")


def test_an_interval_that_holds_zero_is_no_equality() -> None:
    said = latent.Change(0.20, -0.01, 0.41, 0.1).sentence("mind", "base")
    assert "No difference" in said and "was seen" in said and "silhouette +0.20, 95 % interval -0.01 to +0.41" in said
    assert "as separable as" not in said


def test_more_and_less_separable_are_told_apart(clear: latent.LatentReport, none: latent.LatentReport) -> None:
    assert "more separable than" in latent.against(clear.map, none.map).sentence("mind", "base")
    assert "less separable than" in latent.against(none.map, clear.map).sentence("mind", "base")
    assert 0 < latent.against(clear.map, none.map).drift < 1


def test_maps_of_other_rationales_are_refused(clear: latent.LatentReport) -> None:
    other = replace(clear.map, questions=("another", *clear.map.questions[1:]))
    with pytest.raises(DataError, match="different rationales"):
        latent.against(clear.map, other)


def test_a_map_is_read_as_it_was_written(clear: latent.LatentReport, tmp_path: Path) -> None:
    clear.map.write(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in (latent.MAP, latent.STATES)]
    found = latent.read_map(tmp_path)
    assert found is not None
    assert (found.questions, found.perspectives) == (clear.map.questions, clear.map.perspectives)
    assert (found.clusters == clear.map.clusters).all()
    assert np.allclose(found.coordinates, clear.map.coordinates, atol=1e-3)
    assert latent.against(found, clear.map).drift < 1e-4
    clear.map.write(tmp_path)
    assert first == [(tmp_path / name).read_bytes() for name in (latent.MAP, latent.STATES)]


def test_a_missing_map_is_none_and_a_damaged_one_an_error(clear: latent.LatentReport, tmp_path: Path) -> None:
    assert latent.read_map(tmp_path) is None
    clear.map.write(tmp_path)
    (tmp_path / latent.MAP).write_text("question,perspective\nq1,intuitive\n")
    with pytest.raises(DataError, match="damaged"):
        latent.read_map(tmp_path)


# ------------------------------------------------------------- held out


def workspace(folder: Path, asked: list[Example], trained: list[Example], dropped: tuple[str, ...] = ()) -> Workspace:
    """A workspace whose judge accepted all views of `asked` except the questions in `dropped`."""
    made = Workspace(folder)
    made.rationales.mkdir()
    made.dataset.mkdir()
    write_jsonl(made.rationales / "questions.jsonl", [Question(id=e.id, question=e.question, answer=e.answer) for e in asked])
    rows = [
        Rationale(question_id=e.id, perspective=name, text=text, answer=e.answer, accepted=e.id not in dropped)
        for e in asked
        for name, text in reversed(e.views.items())
    ]
    write_jsonl(made.rationales / "rationales.jsonl", rows)
    write_jsonl(made.dataset / "train.jsonl", trained)
    return made


def test_what_the_snapshot_left_out_is_held_out(tmp_path: Path) -> None:
    asked = tiny.examples(12)
    made = workspace(tmp_path, asked, trained=asked[:5], dropped=("sum-11",))
    found = latent.held_out_examples(made, Config(latent=Latent(questions=6)))
    assert {example.id for example in found} == {f"sum-{i}" for i in range(5, 11)}
    assert all(tuple(example.views) == PERSPECTIVES for example in found)
    fewer = latent.held_out_examples(made, Config(latent=Latent(questions=4)))
    assert fewer == found[:4]


def test_the_starter_corpus_stands_in_without_what_was_trained_on(tmp_path: Path) -> None:
    from mind.teacher.recorded import starter_corpus

    entries = [entry for entry in starter_corpus().entries if entry.id.startswith("primer")][:200]
    trained = [
        Example(id=f"mine-{e.id}", question=f" {e.question.upper()}", answer=e.answer, difficulty=0, views=e.rationales) for e in entries
    ]
    made = workspace(tmp_path, tiny.examples(3), trained)
    found = latent.held_out_examples(made, Config(latent=Latent(questions=24)))
    assert len(found) == 24
    assert not {e.question for e in entries} & {example.question for example in found}
    assert sum(example.id.startswith("primer") for example in found) == 16  # all 16 that are left of the set, then the other set
    elsewhere = Config(latent=Latent(questions=24), synthesis=Synthesis(questions="full"))
    assert all(example.id.startswith("starter") for example in latent.held_out_examples(made, elsewhere))


def test_missing_rationales_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train.jsonl"):
        latent.held_out_examples(Workspace(tmp_path), Config())


@pytest.mark.parametrize("questions", [1, 3, -1])
def test_too_few_questions_are_refused_in_the_settings(questions: int) -> None:
    with pytest.raises(ConfigError, match="latent.questions"):
        validate({"latent": {"questions": questions}})


# ---------------------------------------------------------------- a student


def ask(example: Example) -> str:
    return student_prompt(example.question, example.kind, example.choices)


def test_states_are_those_of_each_rationale_alone() -> None:
    student = tiny.load()
    examples = tiny.examples(3, views=4)
    found = latent.hidden_states(student.model, student.tokenizer, examples, ask)
    row = 0
    for example in examples:
        prompt = student_ids(student.tokenizer, student_prompt(example.question))
        for text in example.views.values():
            ids = student.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                hidden = student.model.model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) :]
            assert np.allclose(found[row], hidden.mean(0).numpy(), atol=1e-4)
            row += 1
    assert row == len(found)


def test_a_student_is_analysed() -> None:
    """The rationales of `tiny` differ by perspective in nothing but a phrase said k times, the same for all questions."""
    student, examples = tiny.load(), tiny.examples(6)
    found = latent.analyse(student.model, student.tokenizer, examples, ask, Latent(), seed=5)
    assert (found.map.states == latent.hidden_states(student.model, student.tokenizer, examples, ask)).all()
    assert found.map.questions == tuple(e.id for e in examples for _ in e.views)
    assert found.map.perspectives == PERSPECTIVES * 6
    assert found.silhouette.value > 0.15 and found.silhouette.p < 0.05


def test_an_accelerator_without_float64_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's MPS knows none: its states must be on the CPU before they are widened."""

    class OnMps:
        def __init__(self, states: torch.Tensor) -> None:
            self.cpu = lambda: states

        def double(self) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    student, examples = tiny.load(), tiny.examples(1)
    states = torch.randn(len(examples[0].views), 4)
    monkeypatch.setattr("mind.training.layout.view_states", lambda model, group: OnMps(states))
    assert (latent.hidden_states(student.model, student.tokenizer, examples, ask) == states.double().numpy()).all()


def test_a_student_that_diverged_is_an_error() -> None:
    student = tiny.load()
    student.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(StudentError, match="not finite"):
        latent.analyse(student.model, student.tokenizer, tiny.examples(4), ask, Latent(), seed=5)


def test_too_few_rationales_are_an_error_that_says_what_to_do() -> None:
    student = tiny.load()
    with pytest.raises(DataError, match=r"latent\.questions"):
        latent.analyse(student.model, student.tokenizer, tiny.examples(6, views=1), ask, Latent(), seed=5)


# ---------------------------------------------------------------- beside others, and in its own words


def test_against_several_is_against_their_mean(clear: latent.LatentReport, none: latent.LatentReport) -> None:
    one = latent.against(clear.map, none.map)
    assert latent.against_several(clear.map, [none.map]) == one
    both = latent.against_several(clear.map, [none.map, clear.map])
    assert both.silhouette == pytest.approx(one.silhouette / 2) and both.drift == pytest.approx(one.drift / 2, abs=1e-6)


class Letters:
    """An encoder that tells texts apart by how often each letter stands in them."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.tensor([[text.count(letter) for letter in "abcdefgh"] for text in texts], dtype=torch.float32)
        return torch.nn.functional.normalize(counts, dim=-1)


def spoken(count: int = 12) -> list[Example]:
    views = {name: letter * 9 for name, letter in zip(PERSPECTIVES, "abcdefgh", strict=True)}
    return [Example(id=f"q{i}", question="?", answer="1", difficulty=0, views=views) for i in range(count)]


def words(examples: list[Example], texts: list[str]) -> latent.OwnWords:
    encoder: Any = Letters()
    return latent.own_words(examples, latent.own_texts(examples, texts, encoder), encoder, seed=1)


def test_a_student_of_one_perspective_speaks_like_it() -> None:
    found = words(spoken(), ["ccb\nThe answer is aaaaaaa."] * 12)  # the answer line has no part in it
    assert found.nearest[PERSPECTIVES[2]] == 1 and found.kinds == pytest.approx(1) and found.p < 0.01
    assert PERSPECTIVES[2] in found.sentence and found.low < 1 <= found.high
    assert 1 / 8 < found.chance < 0.5  # the largest of eight shares is above 1/8 by chance


def test_a_student_of_all_perspectives_speaks_like_none() -> None:
    found = words(spoken(16), [letter * 3 for letter in "abcdefgh" * 2])
    assert found.kinds == pytest.approx(8) and found.p > 0.9 and "no perspective in particular" in found.sentence
    assert json.loads(json.dumps(found.metrics()))["nearest"][PERSPECTIVES[0]] == 1 / 8


def wrote(letter: str, questions: int = 12) -> latent.OwnTexts:
    """A student that reasons with one letter most of the time, on top of what each question makes all say."""
    random = np.random.default_rng(ord(letter))
    texts = ["abcdefgh"[q % 8] * 6 + letter * 4 + "".join(random.choice(list("abcdefgh"), 2)) for q in range(questions)]
    encoder: Any = Letters()
    return latent.own_texts(spoken(questions), texts, encoder)


def test_students_that_write_each_in_their_way_lie_apart() -> None:
    found = latent.measure_writers({f"single-{letter}": wrote(letter) for letter in "bdg"}, Latent(), seed=1)
    assert found.ari.value > 0.5 and found.ari.p < 0.01 and found.silhouette.value > 0.2
    assert found.describe("students").startswith("The 3 students separate")
    assert found.metrics("students")["rationales"] == 36 and "students" in found.metrics("students")["sentence"]


def test_students_that_write_the_same_cannot_be_told_apart() -> None:
    """Rounding sets equal texts of two students apart, as their neighbours in a batch differ; it must not count."""
    one = wrote("b")
    other = replace(one, features=one.features * (1 + 1e-7 * np.random.default_rng(0).normal(size=one.features.shape)))
    found = latent.measure_writers({"single-a": one, "single-b": other, "single-c": one}, Latent(), seed=1)
    assert found.ari.value == pytest.approx(0, abs=1e-9) and found.components.value == pytest.approx(1)
    assert "The 3 students cannot be told apart" in found.describe("students")


@pytest.mark.parametrize("other", [{"encoder": "another"}, {"questions": ("x",) * 12}])
def test_texts_on_other_questions_or_of_other_encoders_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="other questions, or read by other encoders"):
        latent.measure_writers({"one": wrote("b"), "two": replace(wrote("d"), **other)}, Latent(), seed=1)


def test_texts_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert latent.read_texts(tmp_path) is None
    kept = wrote("b")
    kept.write(tmp_path)
    found = latent.read_texts(tmp_path)
    assert found is not None and (found.questions, found.texts, found.encoder) == (kept.questions, kept.texts, kept.encoder)
    assert np.allclose(found.features, kept.features, atol=1e-6)
    np.save(tmp_path / latent.FEATURES, np.ones((3, 8)))
    with pytest.raises(DataError, match=r"own_words.npy holds \(3, 8\) for 12 texts"):
        latent.read_texts(tmp_path)
    (tmp_path / latent.FEATURES).write_bytes(b"no array")
    with pytest.raises(DataError, match="damaged"):
        latent.read_texts(tmp_path)


def test_evaluate_asks_the_student_the_held_out_questions_and_keeps_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tiny.save(tmp_path / "tiny")
    config = validate(
        {"student": {"name": str(name)}, "evaluation": {"max_new_tokens": 12, "samples": 3}, "latent": {"encoder": "letters"}}
    )
    made = Workspace(tmp_path)
    made.student("base").mkdir(parents=True)
    made.report("base").mkdir(parents=True)
    asked: list[str] = []
    monkeypatch.setattr(evaluate, "load_encoder", lambda name: asked.append(name) or Letters())
    who = Examinee("base", config.variant("base").method, config.student, made.student("base"))
    examples = tiny.examples(4)
    found = evaluate._own_words(examples, who, config, made, made.report("base"))
    assert asked == ["letters"]
    assert (found.questions, found.encoder) == (4, "letters") and sum(found.nearest.values()) == pytest.approx(1)
    kept = latent.read_texts(made.report("base"))
    assert kept is not None and kept.questions == tuple(example.id for example in examples) and any(kept.texts)
    prompts = [student_ids(who.student.tokenizer, who.ask(example)) for example in examples]
    likely = decoding.generate(who.student.model, who.student.tokenizer, prompts, max_new_tokens=12, batch_tokens=4096)
    assert kept.texts == tuple(split_answer_line(one.text)[0] for one in likely)  # one answer, whatever evaluation.samples is
    again: list[int] = []
    monkeypatch.setattr(decoding, "generate", lambda model, tokenizer, prompts, **_: again.append(len(prompts)))
    assert evaluate._own_words(examples, who, config, made, made.report("base")) == found
    assert again == [0]  # what was answered is kept: nothing is generated twice
