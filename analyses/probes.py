"""Linear probes with controls, on the residual stream, single heads, or the vision tower.

1. A probe item is a place in a prompt with a label, such as an object's image tokens and its colour, or the last position and the
   answer. Its features are the mean activation over the place, at each site: a hook point, or one head of it.
2. A probe is a logistic regression on standardised features (scikit-learn), fitted on some images and tested on others.
3. Control: the same with labels shuffled over all items, several times. Selectivity is accuracy minus the control's mean accuracy.
   The model need not use what a probe finds: test that by steering with `Probes.direction` or projecting it out.

k-sparse probes: `sparse_probe`, TransformerLens's `fit_sparse_probe` on the same items.

Sources: Alain & Bengio 2016; Hewitt & Liang 2019 (control tasks, selectivity); Gurnee et al. 2023 (sparse probing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.tools.analysis import fit_sparse_probe

from analyses.common.result import Result
from analyses.common.statistics import cluster_codes, share_interval
from analyses.data.examples import Example, image_key
from hooked_qwen2vl.geometry import Place
from hooked_qwen2vl.hook_names import is_vision

Site = str | tuple[str, int]
TRUTHS = ("color", "kind", "size", "row", "col")


@dataclass(frozen=True)
class ProbeData(Result):
    """Features and labels of probe items.

    Attributes:
        features: site -> [item d], float32; a site is the name of a hook point, followed by " head h" for one head.
        labels: [item]. images: [item] key of each item's image; items of one image stay together in the split.
        model_name: name of the model.
    """

    features: Mapping[str, Float[Tensor, "item d"]]
    labels: tuple[str, ...]
    images: tuple[str, ...]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per label: number of items and of images."""
        table = pd.DataFrame({"label": self.labels, "image": self.images})
        return table.groupby("label").agg(items=("image", "size"), images=("image", "nunique")).reset_index()


@dataclass(frozen=True)
class Probes(Result):
    """Fitted probes and their accuracy.

    Attributes:
        table: one row per site: accuracy on the test images with its 95 % interval (images resampled); control, control_largest: mean
            and largest accuracy of the controls; selectivity; majority: accuracy of always saying the most frequent training label;
            items, images: numbers in the test.
        weights: site -> [label d], biases: site -> [label], for features that are not standardised. labels: in that order.
        settings: C, test_share, controls, seed. model_name: name of the model.
    """

    table: pd.DataFrame
    weights: Mapping[str, Float[Tensor, "label d"]]
    biases: Mapping[str, Float[Tensor, "label"]]
    labels: tuple[str, ...]
    settings: Mapping[str, Any]
    model_name: str

    def to_dataframe(self) -> pd.DataFrame:
        return self.table

    def direction(self, site: str, label: str, against: str | None = None) -> Float[Tensor, "d"]:
        """Unit vector from the weights: those of a label minus those of `against`, or minus the mean over all other labels.

        Raises:
            ValueError: no such site or label.
        """
        if site not in self.weights or label not in self.labels or (against is not None and against not in self.labels):
            raise ValueError(
                f"expected a site of {', '.join(self.weights)} and labels of {', '.join(self.labels)}, got {site!r}, {label!r}."
            )
        weights, at = self.weights[site], self.labels.index(label)
        others = [n for n in range(len(weights)) if n != at] if against is None else [self.labels.index(against)]
        found = weights[at] - weights[others].mean(0)
        return found / found.norm()

    def plot(self, path: Any = None) -> Any:
        """Accuracy of every site with its interval, and the control's accuracy."""
        from analyses.views.probes import probes_plot

        return probes_plot(self, path)


def answers(example: Example) -> Iterable[tuple[Place, str]]:
    """Targets for `probe_data`: the last position, labelled with the right answer."""
    return [("last", example.answer)]


def things(truth: str = "color", box_of: Callable[[Any], Place] = lambda thing: cast(Any, tuple(map(float, thing.box)))) -> Callable:
    """Targets for `probe_data`: the image tokens of every object of the embedded world, labelled with an attribute of it.

    Args:
        truth: one of TRUTHS. box_of: object -> place; the object's box by default.
    Raises:
        ValueError: an unknown truth; when called: an example that is not from the embedded world.
    """
    if truth not in TRUTHS:
        raise ValueError(f"truth must be one of {', '.join(TRUTHS)}, got {truth!r}.")

    def targets(example: Example) -> Iterable[tuple[Place, str]]:
        if example.item is None:
            raise ValueError(f"{example.id} is no question of the embedded world: give targets, a function of your own.")
        return [(box_of(thing), str(getattr(thing, truth))) for thing in example.item.scene.things if not thing.path]

    return targets


@torch.no_grad()
def probe_data(
    model: Any,
    data: Iterable[Example],
    sites: Sequence[Site] | None = None,
    targets: Callable[[Example], Iterable[tuple[Place, str]]] = answers,
    progress: bool = True,
) -> ProbeData:
    """Features and labels of some questions.

    Args:
        sites: hook points of the decoder, [batch pos d] or [batch pos head d_head] (flattened; (name, head) for one head), or of the
            tower, [1 patch d] (an image token is the mean of its patches). None: the residual stream that enters each block.
        targets: example -> (place, label) pairs: `answers`, `things("color")`, or your own. A box of an image is used once, even if
            several questions are about that image.
    Raises:
        ValueError: no item, a head that the site does not have, or a site of the tower with positions outside the first image.
    """
    sites = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)] if sites is None else list(sites)
    names = {_split(site)[0] for site in sites}
    features: dict[str, list[Tensor]] = {_site_name(site): [] for site in sites}
    labels: list[str] = []
    images: list[str] = []
    seen: set[tuple[str, str]] = set()
    for example in tqdm(data, desc="probe items", unit="question", disable=not progress, delay=2):
        image = image_key(example)
        wanted = [(place, label) for place, label in targets(example) if not (isinstance(place, tuple) and (image, str(place)) in seen)]
        if not wanted:
            continue
        seen |= {(image, str(place)) for place, _ in wanted}
        inputs = model.to_inputs(example.question, images=list(example.images))
        _, cache = model.run_with_cache(inputs, names_filter=list(names), stop_at_layer=model.cfg.n_layers)
        for place, label in wanted:
            positions = inputs.resolve(place)
            for site in sites:
                features[_site_name(site)].append(_at(cache, site, inputs, positions))
            labels.append(str(label))
            images.append(image)
    if not labels:
        raise ValueError("no question has a place with a label: there is nothing to probe.")
    stacked = {site: torch.stack(rows) for site, rows in features.items()}
    return ProbeData(stacked, tuple(labels), tuple(images), str(model.cfg.model_name))


def fit_probes(data: ProbeData, test_share: float = 0.3, C: float = 0.1, controls: int = 3, seed: int = 0, progress: bool = True) -> Probes:
    """Fits a probe for each site, tests it on other images, and compares it with probes of shuffled labels.

    Args:
        test_share: share of the images for the test. C: scikit-learn's inverse strength of the penalty. controls: number of shuffles.
    Raises:
        ValueError: no image in training or test, fewer than two labels in training, or a label that only the test has.
    """
    labels, codes = np.array(data.labels), cluster_codes(data.images, len(data.labels))
    order = np.random.default_rng(seed).permutation(codes.max() + 1)
    n_test = round(test_share * len(order))
    test = np.isin(codes, order[:n_test])
    known = sorted(set(labels[~test]))
    if not 0 < n_test < len(order) or len(known) < 2 or (unseen := set(labels[test]) - set(known)):
        what = (
            f"labels that only the test images have: {sorted(unseen)}"
            if len(known) > 1 and 0 < n_test < len(order)
            else f"{len(known)} labels"
        )
        raise ValueError(
            f"expected two labels or more on both sides of {len(order)} images with test_share={test_share}, got {what}; take more data."
        )
    rows, weights, biases = [], {}, {}
    for site, values in tqdm(data.features.items(), desc="probes", unit="site", disable=not progress, delay=2):
        x = values.numpy().astype(np.float64)
        model = _fitted(x[~test], labels[~test], C)
        hits = model.predict(x[test]) == labels[test]
        share, low, high = share_interval(hits.astype(float), [data.images[i] for i in np.flatnonzero(test)], seed)
        chance = []
        for number in range(controls):
            shuffled = np.random.default_rng([seed, number]).permutation(labels)
            chance.append(float((_fitted(x[~test], shuffled[~test], C).predict(x[test]) == shuffled[test]).mean()))
        control = {"control": np.mean(chance), "control_largest": max(chance), "selectivity": share - np.mean(chance)} if controls else {}
        most = pd.Series(labels[~test]).mode()[0]
        about = {"majority": float((labels[test] == most).mean()), "items": int(test.sum()), "images": n_test}
        rows.append({"site": site, "accuracy": share, "accuracy_low": low, "accuracy_high": high, **control, **about})
        weights[site], biases[site] = _plain(model, len(known))
    settings = {"C": C, "test_share": test_share, "controls": controls, "seed": seed}
    return Probes(pd.DataFrame(rows), weights, biases, tuple(known), settings, data.model_name)


def sparse_probe(data: ProbeData, site: str, label: str, k: int = 4, seed: int = 0, **settings: Any) -> Any:
    """TransformerLens's k-sparse probe for one label against all others: it chooses the k units of a site that predict the label.

    It splits into training and test by items, not by images. If an image must not be in both, use one item per image.

    Args:
        settings: further arguments of `transformer_lens.tools.analysis.fit_sparse_probe`.
    Raises:
        ValueError: no such site or label.
    """
    if site not in data.features or label not in data.labels:
        raise ValueError(f"expected a site of {', '.join(data.features)} and a label of the data, got {site!r} and {label!r}.")
    return fit_sparse_probe(data.features[site], torch.tensor([found == label for found in data.labels]), k=k, seed=seed, **settings)


def _fitted(x: np.ndarray, labels: np.ndarray, C: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)).fit(x, labels)


def _plain(model: Any, n_labels: int) -> tuple[Tensor, Tensor]:
    """Weights and biases for features that are not standardised, one row per label (also for two labels, where scikit-learn has one)."""
    scaler, logistic = model[0], model[-1]
    weights = logistic.coef_ / scaler.scale_
    biases = logistic.intercept_ - weights @ scaler.mean_
    if n_labels == 2:
        weights, biases = np.concatenate((-weights, weights)) / 2, np.concatenate((-biases, biases)) / 2
    return torch.from_numpy(weights).float(), torch.from_numpy(biases).float()


def _split(site: Site) -> tuple[str, int | None]:
    return (site, None) if isinstance(site, str) else site


def _site_name(site: Site) -> str:
    name, head = _split(site)
    return name if head is None else f"{name} head {head}"


def _at(cache: Any, site: Site, inputs: Any, positions: Tensor) -> Float[Tensor, "d"]:
    name, head = _split(site)
    if is_vision(name):
        values = _image_tokens(cache.vision[name], inputs, positions)
    else:
        values = cache[name][0, positions]
    if head is not None:
        if values.ndim != 3 or not 0 <= head < values.shape[1]:
            raise ValueError(f"{name} has no head {head}: its activations are {tuple(values.shape[1:])} at a position.")
        values = values[:, head]
    return values.float().mean(0).flatten().cpu()


def _image_tokens(packed: Tensor, inputs: Any, positions: Tensor) -> Float[Tensor, "n *rest"]:
    """The tower's activations at image tokens of the first image: the mean over each token's patches."""
    image = inputs.positions("image[0]").tolist()
    if outside := [place for place in positions.tolist() if place not in image]:
        raise ValueError(f"positions {outside[:5]} are not in the first image: the tower has nothing there.")
    rows, cols = inputs.grid()
    raster = inputs.unpack_image(packed[0])
    side = raster.shape[0] // rows
    tokens = raster.unflatten(0, (rows, side)).unflatten(2, (cols, side)).float().mean((1, 3)).flatten(0, 1)
    return tokens[[image.index(place) for place in positions.tolist()]]
