"""Intervals over clustered data: resampling loops by hand, coverage on data whose truth is known, and who resamples what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from every_result import flip_study, grounding_experiment
from every_result import hallucinations as made_up
from PIL import Image
from scipy.stats import norm, sem
from sklearn.metrics import average_precision_score, roc_auc_score

from analyses.common.statistics import cluster_codes, detection, mean_interval, share_interval, standard_error, wilson, within_groups
from analyses.data.examples import Example, image_key
from analyses.experiments.hallucination import WITHIN, claims_of
from analyses.experiments.locality import LocalityStudy
from analyses.knockout import Knockout
from hooked_qwen2vl.image_hash import image_hash

CAPTIONS, MENTIONS = 40, 8
CAPTION = np.repeat(np.arange(CAPTIONS), MENTIONS)


def mentions(rng: np.random.Generator, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """(right, score) of 40 captions of 8 mentions: each caption is mostly right or mostly made up, and scored as a whole."""
    effect, noise = (np.repeat(rng.normal(size=CAPTIONS), MENTIONS) for _ in range(2))
    right = rng.random(CAPTION.size) < 1 / (1 + np.exp(-spread * effect))
    return right, 0.4 * effect + noise + 0.3 * rng.normal(size=CAPTION.size)


def resamples(clusters: np.ndarray, n_boot: int, seed: int) -> list[np.ndarray]:
    """The items of each resample: the drawn clusters one after the other, whole."""
    names = list(dict.fromkeys(clusters.tolist()))
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot)
    return [np.concatenate([np.flatnonzero(clusters == name) for name, times in zip(names, draw) for _ in range(times)]) for draw in counts]


# ---- means and shares -------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_percentiles_of_resampled_clusters():
    rng = np.random.default_rng(0)
    clusters = np.array(["c", "a", "b", "d", "e", "f"])[rng.integers(0, 6, 50)]  # of unequal size, and not in order
    values = rng.normal(size=50)
    means = [values[chosen].mean() for chosen in resamples(clusters, 300, 7)]
    mean, low, high = mean_interval(values, clusters, seed=7, level=0.9, n_boot=300)
    assert mean == pytest.approx(values.mean()) and (low, high) == pytest.approx(tuple(np.percentile(means, (5, 95))))
    assert mean_interval(values, clusters, seed=7, level=0.9, n_boot=300) == (mean, low, high)
    assert mean_interval(values, clusters, seed=8, level=0.9, n_boot=300)[1] != low


def test_one_item_a_cluster_is_the_ordinary_bootstrap():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    names = [f"image {i}" for i in rng.permutation(400)]
    assert mean_interval(values, names) == mean_interval(values)
    mean, low, high = mean_interval(values)
    assert (high - low) / (2 * 1.96 * values.std() / 20) == pytest.approx(1, abs=0.1) and low < mean < high
    right, score = mentions(rng)
    assert detection(right, score, 50, clusters=range(320)) == detection(right, score, 50)
    assert standard_error(values, names) == pytest.approx(standard_error(values)) == pytest.approx(sem(values))


@pytest.mark.parametrize("copies", [2, 8])
def test_items_that_repeat_their_cluster_tell_nothing(copies):
    rng = np.random.default_rng(2)
    right, score = rng.random(60) < 0.6, rng.normal(size=60)
    clusters = np.repeat(np.arange(60), copies)
    for function in (mean_interval, lambda values, clusters=None: detection(values > 0, score_of[len(values)], 100, clusters=clusters)):
        score_of = {60: score + right, 60 * copies: np.repeat(score + right, copies)}
        once, repeated = function(right.astype(float)), function(np.repeat(right.astype(float), copies), clusters)
        if isinstance(once, dict):
            once, repeated = ([found[f"auroc{end}"] for end in ("", "_low", "_high")] for found in (once, repeated))
        assert repeated == pytest.approx(once)
    assert standard_error(np.repeat(score, copies), clusters) == pytest.approx(sem(score))


def test_seeds_are_resampled_beside_clusters():
    """All that varies is common to a seed's items: the interval is that of three numbers, however many items there are."""
    values = np.tile([0.0, 0.0, 3.0], (200, 1))
    mean, low, high = mean_interval(values, np.arange(200) // 4)
    assert (mean, low, high) == (1.0, 0.0, 3.0)  # all three draws are the third seed in 1 of 27 resamples
    assert mean_interval(values.mean(1), np.arange(200) // 4)[1:] == pytest.approx((1.0, 1.0))


def test_wilson_is_the_formula():
    z, n, k = norm.ppf(0.975), 50, 47
    p = k / n
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    assert wilson(k, n) == pytest.approx((low, high))
    hits = np.arange(n) < k
    assert share_interval(hits) == pytest.approx((p, low, high)) and share_interval(hits, range(n)) == pytest.approx((p, low, high))
    assert all(np.isnan(wilson(0, 0)))


def test_a_share_without_spread_has_an_interval():
    """200 of 200 hits of 10 images are ten observations, not an interval of width 0."""
    images = np.arange(200) // 20
    for hits, expected in ((np.ones(200), wilson(10, 10)), (np.zeros(200), wilson(0, 10))):
        assert mean_interval(hits, images)[1:] == (hits[0], hits[0])
        assert share_interval(hits, images) == (hits[0], *expected)
        assert share_interval(np.tile(hits, (3, 1)).T, images) == (hits[0], *expected)
    some = np.arange(200) % 3 == 0
    assert share_interval(some, images) == mean_interval(some, images)


def test_what_has_no_interval():
    assert all(np.isnan(mean_interval([]))) and all(np.isnan(mean_interval([np.nan, np.nan])))
    assert mean_interval([1.0, 2.0], ["a", "a"])[0] == 1.5 and all(np.isnan(mean_interval([1.0, 2.0], ["a", "a"])[1:]))
    assert np.isnan(standard_error([1.0, 2.0], ["a", "a"]))
    for values in ([1.0, np.nan], [1.0, np.inf]):
        with pytest.raises(ValueError, match="1 of 2 values are not finite"):
            mean_interval(values)
    with pytest.raises(ValueError, match="in 0..1"):
        share_interval([0.5, 1.5])
    for clusters in (["a"], ["a", None], ["a", float("nan")]):
        with pytest.raises(ValueError, match="cluster"):
            mean_interval([1.0, 2.0], clusters)
    assert cluster_codes([3, "a", 3, ("x", 1)], 4).tolist() == [0, 1, 0, 2]


def test_coverage_of_a_clustered_mean():
    """Captions of which half the mentions are right on average: nineteen of twenty intervals by caption hold that half."""
    rng, covered = np.random.default_rng(3), {"caption": [], "mention": []}
    for seed in range(200):
        right, _ = mentions(rng)
        for name, clusters in (("caption", CAPTION), ("mention", None)):
            _, low, high = mean_interval(right, clusters, seed, n_boot=300)
            covered[name].append(low <= 0.5 <= high)
    assert 0.90 <= np.mean(covered["caption"]) <= 0.98 and np.mean(covered["mention"]) < 0.75


# ---- detection --------------------------------------------------------------------------------------


def test_intervals_of_detection_are_percentiles_of_resampled_captions():
    right, score = mentions(np.random.default_rng(4))
    score = score.round(1)  # ties
    draws = resamples(CAPTION, 200, 5)
    by_hand = {
        "auroc": [roc_auc_score(right[chosen], score[chosen]) for chosen in draws],
        "ap_correct": [average_precision_score(right[chosen], score[chosen]) for chosen in draws],
        "ap_hallucinated": [average_precision_score(~right[chosen], -score[chosen]) for chosen in draws],
    }
    ours = detection(right, score, 200, seed=5, clusters=CAPTION)
    for name, values in by_hand.items():
        assert (ours[f"{name}_low"], ours[f"{name}_high"]) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))))
    assert (ours["clusters"], ours["items"], ours["resamples"]) == (CAPTIONS, 320, 200)


def test_intervals_within_groups_resample_captions_of_all_groups():
    """Captions have mentions of both groups: drawn once for both."""
    rng = np.random.default_rng(6)
    right, score = mentions(rng)
    groups = np.where(rng.random(320) < 0.3, "a", "b")
    values = []
    for chosen in resamples(CAPTION, 100, 5):
        aurocs, pairs = [], []
        for group in "ab":
            here = chosen[groups[chosen] == group]
            aurocs.append(roc_auc_score(right[here], score[here]))
            pairs.append(right[here].sum() * (~right[here]).sum())
        values.append(np.average(aurocs, weights=pairs))
    ours = within_groups(right, score, groups, 100, seed=5, clusters=CAPTION)
    assert (ours["auroc_low"], ours["auroc_high"]) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))))


def test_by_caption_an_interval_is_wider_and_honest():
    """Scored as whole captions: by mention the interval of AUROC is far too narrow, and misses the truth too often."""
    rng = np.random.default_rng(8)
    many = [mentions(rng, spread=20.0) for _ in range(400)]
    truth = roc_auc_score(*(np.concatenate(values) for values in zip(*many)))
    covered, widths = {"caption": [], "mention": []}, {"caption": [], "mention": []}
    for seed, (right, score) in enumerate(many[:120]):
        for name, clusters in (("caption", CAPTION), ("mention", None)):
            found = detection(right, score, 200, seed, clusters=clusters)
            covered[name].append(found["auroc_low"] <= truth <= found["auroc_high"])
            widths[name].append(found["auroc_high"] - found["auroc_low"])
    # measured: by caption 0.93 and width 0.30, by mention 0.48 and width 0.12
    assert np.mean(covered["caption"]) >= 0.88 > 0.65 > np.mean(covered["mention"])
    assert np.mean(widths["caption"]) > 2 * np.mean(widths["mention"])


def test_few_clusters_of_a_class_have_no_interval():
    """Twenty hallucinated mentions of four captions are four observations."""
    right, captions = np.r_[np.ones(40, bool), np.zeros(20, bool)], np.r_[np.arange(40), 40 + np.arange(20) // 5]
    score = np.random.default_rng(9).normal(size=60)
    assert np.isfinite(detection(right, score, 50)["auroc_low"])
    few = detection(right, score, 50, clusters=captions)
    assert np.isfinite(few["auroc"]) and np.isnan(few["auroc_low"]) and np.isnan(few["ap_correct_high"])
    assert np.isnan(within_groups(right, score, ["a"] * 60, 50, clusters=captions)["auroc_low"])


def test_unscored_items_leave_their_cluster_as_it_is():
    right, score = mentions(np.random.default_rng(10))
    gap = np.arange(320) % 5 == 0
    ours = detection(right, np.where(gap, np.nan, score), 50, clusters=CAPTION)
    kept = detection(right[~gap], score[~gap], 50, clusters=CAPTION[~gap])
    assert ours == {**kept, "unscored": 64}


# ---- who resamples what -----------------------------------------------------------------------------


def test_claims_of_one_image_are_one_cluster():
    result = made_up()
    rng = np.random.default_rng(11)
    right, score = mentions(rng)
    claims = pd.DataFrame({"id": CAPTION, "image": [f"{i // 2}.png" for i in CAPTION], "category": "objects", "said": "",
                           "correct": right, "score": score})  # fmt: skip
    result = dataclasses.replace(result, claims=claims, methods=("score",), n_boot=100)
    for cluster, labels in (("image", claims["image"]), ("id", claims["id"]), ("claim", range(320))):
        figures = result.to_dataframe().set_index("category").loc[["all", WITHIN], ["auroc_low", "auroc_high", "clusters"]]
        expected = detection(right, score, 100, clusters=labels)
        assert result.cluster == cluster and (figures == [expected[name] for name in figures]).all(axis=None)
        result = dataclasses.replace(result, claims=result.claims.drop(columns=cluster, errors="ignore"))
    assert "resamples of claims." in result.markdown()


def test_flips_of_one_image_are_one_cluster():
    study = flip_study()
    flips = study.flips.assign(removed=study.flips["prompt"] < 5, image=study.flips["prompt"] // 2)
    images = dataclasses.replace(study, flips=flips).summary().iloc[0]
    assert images[["low", "high"]].tolist() == list(mean_interval(flips["removed"], flips["image"])[1:])
    assert images[["clusters", "resampled"]].tolist() == [5, "image"]
    prompts = dataclasses.replace(study, flips=flips.drop(columns="image")).summary().iloc[0]
    assert prompts[["clusters", "resampled"]].tolist() == [10, "prompt"]
    assert prompts["high"] - prompts["low"] < images["high"] - images["low"]


def test_pairs_and_items_of_one_image_are_one_cluster():
    rng = np.random.default_rng(12)
    spans, images = torch.tensor(np.repeat(rng.normal(size=(6, 2, 5)), 4, 0)), tuple("abcdef"[i // 4] for i in range(24))
    hits = tuple(i // 4 % 2 == 0 for i in range(24))
    study = LocalityStudy(hits, (0.1,) * 24, (0.1,) * 24, spans, ("c",) * 24, 1, 0, "m", images)
    assert list(study.summary().values())[4:6] == list(mean_interval(hits, images)[1:]) and study.summary()["images"] == 6
    assert study.to_dataframe()["standard_error"][0] == pytest.approx(sem(spans[::4, 0, 0]))
    knockout = Knockout(spans.permute(2, 1, 0), torch.ones(24), ("f",) * 5, 1, 0, "m", images)
    assert knockout.to_dataframe()["standard_error"][0] == pytest.approx(sem(spans[::4, 0, 0]))
    joined = Knockout.join([knockout, knockout])
    assert joined.images == images * 2
    with pytest.raises(ValueError, match="of all, or of none"):
        Knockout.join([knockout, dataclasses.replace(knockout, images=())])


def test_items_of_one_scene_are_one_cluster():
    result = grounding_experiment()
    table = result.table.assign(scene=result.table["item"] // 3)
    row = dataclasses.replace(result, table=table).to_dataframe(resamples=50).iloc[0]
    some = table[table["method"] == row["method"]]
    assert (row["items"], row["scenes"]) == (30, 10)
    assert row[["ap", "ap_low", "ap_high"]].tolist() == list(mean_interval(some["ap"], some["scene"], n_boot=50))


# ---- which image is which ---------------------------------------------------------------------------


def test_hashes_tell_images_apart(tmp_path):
    red = Image.new("RGB", (4, 6), "red")
    turned = Image.frombytes("RGB", (6, 4), red.tobytes())
    palettes = [Image.new("P", (2, 2)) for _ in range(2)]
    palettes[1].putpalette([9, 9, 9] * 256)
    array = np.asarray(red)
    different = [
        red, turned, red.convert("RGBA"), picture(4, 6), *palettes, array, array.reshape(6, 4, 3).transpose(1, 0, 2), array.astype(np.int16),
        torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3), "a.png", "b.png", "c/a.png",
    ]  # fmt: skip
    assert len({image_hash(image) for image in different}) == len(different)
    assert image_hash(red) == image_hash(red.copy()) and image_hash("a.png") == image_hash(tmp_path.parent.__class__("a.png"))
    files = [tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"]
    for file in files:
        file.parent.mkdir()
        red.save(file)
    assert image_hash(files[0]) != image_hash(files[1])
    assert image_hash(files[0], wherever=True) == image_hash(str(files[1]), wherever=True)
    files[1].write_bytes(b"another length")
    assert image_hash(files[0], wherever=True) != image_hash(files[1], wherever=True)
    with pytest.raises(ValueError, match="expected an image"):
        image_hash(object())
    with pytest.raises(ValueError, match="expected an image"), files[0].open("rb") as opened:  # it has `detach`, as a tensor has
        image_hash(opened)


def test_questions_about_one_image_share_a_key():
    shot = picture(56, 56)
    one, two, other = (Example(f"{n}", "?", "", (image,)) for n, image in enumerate((shot, shot.copy(), picture(56, 56, seed=9))))
    assert image_key(one) == image_key(two) != image_key(other)
    assert image_key(Example("x", "?", "")) == "x" and claims_of([], []) == []
