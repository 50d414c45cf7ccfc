"""A student and held-out rationales -> do the perspectives lie apart in its hidden states? Called by stages.evaluate and `mind compare`.

What is clustered is the mean last hidden state of a rationale's tokens, given its question. Such states are first of all about the
question (in SmolLM2-135M no mixture sees the perspectives through it), so the mean over a question's rationales is taken away, each
dimension is brought to unit variance, and the first principal components are left. On them a Dirichlet-process mixture says how many
kinds of rationale there are without being told, and the measures say how well these kinds are the perspectives. docs/latent.md
explains every number.

Letters: N rationales, Q questions, P perspectives, C components of the mixture, D draws, H width.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mind import config
from mind.errors import DataError, StudentError
from mind.grading import split_answer_line
from mind.outputs import digest_bytes
from mind.progress import bar
from mind.prompts import student_ids
from mind.records import PERSPECTIVES, Example, Question, Rationale, Record, read_jsonl, read_questions, write_jsonl
from mind.separation import (
    Array,
    Ints,
    Measure,
    agreement,
    cka,
    columns_shuffled,
    contingency,
    entropy,
    lay_out,
    means,
    measured,
    mixture,
    reduce,
    shuffle_within,
    silhouettes,
    variance_shares,
    without_question,
)
from mind.statistics import wilson
from mind.workspace import Workspace

if TYPE_CHECKING:
    from mind.encoder import Encoder

FEWEST_QUESTIONS = 4
BOOTSTRAPS = 1000  # resamples of the questions behind an interval
DRAWN = 1000  # questions given a perspective by lot: the chance level of the largest share
REFITS = 19  # mixtures fitted to structureless points: the chance level of the number of components
MAP, STATES = "latent.csv", "latent.npy"
TEXTS, FEATURES = "own_words.jsonl", "own_words.npy"


@dataclass(frozen=True)
class LatentMap:
    """The rationales in the student's latent space; rows of all fields belong together, those of a question are neighbours."""

    questions: tuple[str, ...]  # (N,) ids
    perspectives: tuple[str, ...]  # (N,)
    states: Array  # (N, H) mean last hidden states
    clusters: Ints  # (N,) component of the mixture
    silhouettes: Array  # (N,) in [-1, 1]: nearer to its own perspective (1) or to another one (-1)
    coordinates: Array  # (N, 2) t-SNE; only who is near whom means something

    def write(self, folder: Path) -> None:
        """Leave `latent.csv` (one row a rationale) and `latent.npy` (states, float16) in a report."""
        with (folder / MAP).open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["question", "perspective", "cluster", "silhouette", "x", "y"])
            for q, p, c, s, (x, y) in zip(
                self.questions, self.perspectives, self.clusters, self.silhouettes, self.coordinates, strict=True
            ):
                rows.writerow([q, p, c, f"{s:.5f}", f"{x:.4f}", f"{y:.4f}"])
        np.save(folder / STATES, self.states.astype(np.float16))


@dataclass(frozen=True)
class LatentReport:
    map: LatentMap
    components: Measure  # effective number of components: exp of the entropy of their shares
    ari: Measure  # adjusted Rand index of components and perspectives
    nmi: Measure  # normalised mutual information of the same
    purity: Measure  # share of rationales in a component that is mostly of their own perspective
    silhouette: Measure  # mean silhouette of the perspectives, without the mixture
    variance: Mapping[str, float]  # shares of the states' variance: question, perspective, rest

    @property
    def sentence(self) -> str:
        return self.describe("perspectives")

    def describe(self, kinds: str) -> str:
        """The finding in one sentence; `kinds`: what the labels are."""
        return _describe(self, kinds)

    def metrics(self, kinds: str = "perspectives") -> dict[str, Any]:
        """The group `latent` of metrics.json."""
        measures = {name: getattr(self, name) for name in ("components", "ari", "nmi", "purity", "silhouette")}
        return {
            "questions": len(set(self.map.questions)),
            "rationales": len(self.map.questions),
            **{name: {key: round(value, 5) for key, value in vars(measure).items()} for name, measure in measures.items()},
            "variance": {name: round(share, 5) for name, share in self.variance.items()},
            "sentence": self.describe(kinds),
        }


@dataclass(frozen=True)
class Change:
    """A student's latent space beside that of another one (as a rule the base student), on the same rationales."""

    silhouette: float  # difference of the mean silhouettes
    low: float  # its 95 % interval, paired bootstrap over questions
    high: float
    drift: float  # 1 - CKA: 0 the same geometry, 1 nothing in common

    def sentence(self, variant: str, base: str) -> str:
        span = f"silhouette {self.silhouette:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f}"
        drifted = f"the geometry has drifted by {self.drift:.2f} (1 - CKA)"
        if self.low <= 0 <= self.high:  # not "as separable as": an interval that holds 0 says nothing of being equal
            return f"No difference between {variant} and {base} was seen in how separable the perspectives are ({span}); {drifted}."
        said = "more" if self.low > 0 else "less"
        return f"In {variant} the perspectives are {said} separable than in {base} ({span}); {drifted}."


class OwnText(Record):
    """A row of own_words.jsonl: what a student wrote on a held-out question, without the answer line."""

    question: str
    text: str
    encoder: str


@dataclass(frozen=True)
class OwnTexts:
    """A student's own reasoning on the held-out questions, as a sentence encoder sees it."""

    questions: tuple[str, ...]  # (Q,) ids
    texts: tuple[str, ...]  # (Q,)
    features: Array  # (Q, E)
    encoder: str  # its identity: features of another one are not comparable

    def write(self, folder: Path) -> None:
        """Leave `own_words.jsonl` and `own_words.npy` (float32, same rows) in a report."""
        rows = zip(self.questions, self.texts, strict=True)
        write_jsonl(folder / TEXTS, [OwnText(question=question, text=text, encoder=self.encoder) for question, text in rows])
        np.save(folder / FEATURES, self.features.astype(np.float32))


@dataclass(frozen=True)
class OwnWords:
    """Which perspective's rationale a student's own reasoning is nearest to, question by question, in the eyes of a sentence encoder."""

    nearest: Mapping[str, float]  # perspective -> share of the questions
    kinds: float  # effective number of perspectives: exp of the entropy of these shares
    low: float  # 95 % interval of the largest share
    high: float
    chance: float  # the largest share when the nearest perspective is any, each as likely
    p: float
    questions: int
    encoder: str

    @property
    def sentence(self) -> str:
        name = max(self.nearest, key=self.nearest.__getitem__)
        where = f"Its own reasoning on {self.questions} held-out questions is nearest to"
        if self.p >= SIGNIFICANT:
            return f"{where} no perspective in particular (p = {self.p:.2f})."
        span = f"95 % interval {self.low:.0%} to {self.high:.0%}, chance {self.chance:.0%}"
        return f"{where} the {name.replace('_', ' ')} rationale in {self.nearest[name]:.0%} ({span}); {self.kinds:.1f} kinds in all."

    def metrics(self) -> dict[str, Any]:
        return {**vars(self), "nearest": dict(self.nearest), "sentence": self.sentence}


# ---------------------------------------------------------------- rationales


def held_out_examples(workspace: Workspace, settings: config.Config) -> list[Example]:
    """Rationales that the student was not trained on, `latent.questions` questions of them.

    Taken from what the judge accepted and the snapshot left out. Where that is too little, from the recorded starter corpus that is
    in the package, so that the analysis never needs a network: first from the set that was trained on (primer or full), then from
    the other. Which questions are taken depends on nothing but their ids.

    Raises:
        DataError: rationales/ or dataset/ is missing or malformed.
    """
    wanted = settings.latent.questions
    training = list(read_jsonl(workspace.dataset / "train.jsonl", Example))
    left = _left_out(workspace, {example.id for example in training})
    if len(left) >= wanted:
        return sorted(left, key=lambda example: (-len(example.views), _lot(example)))[:wanted]
    return _starter(settings, {_plain(example.question) for example in training})[:wanted]


def _left_out(workspace: Workspace, trained: set[str]) -> list[Example]:
    """Questions with two accepted views or more that are not in the dataset."""
    views: dict[str, dict[str, str]] = {}
    for row in read_jsonl(workspace.rationales / "rationales.jsonl", Rationale):
        if row.accepted and row.question_id not in trained:
            views.setdefault(row.question_id, {})[row.perspective] = row.text
    questions = read_questions(workspace.rationales / "questions.jsonl")
    return [_example(question, views[question.id]) for question in questions if len(views.get(question.id, ())) > 1]


def _starter(settings: config.Config, trained: set[str]) -> list[Example]:
    from mind.teacher.recorded import starter_corpus  # late: only who has nothing else held out needs the corpus

    entries = [entry for entry in starter_corpus().entries if _plain(entry.question) not in trained]
    primer = settings.synthesis.questions == "primer"
    examples = [_example(Question(id=e.id, question=e.question, answer=e.answer), e.rationales) for e in entries]
    return sorted(examples, key=lambda example: (example.id.startswith("primer") != primer, _lot(example)))


def _example(question: Question, views: Mapping[str, str]) -> Example:
    ordered = {name: views[name] for name in PERSPECTIVES if name in views}
    return Example(**question.model_dump(exclude={"difficulty"}), difficulty=0, views=ordered)  # difficulty: the analysis has no use for it


def _lot(example: Example) -> str:
    return digest_bytes(example.id.encode())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# ------------------------------------------------------------------ analysis


def analyse(
    model: Any, tokenizer: Any, examples: Sequence[Example], ask: Callable[[Example], str], settings: config.Latent, seed: int
) -> LatentReport:
    """Hidden states of the examples' rationales, clustered, measured and laid out. The same seed gives the same report.

    Args:
        ask: the prompt of a question, as the student's method words it.

    Raises:
        DataError: too few questions with two views or more to tell anything.
        StudentError: hidden states that are not finite, the mark of a training that diverged.
    """
    examples = [example for example in examples if len(example.views) > 1]
    if len(examples) < FEWEST_QUESTIONS:
        raise DataError(
            f"latent analysis: {len(examples)} held-out questions with two perspectives or more",
            wanted=f"at least {FEWEST_QUESTIONS}",
            do="raise latent.questions, or set it to 0 to skip the analysis",
        )
    states = hidden_states(model, tokenizer, examples, ask)
    if not np.isfinite(states).all():
        raise StudentError("the student's hidden states are not finite", do="lower training.learning_rate and distill again")
    rows = [(example.id, name) for example in examples for name in example.views]
    questions, perspectives = zip(*rows, strict=True)
    return measure(states, questions, perspectives, settings, seed)


def hidden_states(model: Any, tokenizer: Any, examples: Sequence[Example], ask: Callable[[Example], str]) -> Array:
    """Mean last hidden state over each rationale's tokens, its question before it: (N, H), example by example, view by view."""
    import torch

    from mind.training.layout import Group, Response, view_states

    model.eval()
    found = []
    with torch.inference_mode(), bar("latent analysis", len(examples), "questions") as shown:
        for example in examples:
            prompt = student_ids(tokenizer, ask(example))
            bodies = [tokenizer(text.strip(), add_special_tokens=False)["input_ids"] for text in example.views.values()]
            ended = [Response((*ids, tokenizer.eos_token_id), (len(ids), len(ids))) for ids in bodies]  # a view's last token is never fed
            found.append(view_states(model, Group(tuple(prompt), tuple(ended))).cpu().double().numpy())  # Apple's GPUs know no float64
            shown.advance()
    return np.concatenate(found)


def measure(states: Array, questions: Sequence[str], perspectives: Sequence[str], settings: config.Latent, seed: int) -> LatentReport:
    """The whole analysis of given states.

    Args:
        states: (N, H); rows of a question stand together.
        questions, perspectives: (N,) what each row is. The perspectives may be labels of any kind, such as who wrote a text.

    Raises:
        DataError: as many perspectives as rationales: no two of a kind whose nearness could be told.
    """
    assert len(states) == len(questions) == len(perspectives), (states.shape, len(questions), len(perspectives))
    names = list(dict.fromkeys(perspectives))
    if len(names) == len(states):
        raise DataError(
            f"latent analysis: {len(states)} rationales of {len(names)} perspectives, none of them twice",
            wanted="more rationales than perspectives",
            do="raise latent.questions, or set it to 0 to skip the analysis",
        )
    labels = np.array([names.index(name) for name in perspectives])  # (N,)
    places = {question: place for place, question in enumerate(dict.fromkeys(questions))}
    groups = np.array([places[question] for question in questions])  # (N,) ascending
    random = np.random.default_rng(seed)

    points = reduce(without_question(states, groups), settings.pca)
    clusters = mixture(points, settings.components, seed)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))  # (N, N)
    near = silhouettes(distances, labels)

    draws = random.multinomial(len(places), np.full(len(places), 1 / len(places)), size=BOOTSTRAPS)  # (D, Q): the questions of a resample
    shuffled = shuffle_within(labels, groups, random)  # (D, N)
    tables = contingency(clusters, labels, groups)  # (Q, C, P)
    found = agreement(tables.sum(0)[None])
    resampled = agreement(np.einsum("dq,qcp->dcp", draws, tables))
    by_chance = agreement(np.stack([contingency(clusters, other, np.zeros_like(groups))[0] for other in shuffled]))
    measures = {name: measured(found[name][0], resampled[name], by_chance[name]) for name in ("ari", "nmi", "purity")}
    refits = [mixture(columns_shuffled(points, random), settings.components, seed) for _ in range(REFITS)]
    structureless = [np.exp(entropy(np.bincount(refit).astype(float))) for refit in refits]
    return LatentReport(
        map=LatentMap(tuple(questions), tuple(perspectives), states, clusters, near, lay_out(points, seed)),
        components=measured(found["components"][0], resampled["components"], np.array(structureless)),
        silhouette=measured(
            near.mean(),
            means(near, groups, draws),
            np.array([silhouettes(distances, other).mean() for other in shuffled]),
        ),
        variance=variance_shares(states, groups, labels),
        **measures,
    )


def against(variant: LatentMap, base: LatentMap, seed: int = 0) -> Change:
    """How a student's latent space differs from another one's.

    Raises:
        DataError: the two maps are of different rationales.
    """
    if (variant.questions, variant.perspectives) != (base.questions, base.perspectives):
        raise DataError(
            "two latent maps of different rationales", wanted="the same held-out rationales", do="run `mind evaluate` for both again"
        )
    places = {question: place for place, question in enumerate(dict.fromkeys(base.questions))}
    groups = np.array([places[question] for question in base.questions])
    draws = np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), size=BOOTSTRAPS)
    difference = variant.silhouettes - base.silhouettes
    low, high = np.quantile(means(difference, groups, draws), [0.025, 0.975])
    return Change(float(difference.mean()), float(low), float(high), 1 - cka(variant.states, base.states))


def against_several(variant: LatentMap, others: Sequence[LatentMap], seed: int = 0) -> Change:
    """How a student's latent space differs from those of several, as a rule the students of one perspective each: means over them.

    Raises:
        DataError: maps of different rationales.
    """
    assert others, "wanted at least one other map"
    mean = replace(others[0], silhouettes=np.mean([other.silhouettes for other in others], axis=0))
    drifts = [against(variant, other, seed).drift for other in others]
    return replace(against(variant, mean, seed), drift=float(np.mean(drifts)))


# ---------------------------------------------------------- in its own words


def own_texts(examples: Sequence[Example], texts: Sequence[str], encoder: Encoder) -> OwnTexts:
    """What a student answered to each example, the answer line included -> its reasoning, encoded."""
    bodies = tuple(split_answer_line(text)[0] for text in texts)
    features = encoder.encode(bodies).numpy().astype(float)
    return OwnTexts(tuple(example.id for example in examples), bodies, features, encoder.identity)


def own_words(examples: Sequence[Example], written: OwnTexts, encoder: Encoder, seed: int) -> OwnWords:
    """What a student writes beside the teacher's rationales of the same question: the question is the same, so its topic cannot decide."""
    own, theirs = written.features, encoder.encode([text for example in examples for text in example.views.values()]).numpy()
    places = np.cumsum([0, *(len(example.views) for example in examples)])
    views = [list(example.views) for example in examples]
    nearest = [views[q][int((theirs[start:end] @ own[q]).argmax())] for q, (start, end) in enumerate(pairwise(places))]
    counts = {name: nearest.count(name) for name in PERSPECTIVES if any(name in example.views for example in examples)}
    random, total = np.random.default_rng(seed), len(examples)
    known = [np.array([PERSPECTIVES.index(name) for name in own_views]) for own_views in views]
    drawn = np.stack([random.choice(own_views, DRAWN) for own_views in known], axis=1)  # (D, Q)
    largest = np.array([np.bincount(row).max() for row in drawn])
    most = max(counts.values())
    low, high = wilson(most, total)
    return OwnWords(
        nearest={name: count / total for name, count in counts.items()},
        kinds=float(np.exp(entropy(np.array(list(counts.values()), float)))),
        low=low,
        high=high,
        chance=float(largest.mean() / total),
        p=(1 + int((largest >= most).sum())) / (1 + DRAWN),
        questions=total,
        encoder=written.encoder,
    )


def measure_writers(writers: Mapping[str, OwnTexts], settings: config.Latent, seed: int) -> LatentReport:
    """The measurement of the hidden states on what students write: one text a student and question, labelled by who wrote it.

    Raises:
        DataError: the students were asked other questions, or read by other encoders.
    """
    first = next(iter(writers.values()))
    if any((own.questions, own.encoder) != (first.questions, first.encoder) for own in writers.values()):
        raise DataError(
            f"texts of {', '.join(writers)} on other questions, or read by other encoders",
            wanted="the same held-out questions and one encoder",
            do="run `mind evaluate` for all of them again",
        )
    rows = [(place, name) for place in range(len(first.questions)) for name in writers]
    # equal texts have one vector: rounding depends on their neighbours in a batch, and would set them apart
    known: dict[str, Array] = {}
    features = np.stack([known.setdefault(writers[name].texts[place], writers[name].features[place]) for place, name in rows])
    return measure(features, [first.questions[place] for place, _ in rows], [name for _, name in rows], settings, seed)


def read_texts(folder: Path) -> OwnTexts | None:
    """The student's own texts in a report; None where no encoder was set.

    Raises:
        DataError: a damaged file.
    """
    if not (folder / TEXTS).is_file():
        return None
    rows = list(read_jsonl(folder / TEXTS, OwnText))
    do = f"delete {folder} and run `mind evaluate` again"
    try:
        features = np.load(folder / FEATURES).astype(float)
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / FEATURES} is damaged: {error}", do=do) from None
    if not rows or features.ndim != 2 or len(features) != len(rows):
        raise DataError(f"{folder / FEATURES} holds {features.shape} for {len(rows)} texts", wanted="a row a text", do=do)
    return OwnTexts(tuple(row.question for row in rows), tuple(row.text for row in rows), features, rows[0].encoder)


def read_map(folder: Path) -> LatentMap | None:
    """The map that a report holds; None where the analysis was skipped.

    Raises:
        DataError: a damaged file.
    """
    try:
        with (folder / MAP).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        states = np.load(folder / STATES).astype(float)
        column = {name: [row[name] for row in rows] for name in ("question", "perspective", "cluster", "silhouette", "x", "y")}
        return LatentMap(
            tuple(column["question"]),
            tuple(column["perspective"]),
            states,
            np.array(column["cluster"], int),
            np.array(column["silhouette"], float),
            np.array([column["x"], column["y"]], float).T,
        )
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{folder / MAP} is damaged: {error}", do=f"delete {folder} and run `mind evaluate` again") from None


# ------------------------------------------------------------------ in words

GRADES: tuple[tuple[float, str], ...] = ((0.9, "almost perfectly"), (0.65, "clearly"), (0.25, "partly"), (0.0, "hardly"))
"""What an adjusted Rand index means: above 0.9 excellent, above 0.65 moderate (Steinley 2004); below 0.25 our own word."""

SIGNIFICANT = 0.05


def _describe(report: LatentReport, what: str) -> str:
    ari, near, kinds = report.ari, report.silhouette, report.components
    names = len(set(report.map.perspectives))
    index = f"adjusted Rand index {ari.value:.2f}"
    if ari.p < SIGNIFICANT:
        grade = next(word for least, word in GRADES if max(ari.value, 0.0) >= least)
        return (
            f"The {names} {what} separate {grade}: {kinds.value:.1f} components where noise gives {kinds.chance:.1f}, "
            f"{index} (95 % interval {ari.low:.2f} to {ari.high:.2f}, chance {ari.chance:.2f})."
        )
    if near.p < SIGNIFICANT:
        return (
            f"The {names} {what} lie nearer to their own kind than chance (silhouette {near.value:.2f}, chance {near.chance:.2f}), "
            f"but form no clusters ({index})."
        )
    return f"The {names} {what} cannot be told apart in the latent space ({index}, chance {ari.chance:.2f})."
