"""How well a score tells right answers from hallucinated ones: AUROC and average precision, with intervals.

1. A score is higher for answers more likely to be right. AUROC is the chance that a right answer scores above a
   hallucinated one (ties count half); AP for "correct" ranks by the score, AP for "hallucinated" by its negative. A
   score that knows nothing has AUROC 0.5 and an AP equal to the share of its class.
2. Point values are scikit-learn's. Intervals are percentiles over seeded resamples of the items; the resamples are
   weighted counts through the same formulas, all at once (equal to scikit-learn's `sample_weight`, see the tests).
3. Where one of the two classes is missing there is nothing to tell apart: every figure is NaN beside the counts. A
   resample without one of them is left out and counted. With fewer than five answers of either class there is a value
   but no interval: resampling so few again and again would give a far too narrow one.
4. Pooled over categories, a score can win by telling easy categories from hard ones. `within` compares right and
   hallucinated answers of one category only: the mean of the categories' AUROCs, weighted by their numbers of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, roc_auc_score

FIGURES = ("auroc", "ap_correct", "ap_hallucinated")
MIN_CLASS = 5  # answers of either class below which there is no interval
_CHUNK = 2_000_000  # weights held at a time


def detection(
    correct: Bool[np.ndarray, "item"],
    score: Float[np.ndarray, "item"],
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """AUROC and both APs of one score, with percentile bootstrap intervals.

    Args:
        score: higher for answers more likely right; NaN where there is none, which are left out and counted.
    Returns:
        items, hallucinated (both among the scored), unscored, resamples, and for each figure its value,
        `…_low` and `…_high`; NaN where they do not exist.
    Raises:
        ValueError: not one score an answer, or an infinite one.
    """
    y, s, unscored = _checked(correct, score)
    counts = {"items": len(y), "hallucinated": int((~y).sum()), "unscored": unscored}
    if y.all() or not y.any():  # also without items
        nothing = {name + end: float("nan") for name in FIGURES for end in ("", "_low", "_high")}
        return counts | {"resamples": 0} | nothing
    points = (roc_auc_score(y, s), average_precision_score(y, s), average_precision_score(~y, -s))
    draws = _resampled(y, s, n_boot, seed)
    enough = min(y.sum(), (~y).sum()) >= MIN_CLASS
    intervals = {name: _interval(draws[index], level, enough) for index, name in enumerate(FIGURES)}
    figures: dict[str, float] = {}
    for name, point in zip(FIGURES, points):
        figures |= {name: float(point), f"{name}_low": intervals[name][0], f"{name}_high": intervals[name][1]}
    return counts | {"resamples": int(np.isfinite(draws[0]).sum())} | figures


def within(
    correct: Bool[np.ndarray, "item"],
    score: Float[np.ndarray, "item"],
    groups: Sequence[str],
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, float]:
    """AUROC over pairs of one group only; `detection`'s columns, without APs. Items are resampled inside their group."""
    labels = np.asarray(groups)
    total = {"items": 0, "hallucinated": 0, "unscored": 0}
    points, draws, pairs, classes = [], [], [], np.zeros(2, int)
    for number, label in enumerate(dict.fromkeys(labels.tolist())):
        y, s, unscored = _checked(np.asarray(correct)[labels == label], np.asarray(score)[labels == label])
        total["items"] += len(y)
        total["hallucinated"] += int((~y).sum())
        total["unscored"] += unscored
        if y.any() and not y.all():
            classes += (int(y.sum()), int((~y).sum()))
            points.append(roc_auc_score(y, s))
            pairs.append(int(y.sum()) * int((~y).sum()))
            draws.append(_resampled(y, s, n_boot, seed + number, pairs=True))
    empty = {f"{name}{end}": float("nan") for name in FIGURES for end in ("", "_low", "_high")}
    if not points:
        return total | {"resamples": 0} | empty
    weights = np.stack([pair for _, pair in draws])
    values = np.nansum(np.stack([auroc for auroc, _ in draws]) * weights, 0)
    with np.errstate(invalid="ignore"):
        values = np.where(weights.sum(0) > 0, values / weights.sum(0), np.nan)
    low, high = _interval(values, level, min(classes) >= MIN_CLASS)
    figures = {"auroc": float(np.average(points, weights=pairs)), "auroc_low": low, "auroc_high": high}
    return total | {"resamples": int(np.isfinite(values).sum())} | empty | figures


def weighted_figures(
    correct: Bool[np.ndarray, "item"], score: Float[np.ndarray, "item"], weights: Int[np.ndarray, "draw item"]
) -> Float[np.ndarray, "figure draw"]:
    """AUROC, AP for correct and AP for hallucinated under each row of weights; NaN where a class has none."""
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
    """Weight of right and of hallucinated answers down to each distinct score."""
    ends = np.append(np.nonzero(np.diff(ranked))[0], len(ranked) - 1)
    picked = weights[:, order].astype(float)
    right = correct[order]
    return np.cumsum(picked * right, 1)[:, ends], np.cumsum(picked * ~right, 1)[:, ends]


def _ap(true: Float[np.ndarray, "draw threshold"], false: Float[np.ndarray, "draw threshold"]) -> Float[np.ndarray, "draw"]:
    """Σ (recall step) · precision; thresholds that no weight has reached add nothing."""
    precision = np.nan_to_num(true / (true + false))
    return (np.diff(true, axis=1, prepend=0) * precision).sum(1) / true[:, -1]


def _resampled(y: np.ndarray, s: np.ndarray, n_boot: int, seed: int, pairs: bool = False):
    """[figure draw]; with `pairs`, AUROC [draw] and the number of right-hallucinated pairs [draw]."""
    rng, n = np.random.default_rng(seed), len(y)
    step = max(1, _CHUNK // n)
    figures, counts = [np.empty((len(FIGURES), 0))], [np.empty(0)]
    for start in range(0, n_boot, step):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(step, n_boot - start))
        figures.append(weighted_figures(y, s, weights))
        counts.append(weights[:, y].sum(1) * weights[:, ~y].sum(1))
    joined = np.concatenate(figures, axis=1)
    return (joined[0], np.concatenate(counts)) if pairs else joined


def _interval(draws: Float[np.ndarray, "draw"], level: float, enough: bool) -> tuple[float, float]:
    kept = draws[np.isfinite(draws)]
    if not enough or not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, (50 * (1 - level), 50 * (1 + level)))
    return float(low), float(high)


def _checked(correct, score) -> tuple[Bool[np.ndarray, "item"], Float[np.ndarray, "item"], int]:
    y, s = np.asarray(correct, dtype=bool), np.asarray(score, dtype=float)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"expected one score an answer, got scores {s.shape} for answers {y.shape}.")
    if np.isinf(s).any():
        raise ValueError("a score is infinite: give NaN where there is none.")
    scored = ~np.isnan(s)
    return y[scored], s[scored], int((~scored).sum())
