"""mind.statistics: laws first, then published and independently computed cases, then how often the intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t, ttest_1samp, ttest_ind

from mind import statistics
from mind.statistics import (
    Difference,
    holm,
    macro_accuracy,
    macro_difference,
    mcnemar,
    paired_difference,
    repeated_accuracy,
    repeated_difference,
    unpaired_difference,
    wilson,
)

answers = st.lists(st.booleans(), min_size=1, max_size=60)
paired = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def table(both: int, gained: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """(variant, reference) with these counts of questions."""
    ours = [True] * (both + gained) + [False] * (lost + neither)
    theirs = [True] * both + [False] * gained + [True] * lost + [False] * neither
    return np.array(ours), np.array(theirs)


# ------------------------------------------------------------------- laws


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_wilson_stays_inside_and_around_the_share(correct: int, wrong: int) -> None:
    n = correct + wrong
    low, high = wilson(correct, n)
    assert 0 <= low <= (correct / n if n else 0.5) <= high <= 1
    mirrored = wilson(wrong, n)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 128, 100_000])
def test_wilson_ends_are_exact_at_none_and_all(n: int) -> None:
    assert wilson(0, n)[0] == 0.0 < wilson(0, n)[1]
    assert wilson(n, n)[1] == 1.0 > wilson(n, n)[0]


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_narrows_with_more_questions_and_less_confidence() -> None:
    widths = [high - low for low, high in (wilson(n // 4, n) for n in (8, 40, 400, 4000))]
    assert widths == sorted(widths, reverse=True)
    assert wilson(10, 40, level=0.8)[0] > wilson(10, 40)[0]


@pytest.mark.parametrize(("correct", "n"), [(-1, 3), (4, 3), (1, 0)])
def test_wilson_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="wanted 0 <= correct <= n"):
        wilson(correct, n)


@settings(deadline=None)
@given(answers)
def test_a_student_does_not_differ_from_itself(vector: list[bool]) -> None:
    for difference in (paired_difference(vector, vector), macro_difference([(vector, vector), (vector, vector)], draws=200)):
        assert difference.value == 0
        assert difference.p == 1
        assert difference.gained == difference.lost == 0
        assert difference.low <= 0 <= difference.high


@settings(deadline=None)
@given(paired)
def test_changing_places_changes_only_the_sign(rows: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*rows, strict=True)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there.value == pytest.approx(-back.value)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p == back.p
    assert (there.gained, there.lost) == (back.lost, back.gained)


@settings(deadline=None)
@given(paired)
def test_difference_is_that_of_the_two_accuracies(rows: list[tuple[bool, bool]]) -> None:
    ours, theirs = map(np.array, zip(*rows, strict=True))
    difference = paired_difference(ours, theirs)
    assert difference.value == pytest.approx(ours.mean() - theirs.mean())
    assert -1 <= difference.low <= difference.value <= difference.high <= 1
    assert 0 < difference.p <= 1


def test_pairs_must_be_the_same_questions() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([True], [True, False])


def test_nothing_compared_says_nothing() -> None:
    assert paired_difference([], []) == Difference(0.0, -1.0, 1.0, 1.0, 0, 0, 0)
    for ours, theirs in (((0, 0), (0, 0)), ((3, 4), (0, 0)), ((0, 0), (3, 4))):
        assert unpaired_difference(ours, theirs) == (0.0, -1.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_monotone_never_smaller_and_bounded(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    assert max(adjusted, default=0) <= min(1, len(p_values) * max(p_values, default=0)) + 1e-12


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(p_values: list[float], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(range(len(p_values)))
    random.shuffle(shuffled)
    assert holm([p_values[i] for i in shuffled]) == pytest.approx([holm(p_values)[i] for i in shuffled])


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50))
def test_one_benchmark_averages_to_itself(correct: int, wrong: int) -> None:
    n = correct + wrong
    if n:
        assert macro_accuracy([(correct, n)]) == pytest.approx((correct / n, *wilson(correct, n)))


@settings(deadline=None)
@given(paired)
def test_one_benchmark_compares_as_itself(rows: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*rows, strict=True)
    assert macro_difference([(ours, theirs)]) == paired_difference(ours, theirs)


def test_benchmarks_weigh_the_same_whatever_their_size() -> None:
    assert macro_accuracy([(1, 1), (0, 999)]).value == 0.5
    small, large = table(0, 4, 0, 0), table(0, 0, 0, 400)
    assert macro_difference([small, large]).value == 0.5


@pytest.mark.parametrize("average", [macro_accuracy, macro_difference])
def test_no_benchmark_has_no_average(average) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="at least one"):
        average([])


def test_averages_are_the_same_for_the_same_seed() -> None:
    pairs = [table(10, 9, 3, 20), table(30, 5, 5, 8)]
    assert macro_difference(pairs, seed=3) == macro_difference(pairs, seed=3)
    assert macro_difference(pairs, seed=3) != macro_difference(pairs, seed=4)


# ------------------------------------------------------------------ seeds


def seeds(count: int, n: int, share: float, seed: int, spread: float = 0.03) -> np.ndarray:
    """(count, n) answers: questions differ in difficulty, seeds in skill."""
    random = np.random.default_rng(seed)
    easy = random.beta(share, 1 - share, size=n)
    return random.random((count, n)) < np.clip(easy + random.normal(0, spread, size=(count, 1)), 0, 1)


@settings(deadline=None)
@given(paired, paired)
def test_one_seed_compares_two_students_as_before(first: list[tuple[bool, bool]], second: list[tuple[bool, bool]]) -> None:
    pairs = [tuple(zip(*rows, strict=True)) for rows in (first, second)]
    assert repeated_difference([([a], [b]) for a, b in pairs], seed=5) == macro_difference(pairs, seed=5)  # type: ignore[list-item]
    assert repeated_difference([([pairs[0][0]], [pairs[0][1]])]) == paired_difference(*pairs[0])


def test_identical_variants_do_not_differ_whatever_their_seeds_do() -> None:
    answers = seeds(3, 80, 0.4, 0)
    for other in (answers, answers[[2, 0, 1]]):
        found = repeated_difference([(answers, other)])
        assert (found.value, found.p, found.gained, found.lost) == (0, 1, 0, 0)
        assert found.low < 0 < found.high


@pytest.mark.parametrize("untrained", [True, False])
def test_swapping_sides_turns_a_repeated_difference_round(untrained: bool) -> None:
    ours, theirs = seeds(3, 60, 0.5, 1), seeds(1, 60, 0.3, 2)
    there, back = repeated_difference([(ours, theirs)], untrained=untrained), repeated_difference([(theirs, ours)], untrained=untrained)
    assert (there.value, there.low, there.high, there.p) == pytest.approx((-back.value, -back.high, -back.low, back.p))
    assert (there.gained, there.lost) == (back.lost, back.gained)


def test_the_order_of_seeds_and_questions_does_not_matter() -> None:
    ours, theirs, order = seeds(4, 50, 0.5, 1), seeds(2, 50, 0.3, 2), np.random.default_rng(0).permutation(50)
    before, after = repeated_difference([(ours, theirs)]), repeated_difference([(ours[[3, 1, 0, 2]][:, order], theirs[[1, 0]][:, order])])
    assert (after.value, after.low, after.high, after.p) == pytest.approx((before.value, before.low, before.high, before.p))


def test_more_seeds_and_less_spread_narrow_the_interval() -> None:
    base = seeds(1, 100, 0.3, 9)

    def width(count: int, spread: float) -> float:
        found = [repeated_difference([(seeds(count, 100, 0.5, i, spread), base)], untrained=True) for i in range(20)]
        return float(np.mean([d.high - d.low for d in found]))

    assert width(6, 0.05) < width(3, 0.05)
    assert width(3, 0.0) < width(3, 0.1)


def test_a_reference_with_one_seed_is_taken_to_spread_like_the_other() -> None:
    ours, theirs = seeds(3, 100, 0.5, 1, spread=0.1), seeds(1, 100, 0.3, 2)
    known, unknown = (repeated_difference([(ours, theirs)], untrained=untrained) for untrained in (True, False))
    assert unknown.low < known.low and known.high < unknown.high and known.value == unknown.value


def test_benchmarks_of_a_repeated_difference_weigh_the_same() -> None:
    small, large = (np.ones((2, 4)), np.zeros((2, 4))), (np.zeros((2, 400)), np.ones((2, 400)))
    assert repeated_difference([small, large]).value == 0
    assert repeated_accuracy([small[0], large[0]]).value == 0.5


@pytest.mark.parametrize("rows", [[True, False], np.zeros((0, 3))])
def test_answers_come_in_rows_of_seeds(rows: object) -> None:
    with pytest.raises(ValueError, match="a row of answers for each seed"):
        repeated_difference([(rows, rows)])  # type: ignore[list-item]


def test_seeds_are_compared_by_welchs_test() -> None:
    """Without questions to sample, what is left is scipy's t test of unequal variances on the seeds' accuracies."""
    ours, theirs = np.array([0.31, 0.35, 0.33]), np.array([0.22, 0.41, 0.30, 0.27])
    variance, freedom = statistics._sum(statistics._over_seeds(ours, theirs, untrained=False))
    known = ttest_ind(ours, theirs, equal_var=False)
    assert (ours.mean() - theirs.mean()) / np.sqrt(variance) == pytest.approx(known.statistic)
    assert freedom == pytest.approx(known.df)
    assert statistics._two_sided(known.statistic, known.df) == pytest.approx(known.pvalue)


def test_one_seed_against_several_is_the_pooled_test() -> None:
    ours, theirs = np.array([0.31, 0.35, 0.33]), np.array([0.22])
    variance, freedom = statistics._sum(statistics._over_seeds(ours, theirs, untrained=False))
    known = ttest_ind(ours, theirs, equal_var=True)
    assert ((ours.mean() - theirs.mean()) / np.sqrt(variance), freedom) == pytest.approx((known.statistic, known.df))


def test_questions_are_compared_by_the_paired_t_test() -> None:
    apart = np.array([1, 0, 0, -1 / 3, 2 / 3, 0, 1 / 3, 0])
    variance, freedom = statistics._sum(statistics._over_questions([apart]))
    known = ttest_1samp(apart, 0)
    assert (apart.mean() / np.sqrt(variance), freedom) == pytest.approx((known.statistic, known.df))


def test_seeds_that_answer_alike_are_one_sample_of_questions() -> None:
    """Wilson's interval at N - 1 questions with Student's t, where the seeds add nothing."""
    answers = np.repeat(seeds(1, 90, 0.3, 4), 3, axis=0)
    found, p, z = repeated_accuracy([answers]), answers.mean(), t.ppf(0.975, 89)
    center, half = p + z * z / 178, z * np.sqrt(p * (1 - p) / 89 + z * z / (4 * 89 * 89))
    assert found == pytest.approx((p, (center - half) / (1 + z * z / 89), (center + half) / (1 + z * z / 89)))


@pytest.mark.parametrize("right", [0, 1])
def test_all_wrong_and_all_right_keep_a_width(right: int) -> None:
    value, low, high = repeated_accuracy([np.full((3, 40), right)])
    assert value == right and (low == 0 if right == 0 else high == 1) and 0.05 < high - low < 0.15


# ------------------------------------------------------------ known cases


@pytest.mark.parametrize(
    ("correct", "n", "level", "low", "high"),
    [  # statsmodels 0.15.0: proportion_confint(correct, n, 1 - level, method="wilson")
        (0, 10, 0.95, 0.0, 0.27753279986288926),
        (13, 96, 0.95, 0.08087706445811116, 0.21801138502144396),
        (5, 10, 0.95, 0.23659309051256394, 0.7634069094874361),
        (81, 263, 0.95, 0.2552885198782742, 0.36620957698280004),
        (15, 148, 0.95, 0.06238639953073628, 0.16048724172330803),
        (1, 29, 0.95, 0.006113214292762667, 0.17175521879320294),
        (77, 128, 0.90, 0.5289918566603904, 0.6699285510966941),
    ],
)
def test_wilson_agrees_with_statsmodels(correct: int, n: int, level: float, low: float, high: float) -> None:
    assert wilson(correct, n, level) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [  # statsmodels 0.15.0: mcnemar([[10, gained], [lost, 5]], exact=True).pvalue
        (1, 7, 0.0703125),
        (0, 0, 1.0),
        (12, 5, 0.143463134765625),
        (40, 22, 0.030015864349067285),
        (3, 3, 1.0),
        (121, 59, 4.4344492637551645e-06),
    ],
)
def test_mcnemar_agrees_with_statsmodels(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_a_fair_coin(gained: int, lost: int) -> None:
    if gained + lost:
        assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [  # statsmodels 0.15.0: multipletests(p_values, method="holm")[1]
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.2, 0.01, 0.01, 0.9], [0.4, 0.04, 0.04, 0.9]),
        ([0.03], [0.03]),
        ([0.5, 0.6, 0.7], [1.0, 1.0, 1.0]),
    ],
)
def test_holm_agrees_with_statsmodels(p_values: list[float], adjusted: list[float]) -> None:
    assert holm(p_values) == pytest.approx(adjusted)


def test_newcombe_agrees_with_the_published_example() -> None:
    # Airway hyper-responsiveness before and after a transplantation (Bentur et al. 2009), the worked example of Fagerland, Lydersen
    # and Laake, Statistics in Medicine 33 (2014): a = 1, b = 1, c = 7, d = 12; Newcombe's interval -0.507 to -0.026.
    difference = paired_difference(*table(1, 1, 7, 12))
    assert (round(difference.low, 3), round(difference.high, 3)) == (-0.507, -0.026)
    assert difference.value == pytest.approx(-6 / 21)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), pages 873 to 890, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_newcombe_of_different_questions_agrees_with_the_published_table(
    ours: tuple[int, int], theirs: tuple[int, int], low: float, high: float
) -> None:
    found = unpaired_difference(ours, theirs)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert found.value == pytest.approx(ours[0] / ours[1] - theirs[0] / theirs[1])


# --------------------------------------------------------------- coverage


def tables(n: int, shares: tuple[float, ...], times: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [table(*map(int, counts)) for counts in np.random.default_rng(seed).multinomial(n, shares, size=times)]


@pytest.mark.parametrize(("n", "shares"), [(128, (0.1, 0.15, 0.05, 0.7)), (30, (0.05, 0.03, 0.02, 0.9))])
def test_paired_interval_holds_the_truth_as_often_as_it_says(n: int, shares: tuple[float, ...]) -> None:
    truth = shares[1] - shares[2]
    found = [paired_difference(*pair) for pair in tables(n, shares, 400, seed=1)]
    assert np.mean([d.low <= truth <= d.high for d in found]) >= 0.92  # 0.95 less two and a half standard errors


def test_average_interval_holds_the_truth_where_disagreement_is_rare() -> None:
    """Three benchmarks of 30; a bootstrap without the added halves is right in fewer than nine of ten here."""
    shares = [(0.05, 0.03, 0.02, 0.9), (0.1, 0.02, 0.01, 0.87), (0.9, 0.0, 0.02, 0.08)]
    truth = np.mean([s[1] - s[2] for s in shares])
    sets = zip(*(tables(30, s, 300, seed=i) for i, s in enumerate(shares)), strict=True)
    found = [macro_difference(list(pairs), draws=1000) for pairs in sets]
    assert np.mean([d.low <= truth <= d.high for d in found]) >= 0.92


@pytest.mark.parametrize("count", [2, 3])
def test_repeated_interval_holds_the_truth_of_the_method(count: int) -> None:
    """Not that of the seeds drawn: other seeds and other questions. docs/comparison.md has more of it."""
    found = []
    for i in range(400):
        random = np.random.default_rng(i)
        easy = random.beta(0.4, 0.6, size=(2, 100))  # mean 0.4 on both sides
        sides = [random.random((count, 100)) < np.clip(own + random.normal(0, 0.04, size=(count, 1)), 0, 1) for own in easy]
        found.append(repeated_difference([(sides[0], sides[1])]))
    assert np.mean([d.low <= 0 <= d.high for d in found]) >= 0.93
    assert np.mean([d.p < 0.05 for d in found]) <= 0.07


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_average_test_agrees_with_counting_every_outcome(seed: int) -> None:
    """Two small benchmarks: the drawn p is that of all 2^disagreements swaps, within its own sampling error."""
    random = np.random.default_rng(seed)
    pairs = [table(*map(int, random.multinomial(n, (0.2, 0.3, 0.2, 0.3)))) for n in (12, 9)]
    singles = [paired_difference(*pair) for pair in pairs]
    value = abs(sum(s.value for s in singles)) / 2
    outcomes = np.zeros(1)
    for s in singles:
        for _ in range(s.gained + s.lost):
            outcomes = np.concatenate([outcomes - 0.5 / s.n, outcomes + 0.5 / s.n])
    exact = np.mean(np.abs(outcomes) >= value - 1e-12)
    assert macro_difference(pairs, draws=4000).p == pytest.approx(exact, abs=0.035)
