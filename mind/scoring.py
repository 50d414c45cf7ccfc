"""Answers -> grades -> the numbers of a report: accuracy, calibration, contamination. Called by stages.evaluate and mind.reevaluation."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from mind.answering import Answer
from mind.benchmarks.contamination import WORDS, contamination
from mind.benchmarks.loading import Benchmark
from mind.grading import TOO_SLOW, extract, grade
from mind.records import DOMAINS, Prediction, Question
from mind.statistics import macro_accuracy, wilson

DONE = "mind.evaluated"
"""Opens the tags of a run that name the benchmarks it has a result on, by content."""

BINS = 10
"""Of equal width, for the expected calibration error."""


def graded(benchmark: Benchmark, answers: Iterable[Sequence[Answer]]) -> list[Prediction]:
    """A prediction a question. Of several samples the most frequent answer counts, and its share of them is the confidence."""
    rows = []
    for question, samples in zip(benchmark.questions, answers, strict=True):
        chosen, share = _voted([extract(one.output, question.kind, question.choices) for one in samples])
        result = grade(samples[chosen].output, question.answer, question.kind, question.choices)
        rows.append(
            Prediction(
                benchmark=benchmark.name,
                id=question.id,
                output=samples[chosen].output,
                answer=result.answer,
                gold=question.answer,
                correct=result.correct,
                reason=result.reason,
                tokens=sum(one.tokens for one in samples),
                confidence=samples[0].confidence if len(samples) == 1 else share,
                samples=tuple(one.output for one in samples) if len(samples) > 1 else (),
            )
        )
    return rows


def _voted(answers: Sequence[str | None]) -> tuple[int, float | None]:
    """The place of the first sample that has the most frequent answer (of equally frequent ones the first given), and that answer's share.

    A sample without an answer has no vote; where none has one there is no share. Expressions are the same when they are spelt the same.
    """
    spelt = [None if answer is None else "".join(answer.split()) for answer in answers]
    votes = Counter(answer for answer in spelt if answer is not None)  # in the order of their first appearance
    if not votes:
        return 0, None
    winner, count = votes.most_common(1)[0]
    return spelt.index(winner), count / len(answers)


def measure(benchmarks: Sequence[Benchmark], predictions: Sequence[Sequence[Prediction]], training: Sequence[Question]) -> dict[str, Any]:
    """metrics.json: `benchmarks`, the averages of each domain (each benchmark of the same weight), and `contamination`."""
    scores = {benchmark.name: score(benchmark, rows) for benchmark, rows in zip(benchmarks, predictions, strict=True)}
    metrics: dict[str, Any] = {"benchmarks": scores}
    for domain in DOMAINS:
        counts = [(own["correct"], own["n"]) for own in scores.values() if own["domain"] == domain]
        if counts:
            average = macro_accuracy(counts)
            metrics[domain] = {"accuracy": average.value, "ci_low": average.low, "ci_high": average.high, "benchmarks": len(counts)}
    texts = [question.question for question in training]
    found = {benchmark.name: contamination(benchmark.questions, texts) for benchmark in benchmarks}
    metrics["contamination"] = {name: {"overlap": len(c.overlap), "same": len(c.same), "ids": list(c.overlap)} for name, c in found.items()}
    return metrics


def score(benchmark: Benchmark, rows: Sequence[Prediction]) -> dict[str, Any]:
    """One benchmark of metrics.json. `mean_tokens` is what a question cost: the sum over its samples, where several were drawn."""
    slow = sum(row.reason == TOO_SLOW for row in rows)
    return {
        "domain": benchmark.domain,
        **_accuracy(rows),
        **({"too_slow": slow} if slow else {}),  # of the wrong ones, those whose comparison with the gold answer was given up
        "answer_rate": sum(row.answer is not None for row in rows) / len(rows),
        "mean_tokens": sum(row.tokens for row in rows) / len(rows),
        **calibration(rows),
        **_by(benchmark, rows, "difficulty", lambda question: question.difficulty),
        **_by(benchmark, rows, "topic", lambda question: question.topic),
    }


def calibration(rows: Sequence[Prediction]) -> dict[str, Any]:
    """How far the student's confidence in its answers is to be believed; nothing where no row has one.

    `ece`: expected calibration error, the mean distance of confidence and accuracy over BINS bins of confidence (Guo et al. 2017);
    `brier`: the mean squared distance of an answer's confidence from 1 when it is right and from 0 when it is wrong (Brier 1950).
    """
    pairs = [(row.confidence, row.correct) for row in rows if row.confidence is not None]
    if not pairs:
        return {}
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for confidence, correct in pairs:
        bins[min(int(confidence * BINS), BINS - 1)].append((confidence, correct))
    shown = [
        {
            "from": place / BINS,
            "n": len(own),
            "confidence": sum(confidence for confidence, _ in own) / len(own),
            "accuracy": sum(correct for _, correct in own) / len(own),
        }
        for place, own in sorted(bins.items())
    ]
    return {
        "calibration": {
            "n": len(pairs),
            "confidence": sum(confidence for confidence, _ in pairs) / len(pairs),
            "accuracy": sum(correct for _, correct in pairs) / len(pairs),
            "ece": sum(one["n"] * abs(one["confidence"] - one["accuracy"]) for one in shown) / len(pairs),
            "brier": sum((confidence - correct) ** 2 for confidence, correct in pairs) / len(pairs),
            "bins": shown,
        }
    }


def _accuracy(rows: Sequence[Prediction]) -> dict[str, Any]:
    correct = sum(row.correct for row in rows)
    low, high = wilson(correct, len(rows))
    return {"n": len(rows), "correct": correct, "accuracy": correct / len(rows), "ci_low": low, "ci_high": high}


def _by(benchmark: Benchmark, rows: Sequence[Prediction], name: str, group: Callable[[Question], object]) -> dict[str, Any]:
    """{'by_<name>': accuracy of each group}, or nothing where the benchmark does not tell groups apart."""
    groups = defaultdict(list)
    for question, row in zip(benchmark.questions, rows, strict=True):
        if group(question) is not None:
            groups[str(group(question))].append(row)
    return {f"by_{name}": {key: _accuracy(own) for key, own in sorted(groups.items())}} if len(groups) > 1 else {}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow gets: eval/<benchmark>/accuracy, ci_low, ci_high, ece and the like, the same of the domains, latent/<measure>.

    Of the groups only difficulties, which are numbers: a topic may be any text, and MLflow takes few signs in a name.
    """
    shown = ("accuracy", "ci_low", "ci_high", "answer_rate", "mean_tokens")
    groups = {**metrics["benchmarks"], **{domain: metrics[domain] for domain in DOMAINS if domain in metrics}}
    values = {f"eval/{name}/{key}": group[key] for name, group in groups.items() for key in shown if key in group}
    for name, group in groups.items():
        values |= {f"eval/{name}/{key}": group["calibration"][key] for key in ("confidence", "ece", "brier") if "calibration" in group}
        levels = group.get("by_difficulty", {})
        values |= {f"eval/{name}/difficulty/{level}/accuracy": own["accuracy"] for level, own in levels.items()}
    for name, shared in metrics.get("contamination", {}).items():
        values |= {f"eval/{name}/{key}": shared[key] for key in ("overlap", "same")}
    measures = {
        name: measure["value"] for name, measure in metrics.get("latent", {}).items() if isinstance(measure, dict) and "value" in measure
    }
    if own := metrics.get("latent", {}).get("own_words"):
        measures["own_kinds"] = own["kinds"]
    return {**values, **{f"latent/{name}": value for name, value in measures.items()}}


def done_tags(name: str, digest: str, result: Mapping[str, Any]) -> dict[str, str]:
    """What a student's run says about a benchmark that it was measured on: which questions, by content, and the latest result."""
    short = digest[:16]
    return {f"{DONE}/{name}/{short}": "done", f"{DONE}/{name}": f"{short} {result['correct']} of {result['n']}"}


def is_done(tags: Mapping[str, str], name: str, digest: str) -> bool:
    return f"{DONE}/{name}/{digest[:16]}" in tags


def latest(tags: Mapping[str, str], name: str) -> tuple[int, int] | None:
    """How many answers were right, of how many, when this student was last measured on a benchmark of this name."""
    found = re.fullmatch(r"\w+ (\d+) of (\d+)", tags.get(f"{DONE}/{name}", ""))
    return (int(found[1]), int(found[2])) if found else None


def table(variant: str, metrics: Mapping[str, Any]) -> Table:
    """The end of an evaluation, as a person reads it."""
    headings = ("benchmark", "accuracy", "95 % interval", "asked", "answered", "tokens", "confidence", "off by")
    shown = Table(*headings, title=f"{variant}: accuracy in %, and how sure it was of its stated answers", title_justify="left")
    for name, own in metrics["benchmarks"].items():
        answered, tokens, sure = f"{own['answer_rate']:.0%}", f"{own['mean_tokens']:.0f}", own.get("calibration")
        trust = (f"{sure['confidence']:.0%}", f"{sure['ece']:.0%}") if sure else ()
        shown.add_row(f"{name} ({own['domain']})", *_percent(own), str(own["n"]), answered, tokens, *trust)
    for domain, label in DOMAINS.items():
        if domain in metrics:
            shown.add_row(label, *_percent(metrics[domain]))
    shown.caption, shown.caption_justify = "\n".join(_seen(metrics)), "left"
    return shown


def _seen(metrics: Mapping[str, Any]) -> Iterator[str]:
    """A line for each benchmark of which the student may have seen questions in training."""
    for name, found in metrics.get("contamination", {}).items():
        if found["overlap"]:
            asked, same = metrics["benchmarks"][name]["n"], f" ({found['same']} the same)" if found["same"] else ""
            yield f"{found['overlap']} of {asked} questions of {name} share {WORDS} words in a row with a training question{same}"


def _percent(score: Mapping[str, float]) -> tuple[str, str]:
    return f"{100 * score['accuracy']:.1f}", f"{100 * score['ci_low']:.1f} to {100 * score['ci_high']:.1f}"
