"""Right and wrong answers -> intervals and tests that say how far chance reaches. Called by evaluate and `mind compare`.

Everything counts questions: an accuracy is a share of questions, a comparison is made on the same questions (paired), an
average gives each benchmark the same weight. A method trained with several seeds is judged as what it would do with any seed on any
question of the kind: both are sampled. No function here knows a model or a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
DRAWS = 10_000


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Variant minus reference on the same questions, in shares of questions (0.1 = ten points).

    `gained` counts what only the variant has right, `lost` what only the reference has right (forgetting); with several seeds, what the
    one has right in a larger share of its seeds than the other.
    """

    value: float
    low: float
    high: float
    p: float  # two-sided: how often chance alone makes a difference this large
    gained: int
    lost: int
    n: int


def wilson(correct: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); of nothing, the whole of [0, 1]."""
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} right of {n}: wanted 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    return _score_interval(correct / n, n, NormalDist().inv_cdf(0.5 + level / 2))


def _score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    center = p + z * z / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # the ends are exact at 0 and 1; rounding must not push them past
    return 0.0 if p == 0 else (center - half) / scale, 1.0 if p == 1 else (center + half) / scale


def macro_accuracy(counts: Sequence[tuple[int, int]], level: float = LEVEL) -> Interval:
    """Mean accuracy over benchmarks (correct, n), each of the same weight.

    The Wilson intervals of the benchmarks are combined by variance recovery (MOVER, Zou and Donner 2008): one benchmark keeps
    its own interval, and an accuracy of 0 or 1 keeps a width, which a bootstrap would lose.
    """
    if not counts:
        raise ValueError("no benchmark to average; wanted at least one (correct, n)")
    values = [correct / n if n else 0.5 for correct, n in counts]
    ends = [wilson(correct, n, level) for correct, n in counts]
    below = sqrt(sum((v - low) ** 2 for v, (low, _) in zip(values, ends, strict=True))) / len(counts)
    above = sqrt(sum((high - v) ** 2 for v, (_, high) in zip(values, ends, strict=True))) / len(counts)
    value = sum(values) / len(counts)
    return Interval(value, max(0.0, value - below), min(1.0, value + above))


def unpaired_difference(ours: tuple[int, int], theirs: tuple[int, int], level: float = LEVEL) -> Interval:
    """Difference of two accuracies (correct, n) on different questions: Newcombe's interval (Statistics in Medicine 17, 873-890, 1998).

    Where one side answered nothing, anything may be.
    """
    if not ours[1] or not theirs[1]:
        return Interval(0.0, -1.0, 1.0)
    (p1, (low1, high1)), (p2, (low2, high2)) = ((correct / n, wilson(correct, n, level)) for correct, n in (ours, theirs))
    return Interval(p1 - p2, p1 - p2 - sqrt((p1 - low1) ** 2 + (high2 - p2) ** 2), p1 - p2 + sqrt((high1 - p1) ** 2 + (p2 - low2) ** 2))


def paired_difference(variant: ArrayLike, reference: ArrayLike, level: float = LEVEL) -> Difference:
    """Difference of two accuracies on the same questions.

    Interval: Newcombe's score interval for paired proportions (Statistics in Medicine 17, 1998, method 10). Test: exact McNemar.

    Args:
        variant, reference: booleans (N,), question by question in the same order.
    """
    ours, theirs = _aligned(variant, reference)
    n = len(ours)
    both, gained = int(np.sum(ours & theirs)), int(np.sum(ours & ~theirs))
    lost, neither = int(np.sum(~ours & theirs)), int(np.sum(~ours & ~theirs))
    if n == 0:
        return Difference(0.0, -1.0, 1.0, 1.0, 0, 0, 0)
    p1, p2 = (both + gained) / n, (both + lost) / n
    (low1, high1), (low2, high2) = wilson(both + gained, n, level), wilson(both + lost, n, level)
    phi = _correlation(both, gained, lost, neither)
    below = _distance(p1 - low1, high2 - p2, phi)
    above = _distance(high1 - p1, p2 - low2, phi)
    value = (gained - lost) / n
    return Difference(value, max(-1.0, value - below), min(1.0, value + above), mcnemar(gained, lost), gained, lost, n)


def macro_difference(pairs: Sequence[tuple[ArrayLike, ArrayLike]], seed: int = 0, level: float = LEVEL, draws: int = DRAWS) -> Difference:
    """Difference of two accuracies averaged over benchmarks, each of the same weight.

    Interval: paired bootstrap, stratified by benchmark; half a question is added to each kind of disagreement, without which three
    benchmarks of 30 questions with few disagreements get intervals that hold the truth 75 % of the time (docs/comparison.md).
    Test: the two students' answers change places at random, question by question (exact McNemar is this for one benchmark).
    One benchmark gives `paired_difference`, to the last digit.

    Args:
        pairs: (variant, reference) a benchmark, booleans (N_b,) each.
    """
    if not pairs:
        raise ValueError("no benchmark to average; wanted at least one pair")
    if len(pairs) == 1:
        return paired_difference(*pairs[0], level=level)
    singles = [paired_difference(*pair, level=level) for pair in pairs]
    gained, lost = sum(s.gained for s in singles), sum(s.lost for s in singles)
    value = sum(s.value for s in singles) / len(singles)
    random = np.random.default_rng(seed)
    shares = sum(_redrawn(s, random, draws) for s in singles) / len(singles)  # (draws,)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    swapped = sum(_swapped(s, random, draws) for s in singles) / len(singles)  # (draws,)
    extreme = int(np.sum(np.abs(swapped) >= abs(value) - 1e-12))
    p = (extreme + 1) / (draws + 1) if gained + lost else 1.0
    return Difference(value, min(float(low), value), max(float(high), value), p, gained, lost, sum(s.n for s in singles))


def repeated_accuracy(benchmarks: Sequence[ArrayLike], level: float = LEVEL) -> Interval:
    """Mean accuracy over seeds and benchmarks (each of the same weight): what the method does with any seed on any such question.

    Wilson's score interval at the effective number of questions, the one at which the binomial variance is that of the mean, and with
    Student's t in place of z (Korn and Graubard 1998, for surveys in clusters; here a seed is a cluster of answers).

    Args:
        benchmarks: booleans (S, N_b) each, seed by seed; S >= 2.
    """
    answers = [_answers(benchmark) for benchmark in benchmarks]
    value = float(np.mean([own.mean() for own in answers]))
    questions = sum(own.shape[1] for own in answers)
    variance, freedom = _sum([*_over_questions([own.mean(axis=0) for own in answers]), *_over_seeds(_by_seed(answers))])
    most = questions * len(answers[0])  # as many as there are answers; where all are alike nothing tells whether seeds add any
    effective = min(value * (1 - value) / variance, most) if variance > 0 and 0 < value < 1 else questions
    return Interval(value, *_score_interval(value, effective, _quantile(freedom, level)))


def repeated_difference(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], *, untrained: bool = False, seed: int = 0, level: float = LEVEL
) -> Difference:
    """Difference of two accuracies averaged over seeds and benchmarks (each of the same weight).

    Its variance is that over questions of the difference of the seeds' means, plus the variance over seeds of each side's accuracy;
    interval and test are Student's t with Welch's and Satterthwaite's degrees of freedom, of which few seeds leave few. As in
    `macro_difference`, a whole disagreement is added to each benchmark, half in either direction. docs/comparison.md has how often the
    interval holds the truth. One seed on both sides gives `macro_difference`, to the last digit: what is then compared are two students,
    not two methods.

    Args:
        pairs: (variant, reference) a benchmark, booleans (S, N_b) and (S', N_b); the seeds of the two sides are not paired.
        untrained: one of the sides is a student without training: it has one row, and no seed could change it. Any other single row
            is taken to spread as the other side's seeds do.
    """
    answers = [(_answers(ours), _answers(theirs)) for ours, theirs in pairs]
    if not answers:
        raise ValueError("no benchmark to average; wanted at least one pair")
    if len(answers[0][0]) == len(answers[0][1]) == 1:
        return macro_difference([(ours[0], theirs[0]) for ours, theirs in answers], seed=seed, level=level)
    apart = [ours.mean(axis=0) - theirs.mean(axis=0) for ours, theirs in answers]  # (N_b,) each
    value = float(np.mean([own.mean() for own in apart]))
    ours, theirs = (_by_seed(side) for side in zip(*answers, strict=True))  # (S,), (S',)
    variance, freedom = _sum([*_over_questions(apart, added=1.0), *_over_seeds(ours, theirs, untrained)])
    half = _quantile(freedom, level) * sqrt(variance)
    gained, lost = (sum(int(np.sum(sign * own > 0)) for own in apart) for sign in (1, -1))
    p = _two_sided(value / sqrt(variance), freedom) if gained + lost else 1.0
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), p, gained, lost, sum(map(len, apart)))


def forgot(questions: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """How many questions the reference has right and the variant wrong, of how many that the reference has right; means over seeds.

    Args:
        questions: (variant, reference) a question: the share of its seeds that have it right; with one seed, whether it has.
    """
    lost = right = 0.0
    for ours, theirs in questions:
        lost, right = lost + theirs * (1 - ours), right + theirs
    return float(lost), float(right)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p: a fair coin for each question that the two do not agree on."""
    from scipy.special import bdtr  # late: scipy costs a fifth of a second

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5))) if gained != lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p values adjusted for having looked at all of them, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class _Part(NamedTuple):
    """An estimated variance, and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: float


def _sum(parts: Sequence[_Part]) -> _Part:
    """Of independent estimates, with Welch's and Satterthwaite's degrees of freedom."""
    total = sum(part.variance for part in parts)
    apiece = sum(part.variance**2 / part.freedom for part in parts)
    return _Part(total, total**2 / apiece if apiece else sum(part.freedom for part in parts))


def _over_questions(values: Sequence[NDArray[np.float64]], added: float = 0.0) -> list[_Part]:
    """Of the mean over benchmarks of the mean over questions, a part a benchmark; `added` to each sum of squares."""
    found = []
    for own in values:  # (N_b,)
        n = len(own)
        squares = float(np.sum((own - own.mean()) ** 2)) + added
        found.append(_Part(squares / (max(n - 1, 1) * n * len(values) ** 2), max(n - 1, 1)))
    return found


def _by_seed(benchmarks: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """(S,) accuracies, averaged over the benchmarks."""
    return np.mean([own.mean(axis=1) for own in benchmarks], axis=0)


def _over_seeds(ours: NDArray[np.float64], theirs: NDArray[np.float64] | None = None, untrained: bool = True) -> list[_Part]:
    """Of the mean accuracy over seeds, or of the difference of two such means; of an untrained student there is none."""
    several = [side for side in (ours, theirs) if side is not None and len(side) > 1]
    if len(several) == 1 and not untrained:  # the other side has one seed: it is taken to spread alike
        return [_Part(float(several[0].var(ddof=1)) * (1 + 1 / len(several[0])), len(several[0]) - 1)]
    return [_Part(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in several]


def _quantile(freedom: float, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + level / 2))


def _two_sided(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(t)))


def _answers(rows: ArrayLike) -> NDArray[np.bool_]:
    """(S, N) of answers with one or several seeds."""
    found = np.asarray(rows, bool)
    if found.ndim != 2 or not len(found):
        raise ValueError(f"shape {found.shape}: wanted a row of answers for each seed")
    return found


def _aligned(variant: ArrayLike, reference: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    ours, theirs = np.asarray(variant, bool), np.asarray(reference, bool)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}: wanted the same questions in the same order")
    return ours, theirs


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Phi of the paired table; a positive one is corrected for continuity, as method 10 does. 0 where it is undefined."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    excess = both * neither - gained * lost
    half = (both + gained + lost + neither) / 2
    return (max(excess - half, 0.0) if excess > 0 else excess) / sqrt(margins)


def _distance(ours: float, theirs: float, phi: float) -> float:
    """From the difference to one end of its interval, given both accuracies' distances and their correlation."""
    return sqrt(max(0.0, ours * ours - 2 * phi * ours * theirs + theirs * theirs))


def _redrawn(single: Difference, random: np.random.Generator, draws: int) -> NDArray[np.float64]:
    """(draws,) differences of one benchmark whose questions are drawn again with replacement."""
    if single.n == 0:
        return np.zeros(draws)
    kinds = np.array([single.gained + 0.5, single.lost + 0.5, single.n - single.gained - single.lost])
    counts = random.multinomial(single.n, kinds / (single.n + 1), size=draws)  # (draws, 3)
    return (counts[:, 0] - counts[:, 1]) / single.n


def _swapped(single: Difference, random: np.random.Generator, draws: int) -> NDArray[np.float64]:
    """(draws,) differences of one benchmark when chance decides which student is which on each question."""
    disagreements = single.gained + single.lost
    return (2 * random.binomial(disagreements, 0.5, size=draws) - disagreements) / max(single.n, 1)
