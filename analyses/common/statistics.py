"""Confidence intervals, AUROC and average precision. Intervals resample clusters: the images, captions or scenes that items share.

1. Items that share an image (a caption, a scene) are not independent. The bootstrap therefore draws clusters with replacement,
   as many as there are, each with all its items (Field & Welsh 2007, "Bootstrapping clustered data"). With one item per
   cluster this is the ordinary bootstrap. Intervals are percentiles; equal seeds give equal intervals.
2. If all items agree (0 of n, n of n), resampling gives an interval of width 0. Such a share gets Wilson's interval instead,
   with the number of clusters as n. So does a share with one yes/no item per cluster.
3. AUROC is the probability that a right answer scores above a hallucinated one (ties count half). Scores are higher for answers
   more likely to be right: AP for "correct" ranks by the score, AP for "hallucinated" by its negative. A random score has
   AUROC 0.5 and an AP equal to the share of the class. Point values are scikit-learn's. Resamples use the same formulas
   with weights, all draws at once (tests compare them with scikit-learn's `sample_weight`).
4. Without right answers, or without hallucinated ones, all figures are NaN; the counts are given. A resample that lacks one of
   the two classes is left out; `resamples` is the number kept. If a class occurs in fewer than five clusters there is a value
   but no interval, because resampling so few clusters gives intervals that are far too narrow.
5. Over pooled categories, a score can do well by telling easy categories from hard ones. `within_groups` compares right and
   hallucinated answers of one category only: the mean of the categories' AUROCs, weighted by their numbers of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score

from hooked_qwen2vl.moved import moved_names

__getattr__ = moved_names(__name__)

FIGURES = ("auroc", "ap_correct", "ap_hallucinated")
MIN_CLUSTERS = 5  # a class in fewer clusters gets no interval
_CHUNK = 2_000_000  # weights in memory at a time


# ---- clusters ---------------------------------------------------------------------------------------


def cluster_codes(clusters: Sequence[Any] | None, n: int) -> Int[np.ndarray, "item"]:
    """The index of each item's cluster, in order of appearance; None makes each item a cluster of its own.

    Raises:
        ValueError: the labels are not one per item, or one is missing (None, NaN).
    """
    if clusters is None:
        return np.arange(n)
    codes, _ = pd.factorize(pd.Series(list(clusters), dtype=object))
    if len(codes) != n:
        raise ValueError(f"expected the cluster (image, caption or scene) of each of {n} items, got {len(codes)}.")
    if (codes < 0).any():
        raise ValueError(f"{int((codes < 0).sum())} items have no cluster: give each the image, caption or scene it belongs to.")
    return codes


def cluster_draws(
    n_clusters: int, n_boot: int, rng: np.random.Generator, n: int | None = None
) -> Iterator[Int[np.ndarray, "draw cluster"]]:
    """How often each resample contains each cluster, in chunks of resamples.

    Args:
        n: how many numbers the caller needs per resample, which limits the size of the chunks; None: one per cluster.
    """
    step = max(1, _CHUNK // max(n or 0, n_clusters))
    for start in range(0, n_boot, step):
        yield rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=min(step, n_boot - start))


# ---- means and shares -------------------------------------------------------------------------------


def mean_interval(
    values: Float[np.ndarray, "item"] | Float[np.ndarray, "item seed"],
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    level: float = 0.95,
    n_boot: int = 2000,
) -> tuple[float, float, float]:
    """(mean, low, high): the mean over items and its bootstrap interval; clusters are resampled with all their items.

    Args:
        values: a second axis (such as the seeds of a control) is resampled too, with the same draws for all items.
        clusters: the image, caption or scene of each item; None makes each item a cluster.
    Returns:
        three NaN if there are no items or all values are NaN; (mean, NaN, NaN) with fewer than two clusters. With fewer than
        about twenty clusters percentile intervals are somewhat too narrow, so tables give the number of clusters.
    Raises:
        ValueError: some values, but not all, are NaN, a value is infinite, or the clusters are not one per item.
    """
    values = np.asarray(values, dtype=float)
    codes = cluster_codes(clusters, len(values))
    if not values.size or np.isnan(values).all():
        return float("nan"), float("nan"), float("nan")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite: leave out their items.")
    mean, values, n_clusters = float(values.mean()), values.reshape(len(values), -1), n_different(codes)
    if n_clusters < 2:
        return mean, float("nan"), float("nan")
    n_columns, sizes = values.shape[1], np.bincount(codes)
    sums = np.zeros((n_clusters, n_columns))
    np.add.at(sums, codes, values)
    rng, means = np.random.default_rng(seed), []
    for drawn in cluster_draws(n_clusters, n_boot, rng):
        columns = rng.multinomial(n_columns, np.full(n_columns, 1 / n_columns), size=len(drawn)) / n_columns
        means.append(np.einsum("dc,dc->d", drawn @ sums, columns) / (drawn @ sizes))
    return mean, *_percentiles(np.concatenate(means), level)


def share_interval(
    hits: Float[np.ndarray, "item"] | Float[np.ndarray, "item seed"],
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    level: float = 0.95,
    n_boot: int = 2000,
) -> tuple[float, float, float]:
    """(share, low, high): `mean_interval` of hits in 0..1, with Wilson's interval in two cases.

    Wilson's interval, with the number of clusters as n, is used if all items agree, where resampling gives an interval of
    width 0, and if every cluster has one yes/no item.

    Raises:
        ValueError: a hit outside 0..1, or as `mean_interval`.
    """
    hits = np.asarray(hits, dtype=float)
    if ((hits < 0) | (hits > 1)).any():
        raise ValueError(f"expected hits in 0..1, got {hits.min():g}..{hits.max():g}.")
    share, low, high = mean_interval(hits, clusters, seed, level, n_boot)
    n_clusters = n_different(cluster_codes(clusters, len(hits)))
    binary = hits.size == len(hits) == n_clusters and np.isin(hits, (0, 1)).all()
    if n_clusters and (binary or share in (0, 1)):
        low, high = wilson(round(share * n_clusters), n_clusters, level)
    return share, low, high


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of Wilson's interval for a share of n independent items; NaN if n is 0."""
    if n == 0:
        return float("nan"), float("nan")
    interval = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return interval.low, interval.high


def standard_error(values: Float[np.ndarray, "item"], clusters: Sequence[Any] | None = None) -> float:
    """Standard error of the mean over items, clustered; NaN with fewer than two clusters.

    √(C/(C−1) · Σ_c (Σ_{i in c} (x_i − x̄))²) / n for C clusters and n items; with one item per cluster the ordinary formula.
    """
    values = np.asarray(values, dtype=float)
    codes = cluster_codes(clusters, len(values))
    n_clusters = n_different(codes)
    if n_clusters < 2:
        return float("nan")
    totals = np.bincount(codes, values - values.mean())
    return float(np.sqrt(n_clusters / (n_clusters - 1) * (totals**2).sum()) / len(values))


def n_different(codes: Int[np.ndarray, "item"]) -> int:
    """Number of different codes."""
    return len(np.unique(codes))


# ---- detection --------------------------------------------------------------------------------------


def detection(
    correct: Bool[np.ndarray, "item"],
    score: Float[np.ndarray, "item"],
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Any] | None = None,
) -> dict[str, float]:
    """AUROC and both APs of one score, with percentile bootstrap intervals that resample clusters.

    Args:
        score: higher for answers more likely to be right. Answers with the score NaN are left out and counted as `unscored`.
        clusters: the image or caption of each answer; None makes each answer a cluster.
    Returns:
        items, hallucinated and clusters (of the scored answers), unscored, resamples, and each figure with its `…_low` and
        `…_high`; NaN for those that are undefined.
    Raises:
        ValueError: the scores (or clusters) are not one per answer, or a score is infinite.
    """
    return _detection(correct, score, None, clusters, n_boot, seed, level)


def within_groups(
    correct: Bool[np.ndarray, "item"],
    score: Float[np.ndarray, "item"],
    groups: Sequence[str],
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Any] | None = None,
) -> dict[str, float]:
    """AUROC over pairs of answers of the same group. Returns as `detection`, with NaN for the APs.

    A cluster may have items in several groups (questions of several categories about one image), so clusters are
    resampled over all groups together.
    """
    return _detection(correct, score, groups, clusters, n_boot, seed, level)


def _detection(correct, score, groups, clusters, n_boot: int, seed: int, level: float) -> dict[str, float]:
    correct, score = _checked(correct, score)
    scored = ~np.isnan(score)
    y, s, codes = correct[scored], score[scored], cluster_codes(clusters, len(score))[scored]
    parts = [np.ones(len(y), bool)]
    if groups is not None:
        of_group = cluster_codes(groups, len(score))[scored]
        parts = [of_group == group for group in np.unique(of_group)]
    parts = [part for part in parts if y[part].any() and not y[part].all()]
    counts = {"items": len(y), "hallucinated": int((~y).sum()), "unscored": int((~scored).sum()), "clusters": n_different(codes)}
    figures = {name + end: float("nan") for name in FIGURES for end in ("", "_low", "_high")}
    if not parts:
        return counts | {"resamples": 0} | figures
    known = FIGURES if groups is None else FIGURES[:1]
    figures |= dict(zip(known, _average([(_points(y[part], s[part]), _pairs(y[part])) for part in parts])[:, 0].tolist()))
    draws = _resampled(y, s, codes, parts, n_boot, seed)
    compared = np.any(parts, axis=0)
    if min(n_different(codes[compared & kind]) for kind in (y, ~y)) >= MIN_CLUSTERS:
        for name, values in zip(known, draws):
            figures[f"{name}_low"], figures[f"{name}_high"] = _percentiles(values, level)
    return counts | {"resamples": int(np.isfinite(draws[0]).sum())} | figures


def weighted_figures(
    correct: Bool[np.ndarray, "item"], score: Float[np.ndarray, "item"], weights: Int[np.ndarray, "draw item"]
) -> Float[np.ndarray, "figure draw"]:
    """AUROC, AP for correct and AP for hallucinated, for each row of weights; NaN if a class has no weight."""
    order = np.argsort(-score, kind="stable")
    true, false = _cumulative(correct, weights, order, score[order])
    turned = order[::-1]
    turned_false, turned_true = _cumulative(correct, weights, turned, score[turned])
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.diff(false, axis=1, prepend=0)
        auroc = (steps * (true + np.pad(true, ((0, 0), (1, 0)))[:, :-1]) / 2).sum(1) / (true[:, -1] * false[:, -1])
        ap_correct, ap_hallucinated = _ap(true, false), _ap(turned_true, turned_false)
    figures = np.stack((auroc, ap_correct, ap_hallucinated))
    figures[:, (true[:, -1] == 0) | (false[:, -1] == 0)] = np.nan
    return figures


def _cumulative(correct, weights, order, ranked) -> tuple[Float[np.ndarray, "draw threshold"], ...]:
    """Cumulative weight of right and of hallucinated answers, in the given order, at each distinct score."""
    ends = np.append(np.nonzero(np.diff(ranked))[0], len(ranked) - 1)
    picked = weights[:, order].astype(float)
    right = correct[order]
    return np.cumsum(picked * right, 1)[:, ends], np.cumsum(picked * ~right, 1)[:, ends]


def _ap(true: Float[np.ndarray, "draw threshold"], false: Float[np.ndarray, "draw threshold"]) -> Float[np.ndarray, "draw"]:
    """Average precision: Σ (recall step) · precision; a threshold with no weight above it adds 0."""
    precision = np.nan_to_num(true / (true + false))
    return (np.diff(true, axis=1, prepend=0) * precision).sum(1) / true[:, -1]


def _resampled(y, s, codes, parts, n_boot: int, seed: int) -> Float[np.ndarray, "figure draw"]:
    """The figures of each resample of clusters, averaged over `parts`: the groups within which answers are compared."""
    _, codes = np.unique(codes, return_inverse=True)
    found = []
    for drawn in cluster_draws(codes.max() + 1, n_boot, np.random.default_rng(seed), len(y)):
        weights = drawn[:, codes]
        found.append(_average([(weighted_figures(y[p], s[p], weights[:, p]), _pairs(y[p], weights[:, p])) for p in parts]))
    return np.concatenate(found, axis=1)


def _average(parts: Sequence[tuple[Float[np.ndarray, "figure draw"], Float[np.ndarray, "draw"]]]) -> Float[np.ndarray, "figure draw"]:
    """Mean of the parts' figures, weighted by their numbers of (right, hallucinated) pairs; NaN without a pair."""
    pairs = np.stack([pairs for _, pairs in parts]).astype(float)
    with np.errstate(invalid="ignore"):
        shares = pairs / pairs.sum(0)
    return np.sum([np.where(share == 0, 0, values) * share for (values, _), share in zip(parts, shares)], axis=0)


def _pairs(y: Bool[np.ndarray, "item"], weights: Int[np.ndarray, "draw item"] | None = None) -> Int[np.ndarray, "draw"]:
    weights = np.ones((1, len(y)), int) if weights is None else weights
    return weights[:, y].sum(1) * weights[:, ~y].sum(1)


def _points(y: Bool[np.ndarray, "item"], s: Float[np.ndarray, "item"]) -> Float[np.ndarray, "figure 1"]:
    return np.array([[roc_auc_score(y, s)], [average_precision_score(y, s)], [average_precision_score(~y, -s)]])


def _percentiles(draws: Float[np.ndarray, "draw"], level: float) -> tuple[float, float]:
    kept = draws[np.isfinite(draws)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)


def _checked(correct, score) -> tuple[Bool[np.ndarray, "item"], Float[np.ndarray, "item"]]:
    y, s = np.asarray(correct, dtype=bool), np.asarray(score, dtype=float)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"expected one score an answer, got scores {s.shape} for answers {y.shape}.")
    if np.isinf(s).any():
        raise ValueError("a score is infinite: give NaN where there is none.")
    return y, s
