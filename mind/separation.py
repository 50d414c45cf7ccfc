"""Points with labels -> how far the labels lie apart: the arithmetic of the latent analysis (mind.latent), on arrays only.

Letters: N points, Q questions they belong to (`groups`: which one, ascending), P labels, C components of the mixture, D draws, H width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

STARTS = 2  # of a mixture, the best kept
PERMUTATIONS = 200  # shuffles of the perspectives behind a chance level
ROUNDING = 1e-12  # of a dimension's size: the mean of equal numbers is off by so little, and scaled up it would look like structure


@dataclass(frozen=True)
class Measure:
    """A value with its 95 % bootstrap interval, its mean by chance alone, and how often chance does as well (p)."""

    value: float
    low: float
    high: float
    chance: float
    p: float


def without_question(states: Array, groups: Ints) -> Array:
    """(N, H) -> (N, H): less the mean of the question's rationales, each dimension of unit variance."""
    rest = states - _group_means(states, groups)[groups]
    spread = rest.std(axis=0)
    varies = spread > ROUNDING * np.abs(states).max(axis=0)
    return np.where(varies, rest / np.where(varies, spread, 1), 0)


def reduce(points: Array, components: int) -> Array:
    """First principal components, scaled together to unit variance of the first: (N, H) -> (N, at most `components`)."""
    from sklearn.decomposition import PCA

    if not points.any():
        return points[:, :components]
    kept = min(components, len(points) - 1, points.shape[1])
    reduced = PCA(kept, svd_solver="full").fit_transform(points)
    return reduced / (reduced[:, 0].std() or 1)


def mixture(points: Array, components: int, seed: int) -> Ints:
    """Component of each point in a Dirichlet-process mixture of round Gaussians, (N,); at most `components` of them.

    Round ones, because on 192 points full covariances find 14 components in noise; these find one (docs/latent.md).
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture

    if not points.any():
        return np.zeros(len(points), dtype=np.int64)
    fit = BayesianGaussianMixture(
        n_components=min(components, len(points)),
        covariance_type="spherical",
        weight_concentration_prior_type="dirichlet_process",
        n_init=STARTS,
        max_iter=300,
        reg_covar=1e-3,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # points that are all the same have fewer distinct starts than components
        return np.asarray(fit.fit_predict(points), dtype=np.int64)


def lay_out(points: Array, seed: int) -> Array:
    """t-SNE coordinates, (N, 2)."""
    from sklearn.manifold import TSNE

    if not points.std(axis=0).all():  # without spread scikit-learn divides by zero and takes the process down
        return np.pad(points, ((0, 0), (0, 1)))[:, :2]
    perplexity = min(20.0, (len(points) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points), dtype=np.float64)


def silhouettes(distances: Array, labels: Ints) -> Array:
    """Silhouette of each point (Rousseeuw 1987) given all distances: (N, N), (N,) -> (N,)."""
    from sklearn.metrics import silhouette_samples

    return np.asarray(silhouette_samples(distances, labels, metric="precomputed"), dtype=np.float64)


def contingency(clusters: Ints, labels: Ints, groups: Ints) -> Array:
    """How many rationales of each question lie in component c and have perspective p: (Q, C, P)."""
    counts = np.zeros((groups.max() + 1, clusters.max() + 1, labels.max() + 1))
    np.add.at(counts, (groups, clusters, labels), 1)
    return counts


def agreement(tables: Array) -> dict[str, Array]:
    """Tables of components by perspectives (D, C, P) -> adjusted Rand index, NMI, purity, effective components; (D,) each."""
    n = tables.sum((1, 2))  # (D,)
    by_cluster, by_label = tables.sum(2), tables.sum(1)  # (D, C), (D, P)
    pairs = _pairs(tables).sum((1, 2))
    in_cluster, in_label = _pairs(by_cluster).sum(1), _pairs(by_label).sum(1)
    expected = in_cluster * in_label / _pairs(n)
    best = (in_cluster + in_label) / 2
    of_cluster, of_label = entropy(by_cluster), entropy(by_label)
    shared = of_cluster + of_label - entropy(tables.reshape(len(tables), -1))
    return {
        "ari": (pairs - expected) / (best - expected),
        "nmi": 2 * shared / (of_cluster + of_label),
        "purity": tables.max(2).sum(1) / n,
        "components": np.exp(of_cluster),
    }


def shuffle_within(labels: Ints, groups: Ints, random: np.random.Generator) -> Ints:
    """Perspectives shuffled among the rationales of each question, PERMUTATIONS times: (D, N). `groups` must be ascending."""
    assert (np.diff(groups) >= 0).all(), "rows of a question must stand together"
    order = np.argsort(groups + random.random((PERMUTATIONS, len(groups))), axis=1)
    return labels[order]


def columns_shuffled(points: Array, random: np.random.Generator) -> Array:
    """Points without structure: each coordinate keeps its values, but not which point they belong to."""
    return np.stack([random.permutation(column) for column in points.T], axis=1)


def variance_shares(states: Array, groups: Ints, labels: Ints) -> dict[str, float]:
    """Shares of the states' variance: between questions, between perspectives within a question, and the rest; they sum to 1."""
    centered = states - states.mean(0)
    total = (centered**2).sum()
    if total == 0:
        return {"question": 0.0, "perspective": 0.0, "rest": 1.0}
    within = states - _group_means(states, groups)[groups]
    rest = within - _group_means(within, labels)[labels]
    left, unexplained = (within**2).sum() / total, (rest**2).sum() / total
    return {"question": float(1 - left), "perspective": float(left - unexplained), "rest": float(unexplained)}


def cka(ours: Array, theirs: Array) -> float:
    """Linear centred kernel alignment of two sets of states of the same rows (Kornblith et al. 2019), debiased.

    1 for equal geometry (up to rotation and scale), about 0 for unrelated ones: the debiased HSIC of Song et al. (2012), because
    the plain estimate is far above 0 by chance when there are more dimensions than rows.

    Args:
        ours, theirs: (N, H) and (N, H'), N >= 4.
    """
    assert len(ours) == len(theirs) >= 4, (ours.shape, theirs.shape)
    first, second = _kernel(ours), _kernel(theirs)
    scale = np.sqrt(_hsic(first, first) * _hsic(second, second))
    return float(min(1.0, _hsic(first, second) / scale)) if scale > 0 else 0.0


def _kernel(states: Array) -> Array:
    """Linear kernel of centred states, without its diagonal: (N, H) -> (N, N)."""
    centered = states - states.mean(0)
    kernel = centered @ centered.T
    np.fill_diagonal(kernel, 0)
    return np.asarray(kernel)


def _hsic(first: Array, second: Array) -> float:
    """Unbiased HSIC, up to the factor 1 / (N (N - 3)) that cancels in CKA."""
    n = len(first)
    row, column = first.sum(0), second.sum(0)
    return float((first * second).sum() + row.sum() * column.sum() / ((n - 1) * (n - 2)) - 2 * (row @ column) / (n - 2))


def _group_means(values: Array, groups: Ints) -> Array:
    """Mean row of each group: (N, H) -> (groups, H)."""
    sums = np.zeros((groups.max() + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return np.asarray(sums / np.bincount(groups)[:, None])


def means(values: Array, groups: Ints, draws: Ints) -> Array:
    """Mean of `values` (N,) in each resample of the questions: (D, Q) -> (D,)."""
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    return np.asarray((draws @ sums) / (draws @ counts))


def _pairs(counts: Array) -> Array:
    return counts * (counts - 1) / 2


def entropy(counts: Array) -> Array:
    """Entropy in nats of the shares along the last axis."""
    shares = counts / counts.sum(-1, keepdims=True)
    return np.asarray(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1))


def measured(value: float, resampled: Array, by_chance: Array) -> Measure:
    """The interval is that of the resamples, moved so that they centre on the value: questions drawn twice agree with themselves."""
    low, high = np.quantile(resampled, [0.025, 0.975]) - resampled.mean() + value
    p = (1 + int((by_chance >= value - 1e-12).sum())) / (1 + len(by_chance))
    return Measure(float(value), float(min(low, value)), float(max(high, value)), float(by_chance.mean()), p)
