"""Every result class has a picture, and at its worst size each is legible: by properties of what is drawn, not by pixels."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import warnings
from dataclasses import replace
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
import torch
from every_result import (
    COLS,
    DOMAINS,
    HARD,
    HEADS,
    LAYERS,
    NAME,
    POSITIONS,
    QUESTION,
    RESULTS,
    ROWS,
    flip_study,
    hallucinations,
    image,
    lens,
    streams,
)
from every_result import ablations as every_ablation
from matplotlib import colormaps, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import rgb_to_hsv, to_hex, to_rgba_array
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from PIL import Image
from scipy import ndimage

import analyses
from analyses.common.result import Result
from analyses.contextual_lens import Grounding
from analyses.knockout import Knockout
from analyses.saliency import Saliency
from analyses.views import text as views_text
from analyses.views.attention import attention_on_image
from analyses.views.figure import LONGEST, Figure, luminance, on_image
from analyses.views.neurons import streams_plot
from analyses.views.patching import recovery_map, recovery_on_image
from analyses.views.text import columns, drawable, families, line, readable, visible
from hooked_qwen2vl.scenes import sample
from hooked_qwen2vl.scenes.contact_sheets import contact_figure

# Public dataclasses that are no results, and why.
NO_RESULTS = {
    "Sweep": "TransformerLens's result of a patching sweep, with its tables and plots",
    "ProbeData": "features and labels; Probes is the result",
    "Dictionary": "weights that are put into a run",
    "Where": "places that an intervention acts on",
    "Done": "an experiment's rows, before a result is made of them",
    "Asked": "an encoded question, on the way to Hallucinations",
    "Answer": "what a model said, before it is judged",
    "Batch": "encoded questions, on the way to a result",
    "Candidate": "a pair that is not checked yet; part of Pairs",
    "Cell": "a place to patch",
    "Claim": "a row of Hallucinations",
    "Cluster": "where a run's shards are worked on",
    "Condition": "what to switch off; a row of Ablations",
    "Evidence": "a forward's activations, kept for the scores",
    "Example": "a question",
    "Failure": "a question without a result; a row of a run's failures",
    "Fired": "an example of TopImages",
    "Firings": "counts, with a store of their own; DomainNeurons is their result",
    "FlipTest": "a row of FlipStudy",
    "Kind": "what a cell of a data file may hold",
    "Memory": "an estimate, part of a run's plan",
    "Pair": "part of Pairs",
    "Shard": "of a run, before it is written",
    "Question": "an Example of a benchmark",
    "Predictions": "tensors of one reading; LogitLens is their result",
    "Run": "of compare: part of Comparison; of runs: a plan, and how far it is",
    "Schema": "what a row of a data file may hold",
    "Selection": "one module's part of DomainNeurons",
    "Size": "of a question, part of a run's plan",
    "Strip": "a prompt as circuitsvis shows it",
    "TextPrompt": "a prompt of a model that has no Inputs",
    "Unreadable": "a row that is no question",
    "TextBank": "embeddings to compare with; Neighbours is the result",
}  # fmt: skip


def dataclasses_of_analyses() -> set[type]:
    found = set()
    for info in pkgutil.walk_packages(analyses.__path__, "analyses."):
        module = importlib.import_module(info.name)
        found |= {
            kind for name, kind in vars(module).items()
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__.startswith("analyses.") and not name.startswith("_")
        }  # fmt: skip
    return found


def test_every_result_class_has_a_picture_and_comes_back_from_disk():
    found = dataclasses_of_analyses()
    results = {kind for kind in found if hasattr(kind, "to_dataframe") and kind.__name__ not in NO_RESULTS}
    assert results == set(RESULTS) == set(DRAWN)
    assert all(hasattr(kind, "plot") and issubclass(kind, Result) for kind in results)
    unknown = {kind.__name__ for kind in found - results} - set(NO_RESULTS)
    assert not unknown, f"{unknown}: a result needs to_dataframe, plot and an entry in every_result; else say here why it is none"


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_a_notebook_shows_a_result_as_a_table(kind):
    """Not its tensors; and what is text in it is no markup."""
    result = RESULTS[kind]()
    shown = result._repr_html_()
    assert kind.__name__ in shown and "tensor(" not in shown and len(shown) < 30_000
    assert all(f"<th style='text-align:left'>{field.name}</th>" in shown for field in dataclasses.fields(result))
    assert "<script" not in shown and "</script" not in shown and shown.count("<b>") == 1


# ---- what each picture shows --------------------------------------------------------------------


def maps(figure) -> list:
    """Images that are coloured by a value, colour bars left out."""
    return [drawn for axes in figure.axes for drawn in axes.images if drawn.get_array().ndim == 2 and drawn.get_cmap().name != "gray"]


def shows(drawn, values, low, high) -> bool:
    shown = np.ma.filled(drawn.get_array().astype(float), np.nan)
    return np.allclose(shown, np.asarray(values, dtype=float), equal_nan=True) and np.allclose(drawn.get_clim(), (low, high))


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def heads(figure, result):
    for axes, kind in zip(figure.axes, result.text):
        assert np.allclose(axes.collections[0].get_offsets(), torch.stack((result.text[kind].flatten(), result.image[kind].flatten()), -1))
        assert axes.get_title() == kind and "text" in axes.get_xlabel()


def ablations(figure, result):
    table = result.accuracy()
    (drawn,) = maps(figure)
    assert drawn.get_array().shape == (len(labels(figure.axes[0].yaxis)), len(DOMAINS) + 1) and drawn.get_clim()[1] == 1
    assert np.isclose(sorted(drawn.get_array().flatten()), sorted(table["accuracy"])).all()


def chair(figure, result):
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [result.chair_s, result.chair_i] and left.get_xlim() == (0, 1)
    assert sum(bar.get_width() for bar in right.patches) == result.mentions["hallucinated"].sum()
    assert [text.split("\n")[0] for text in labels(left.yaxis)] == ["CHAIRs", "CHAIRi"]


def comparison(figure, result):
    assert len(figure.axes) == 6 and all("relative depth" in axes.get_xlabel() for axes in figure.axes)
    for axes, measure in zip(figure.axes, ("answer_prob", "entropy_share", "final_prob", "recovery_scene", "recovery_last")):
        for drawn, run in zip(axes.lines, result.runs):
            assert np.allclose(drawn.get_xydata().T, run.curve(measure))
    assert all(axes.get_ylim() == (-0.03, 1.03) for axes in figure.axes[:3])


def contextual_score(figure, result):
    (axes,) = figure.axes
    assert np.allclose([bar.get_width() for bar in axes.patches], result.scores) and len(labels(axes.yaxis)) == 24
    assert "cosine" in axes.get_xlabel()


def domain_neurons(figure, result):
    drawn = maps(figure)
    top = max(1, max(int(s.belongs.sum(1).max()) for s in result.modules.values()))
    assert all(shows(d, s.belongs.sum(1), 0, top) for d, s in zip(drawn, result.modules.values())) and len(drawn) == 3
    assert len(labels(figure.axes[0].xaxis)) == len(DOMAINS)


def edges(figure, result):
    limit = float(result.scores.abs().max())
    (drawn,) = maps(figure)
    assert shows(drawn, result.scores.masked_fill(~result.edges, torch.nan), -limit, limit)
    assert labels(figure.axes[0].yaxis)[0] == "embed" and max(figure.get_size_inches()) < LONGEST + 4


def explorer(figure, result):
    drawn = maps(figure)
    here = slice(result.starts[0], result.starts[0] + ROWS * COLS)
    probs, limit = result.lens.top_probs[:, here, 0], float(result.contextual[:, here].abs().max())
    assert shows(drawn[0], probs[0].reshape(ROWS, COLS), 0, float(probs.max())) and drawn[5].get_clim() == (-limit, limit)
    assert len(drawn) == 15


def flip_attribution(figure, result):
    (axes,) = figure.axes
    assert np.allclose([bar.get_width() for bar in axes.patches], result.to_dataframe()["attribution"])
    assert labels(axes.yaxis)[-2:] == ["bias", "norm"] and "logits" in axes.get_xlabel()


def flips(figure, result):
    histogram, at_layer, final = figure.axes
    assert sum(bar.get_height() for bar in histogram.patches) == len(result.flips)
    for axes, where in ((at_layer, "lens"), (final, "final")):
        found = axes.collections[1].get_offsets()
        assert np.allclose(found, result.flips[[f"{where}_difference", f"{where}_difference_ablated"]])


def grounding(figure, result):
    """One quantity for map and box; the maximum over layers beside it, by name and without the box."""
    drawn = maps(figure)
    for start, values in ((0, result.similarity), (1, result.heat)):
        low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        assert all(shows(drawn[start + 2 * image], v, low, high) for image, v in enumerate(values))
    assert len(drawn) == 4
    for k, box in enumerate(result.boxes.tolist()):
        at_layers, over_layers = figure.axes[2 * k : 2 * k + 2]
        assert [tuple(p.get_bbox().extents) for p in at_layers.patches] == [tuple(box)] * 2 and not over_layers.patches
        assert f"box {result.box_scores[k]:.3f}" in at_layers.get_title() and "maximum over layers" in over_layers.get_title()


def grounding_experiment(figure, result):
    table = result.to_dataframe().dropna(subset=["pointing"])
    for axes in (axes for axes in figure.axes if axes.get_title()):
        rows = table[table["category"] == axes.get_title().split(",")[0]]
        if len(rows):  # a name that is not escaped
            assert np.allclose(axes.collections[1].get_offsets()[:, 0], rows["pointing"])
            assert np.allclose([s[:, 0] for s in axes.collections[0].get_segments()], rows[["pointing_low", "pointing_high"]])
        assert axes.get_xlim() == (-0.03, 1.03)


def roc(figure, result):
    assert len(figure.axes) == 3 and sum(len(axes.lines) - 1 for axes in figure.axes) == len(result.methods)
    auroc = result.to_dataframe().query("category == 'all'").set_index("method")["auroc"]
    for drawn, method in zip(figure.axes[0].lines, result.methods[:4]):
        assert np.trapezoid(drawn.get_ydata(), drawn.get_xdata()) == pytest.approx(auroc[method])


def knockout(figure, result):
    (axes,) = figure.axes
    drawn = [d for d in axes.lines if len(d.get_xdata()) == LAYERS]
    assert np.allclose([d.get_ydata() for d in drawn], result.effects.mean(-1)) and "5 layers" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()


def sweep(figure, result):
    spread = float((result.auroc - 0.5).abs().max())
    (drawn,) = maps(figure)
    assert shows(drawn, result.auroc, 0.5 - spread, 0.5 + spread)
    (frame,) = figure.axes[0].patches
    assert frame.get_xy() == (result.text_layer - 0.5, result.image_layer - 0.5)


def locality(figure, result):
    drawn = [d for d in figure.axes[0].lines if len(d.get_xdata()) == LAYERS]
    assert np.allclose([d.get_ydata() for d in drawn], result.spans.mean(0).T) and "recovery" in figure.axes[0].get_ylabel()


def logit_lens(figure, result):
    (drawn,) = maps(figure)
    assert shows(drawn, result.top_probs[..., 0], 0, 1)
    cells = [text.get_text() for text in figure.axes[0].texts]
    assert cells == [visible(at[0], 9) for layer in result.top_tokens for at in layer]
    assert labels(figure.axes[0].yaxis) == list(result.layer_labels) and len(labels(figure.axes[0].xaxis)) == POSITIONS


def model_patching(figure, result):
    (axes,) = figure.axes
    drawn = [d for d in axes.lines if d.get_label() in result.spans]
    assert np.allclose([d.get_ydata() for d in drawn], result.explained.nanmean(-1).T) and len(drawn) == len(result.spans)


def neighbours(figure, result):
    (drawn,) = maps(figure)
    values = result.similarity[..., 0]
    assert shows(drawn, values, float(values.min()), float(values.max())) and len(figure.axes[0].texts) == values.numel()


def pairs(figure, result):
    left, right = figure.axes
    assert np.allclose(left.collections[0].get_offsets(), [(p.clean_difference, p.corrupted_difference) for p in result.kept])
    assert [bar.get_width() for bar in right.patches] == [len(result), *result.reasons.values()]
    assert "logits" in left.get_xlabel() and "logits" in left.get_ylabel()


def top_images(figure, result):
    drawn, highest = maps(figure), max(float(e.activations.max()) for e in result.examples)
    for d, example in zip(drawn, result.examples):
        assert shows(d, example.activations.where(example.activations > 0, torch.nan), 0, highest)
    assert len(drawn) == len(result.examples)


def trajectories(figure, result):
    left, right = figure.axes
    assert sum(bar.get_width() for bar in left.patches) == pytest.approx(len(DOMAINS)) and left.get_xlim() == (0, 1)
    assert len(labels(left.yaxis)) == len(DOMAINS) and right.get_xlim() == (-0.03, 1.03)


def trajectory(figure, result):
    tops, left, right = figure.axes
    assert labels(tops.yaxis) == [visible(token, 14) for token in dict.fromkeys(result.top1_tokens)]  # every token that was on top
    drawn = sorted((bar.get_x() + 0.43, labels(tops.yaxis)[round(bar.get_y() + 0.4)]) for bar in tops.patches)
    assert [token for _, token in drawn] == [visible(token, 14) for token in result.top1_tokens]
    for drawn, values in ((left.lines[0], result.answer_prob), (left.lines[1], result.rival_prob), (right.lines[0], result.entropy)):
        assert np.allclose(drawn.get_ydata(), values)
    assert left.get_ylim() == (-0.02, 1.02) and "nats" in right.get_ylabel() and len(left.lines) >= len(result.flips)


def ablation_effects(figure, result):
    left, right = figure.axes
    table = result.to_dataframe(by_category=False).head(24)
    assert labels(left.yaxis) == list(table["part"])
    for axes, name in ((left, "change"), (right, "accuracy_change")):
        assert np.allclose(axes.collections[1].get_offsets()[:, 0], table[name])


def curves(figure, result):
    for axes, name in zip(figure.axes, ("deletion", "insertion")):
        assert np.allclose(axes.lines[0].get_ydata(), getattr(result, name)) and axes.get_title() == name


def feature_judgement(figure, result):
    (axes,) = figure.axes
    assert len(labels(axes.yaxis)) == 26 and len(axes.collections) == 8
    assert np.allclose(axes.collections[1].get_offsets()[:, 0], result.table[result.table["unit"] == "feature"]["auroc"])


def head_set(figure, result):
    left, right = figure.axes
    assert np.allclose(left.lines[0].get_ydata(), result.search["share"])
    assert np.allclose(right.collections[0].get_offsets()[:, 1], result.held_out["share"][1:]) and "12 heads" in labels(right.xaxis)[0]


def probes(figure, result):
    (axes,) = figure.axes
    assert labels(axes.yaxis) == list(result.table["site"]) and "labels shuffled" in axes.get_legend_handles_labels()[1]


def recovery(figure, result):
    assert [axes.get_title() for axes in figure.axes] == list(dict.fromkeys(result.found["what"]))
    means = result.found.groupby(["what", "method", "strength"], sort=False)["recovered"].mean()
    assert np.allclose([bar.get_height() for axes in figure.axes for bar in axes.patches], means)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(dict.fromkeys(result.found["method"]))


def saliency_map(figure, result):
    shown = maps(figure)
    assert shows(shown[0], result.maps()[0], -float(result.whole.abs().max()), float(result.whole.abs().max())) and len(shown) == 9


def saliency_experiment(figure, result):
    assert len(figure.axes) == 8 and labels(figure.axes[0].yaxis) == list(result.to_dataframe()["method"])


def sinks(figure, result):
    norms, received = maps(figure)[:2]
    assert np.allclose(norms.get_array(), result.norms) and np.allclose(received.get_array(), result.received)
    assert len(labels(figure.axes[1].xaxis)) == int(result.is_sink.sum())


DRAWN = dict(zip(sorted(RESULTS, key=lambda kind: kind.__name__), (
    ablation_effects, ablations, heads, chair, comparison, contextual_score, curves, domain_neurons, edges, explorer, feature_judgement, flip_attribution, flips, grounding,
    grounding_experiment, roc, head_set, knockout, sweep, locality, logit_lens, model_patching, neighbours, pairs, probes, recovery, saliency_map, saliency_experiment, sinks, top_images, trajectories,
    trajectory,
)))  # fmt: skip
VIEWS = {
    "controls": lambda: every_ablation().plot_controls(),
    "intervals": lambda: hallucinations().plot_intervals(),
    "scores": lambda: hallucinations().plot_scores(),
    "trajectories of flips": lambda: flip_study().plot_trajectories(),
    "a lens at 1,200 image tokens": lambda: lens(ROWS * COLS).plot(),
    "streams": lambda: streams_plot(streams(), NAME),
    "contact sheet": lambda: contact_figure(sample(9)),
    "a contact sheet of one": lambda: contact_figure(sample(1)),
    "a lens with its question": lambda: lens().plot(question=QUESTION),
    "on the image": lambda: lens(ROWS * COLS, (ROWS, COLS)).plot_image(image()),
    "on a small image": lambda: lens(108, (9, 12)).plot_image(image()),
    "recovery": lambda: recovery_map(torch.randn(LAYERS, POSITIONS), range(LAYERS), (HARD * 2)[:POSITIONS], QUESTION),
    "recovery at 1,240 positions": lambda: recovery_map(torch.randn(LAYERS, 1240), range(LAYERS), (HARD * 99)[:1240], QUESTION),
    "recovery on the image": lambda: recovery_on_image(torch.randn(LAYERS, ROWS, COLS), range(LAYERS), [image()] * 2),
    "28 heads": lambda: attention_on_image(torch.rand(LAYERS, HEADS, ROWS * COLS), (ROWS, COLS), image(), layers=[0, 27]),
    "12 heads": lambda: attention_on_image(torch.rand(LAYERS, 12, ROWS * COLS), (ROWS, COLS), image(), layers=[0, 27]),
    "28 layers": lambda: attention_on_image(torch.rand(LAYERS, HEADS, ROWS * COLS), (ROWS, COLS), image(), heads=[3]),
}  # fmt: skip
UNTITLED = {"recovery on the image", "28 heads", "12 heads", "28 layers"}  # whoever calls these may give a title


@pytest.fixture(scope="module")
def figures():
    """Each is made, laid out and drawn once."""
    made = {}

    def get(key):
        if key not in made:
            torch.manual_seed(0), np.random.seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                result = VIEWS[key] if key in VIEWS else RESULTS[key]()
                figure = result() if key in VIEWS else result.plot()
                figure.draw_without_rendering()
            made[key] = result, figure
        return made[key]

    return get


@pytest.mark.parametrize("kind", DRAWN, ids=lambda kind: kind.__name__)
def test_a_picture_shows_its_result(figures, kind):
    result, figure = figures(kind)
    DRAWN[kind](figure, result)


@pytest.mark.parametrize("key", [*DRAWN, *VIEWS], ids=lambda key: getattr(key, "__name__", key))
def test_a_picture_is_legible_at_its_worst(figures, key):
    _, figure = figures(key)
    renderer, whole = figure._get_renderer(), figure.bbox
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [text.get_window_extent(renderer) for text in axis.get_ticklabels() if text.get_visible() and text.get_text()]
            if axis.get_ticklabels() and axis.get_ticklabels()[0].get_rotation() in (0, 90):  # a slanted text's box is mostly empty
                touching = [(a, b) for a, b in zip(boxes, boxes[1:]) if min(a.width, b.width, a.height, b.height) > 0 and a.overlaps(b)]
                assert not touching, (axis, touching[:1])
    for text in figure.findobj(Text):
        if not text.get_text().strip() or not text.get_visible():
            continue
        assert drawable(text.get_text()) == text.get_text() and not ("$" in text.get_text() and text.get_parse_math())
        assert text.get_fontsize() >= 4.5, text
        box = text.get_window_extent(renderer)
        inside = whole.x0 - 2 <= box.x0 and box.x1 <= whole.x1 + 2 and whole.y0 - 2 <= box.y0 and box.y1 <= whole.y1 + 2
        assert inside or text in _offscreen(figure), text
    for drawn in maps(figure):
        low, high = drawn.get_clim()
        assert np.isfinite((low, high)).all() and low < high
        assert drawn.get_cmap().name in ("cividis", "viridis", "RdBu_r")
    assert max(figure.get_size_inches()) < 2 * LONGEST


@pytest.mark.parametrize("key", [*DRAWN, *VIEWS], ids=lambda key: getattr(key, "__name__", key))
def test_no_text_lies_on_another_and_enough_is_labelled(figures, key):
    _, figure = figures(key)
    renderer, offscreen = figure._get_renderer(), set(map(id, _offscreen(figure)))
    texts = [
        t
        for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and id(t) not in offscreen and t.get_rotation() in (0, 90)
    ]
    boxes = np.array([t.get_window_extent(renderer).extents for t in texts])
    (x0, y0), (x1, y1) = boxes[:, :2].T, boxes[:, 2:].T
    wide = np.minimum.outer(x1, x1) - np.maximum.outer(x0, x0)
    high = np.minimum.outer(y1, y1) - np.maximum.outer(y0, y0)
    area = (x1 - x0) * (y1 - y0)  # with room for letters that hang lower: rows of text may share a little of it
    covered = np.clip(wide, 0, None) * np.clip(high, 0, None) / np.minimum.outer(area, area)
    pairs = [(a, b) for a, b in np.argwhere(np.triu(covered > 0.2, 1)) if texts[a].get_text() != texts[b].get_text()]  # or twins' ticks
    assert not len(pairs), [(texts[a].get_text(), texts[b].get_text()) for a, b in pairs[:3]]
    for drawn in maps(figure):
        for axis, n in zip((drawn.axes.yaxis, drawn.axes.xaxis), drawn.get_array().shape):
            named = labels(axis)
            if isinstance(axis.get_major_locator(), FixedLocator) and not all(label.isdigit() for label in named):  # names, no pixels
                assert len(named) >= min(n, 7), f"{len(named)} of {n} are labelled: {named[:3]}"


@pytest.mark.parametrize("key", [*DRAWN, *VIEWS], ids=lambda key: getattr(key, "__name__", key))
def test_texts_have_contrast(figures, key):
    """Of each text with what is behind it (WCAG 2.1): at least 4.5."""
    _, figure = figures(key)
    renderer, offscreen = figure._get_renderer(), set(map(id, _offscreen(figure)))
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in offscreen]
    boxes = [t.get_window_extent(renderer).extents.round().astype(int) for t in texts]
    alphas, own = [text.get_alpha() for text in texts], figure.canvas
    for text in texts:
        text.set_alpha(0)  # an invisible text would move others
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    behind = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
    figure.set_canvas(own)
    for text, alpha in zip(texts, alphas):
        text.set_alpha(alpha)
    for text, (x0, y0, x1, y1) in zip(texts, boxes):
        part = behind[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)]
        rim = [effect._gc["foreground"] for effect in text.get_path_effects()]
        ground = rim[0] if rim else np.median(part.reshape(-1, 3), axis=0) if part.size else "white"
        dark, light = sorted((luminance(text.get_color()), luminance(ground)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, text.get_color(), ground)


@pytest.mark.parametrize("key", [*DRAWN, *VIEWS], ids=lambda key: getattr(key, "__name__", key))
def test_a_legend_has_no_two_shades_of_one_colour(figures, key):
    """Two entries differ in hue, or are one colour in two styles of line; two greys differ in style."""
    _, figure = figures(key)
    for legend in figure.findobj(Legend):
        entries = set()
        for handle in legend.legend_handles:
            colours = [handle.get_color()] if isinstance(handle, Line2D) else [*handle.get_facecolor(), *handle.get_edgecolor()]
            if isinstance(handle, Patch):
                colours = [handle.get_facecolor()]
            entries.add(tuple(np.round(to_rgba_array(colours)[0, :3], 3)))
        for a, b in combinations(entries, 2):
            (hue_a, grey_a, _), (hue_b, grey_b, _) = rgb_to_hsv(a), rgb_to_hsv(b)
            apart = abs((hue_a - hue_b + 0.5) % 1 - 0.5) * 360
            assert min(grey_a, grey_b) < 0.2 or apart > 10, (to_hex(a), to_hex(b), [t.get_text() for t in legend.get_texts()])


@pytest.mark.parametrize("key", [*DRAWN, *(key for key in VIEWS if key not in UNTITLED)], ids=lambda key: getattr(key, "__name__", key))
def test_a_picture_has_a_title(figures, key):
    """A picture that leaves its folder says what it shows, and of which model if the result knows it."""
    result, figure = figures(key)
    title = figure.get_suptitle()
    assert title
    if name := getattr(result, "model_name", ""):
        assert line(name).split("-")[0] in title.replace("\n", " ")


def _offscreen(figure) -> list:
    """Ticks beyond their axis's limits, which are not drawn."""
    found = []
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            found += [
                text
                for tick in axis.get_major_ticks()
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9
                for text in (tick.label1, tick.label2)
            ]
            found.append(axis.get_offset_text())
        found += [] if axes.axison else axes.findobj(Text)
    return found


# ---- small and wide cases -----------------------------------------------------------------------


def test_a_map_of_rounding_is_not_stretched_to_the_whole_scale():
    """An answer's second token that depends on nothing is pale, and its title says how little."""
    made = RESULTS[Saliency]()
    made = replace(made, values=made.values * torch.tensor([1.0, *[1e-8] * (len(made.tokens) - 1)])[:, None].to(made.values))
    figure = made.plot()
    panels = {axes.get_title().split("\n")[0]: axes for axes in figure.axes if axes.get_title()}
    highest = float(made.values.abs().max())
    for title, axes in list(panels.items())[2:]:
        assert axes.images[0].get_clim()[1] == pytest.approx(0.01 * highest, rel=0.1) and "no more than" in axes.get_title(), title


def test_a_colour_bar_of_a_wide_image_is_not_in_the_title():
    made = RESULTS[Saliency]()
    n = len(made.tokens)
    made = replace(made, values=torch.randn(n, 60), grids=((4, 15),), sizes=((420, 112),))
    figure = made.plot(images=[image(420, 112)])
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    title = figure._suptitle.get_window_extent(renderer)
    assert all(axes.yaxis.label.get_window_extent(renderer).y1 <= title.y0 for axes in figure.axes)


def test_panels_on_the_image_are_at_most_three_in_a_row():
    panels = [axes for axes in lens(108, (9, 12)).plot_image(image()).axes if axes.images]
    assert len(panels) == 5 and all(axes.get_subplotspec().get_gridspec().ncols <= 3 for axes in panels)


def test_a_dot_without_an_interval_is_explained():
    """Of one hallucinated claim there is no interval; where all have one, nothing is said."""
    many = hallucinations()
    few = many.claims["category"].eq(DOMAINS[2])
    claims = many.claims.assign(correct=[True if one else right for one, right in zip(few, many.claims["correct"])])
    claims.loc[few.idxmax(), "correct"] = False
    note = "A dot without a line: too few answers of one kind"
    assert note in replace(many, claims=claims).plot_intervals().get_suptitle().replace("\n", " ")
    assert note not in many.plot_intervals().get_suptitle().replace("\n", " ")


def test_streams_are_those_of_their_table(figures):
    _, figure = figures("streams")
    left, right = figure.axes
    table = streams()
    for drawn, source in zip([d for d in left.lines if not d.get_label().startswith("_")], ("image", "text", "last")):
        some = table[(table["selection"] == "none") & (table["source"] == source)]
        assert np.allclose(drawn.get_ydata(), some.groupby("layer")["entropy_nats"].mean())
    moved = table[table["selection"] != "none"].groupby(["selection", "source", "layer"])["deviation"].mean()
    expected = [100 * moved.xs((kind, source)) for kind in table["selection"].unique()[1:] for source in ("image", "text")]
    assert np.allclose([d.get_ydata() for d in right.lines if len(d.get_ydata())], expected) and "%" in right.get_ylabel()


def test_a_contact_sheet_has_what_was_asked(figures):
    _, figure = figures("contact sheet")
    for axes, item in zip(figure.axes, sample(9), strict=True):
        assert item.question in axes.get_title(loc="left").replace("\n", " ") and [t.get_text() for t in axes.texts] == [item.answer]
        assert len(axes.patches) == 2 * len(item.depends_on) and item.domain in axes.get_xlabel()


def test_a_lens_names_its_question():
    title = lens().plot(question=QUESTION).get_suptitle().replace("\n", " ")
    assert line(QUESTION, None)[:40] in title and line(NAME) in title and "…" in title


def test_one_prompt_is_not_1_items():
    made = RESULTS[Knockout]()
    title = replace(made, effects=made.effects[..., :1], baseline=made.baseline[:1], images=()).plot().get_suptitle()
    assert "one prompt" in title and "items" not in title


def test_a_wide_image_leaves_room_for_the_titles():
    """15 × 4 image tokens, and a long note."""
    heat = torch.rand(4, 15)
    made = replace(
        RESULTS[Grounding](), heat=(heat,), similarity=(heat,), boxes=torch.tensor([[0.0, 0, 28, 28]]), box_scores=torch.ones(1),
        sizes=((420, 112),), text="none",
    )  # fmt: skip
    figure = made.plot(images=[image(420, 112)], note="so many words about how far this can be trusted " * 9)
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    title = figure._suptitle.get_window_extent(renderer)
    for axes in figure.axes:
        assert not axes.title.get_text() or axes.title.get_window_extent(renderer).y1 <= title.y0
        assert axes.yaxis.label.get_window_extent(renderer).y0 >= 0 and axes.yaxis.label.get_window_extent(renderer).y1 <= title.y0


# ---- text ---------------------------------------------------------------------------------------


def test_tokens_as_signs_and_escapes():
    assert visible(" red\n\t", 12) == "␣red⏎⇥" and visible("") == "∅"
    assert visible("\x00\r\u202e", None) == "\\x00\\r\\u202e" and visible("\ufffd") == "\ufffd"
    assert visible("a\u00a0b") == "a\\xa0b" and visible("\ud800") == "\\ud800"
    assert visible("$x_1$", None) == "$x_1$" and visible("<b>") == "<b>"
    assert readable("中\n<b>\u200b") == "中⏎<b>\\u200b"
    assert line("is it\n  $5?\x00") == "is it $5?\\x00"


@pytest.mark.parametrize("width", [6, 9, 12, 20])
def test_wide_tokens_are_cut_at_a_width(width):
    for token in (*HARD, "W" * 50, "i" * 99, "中" * 30, "\u202e" * 9):
        shown = visible(token, width)
        assert columns(shown) <= width and (shown.endswith("…") or shown == visible(token, None))
        assert "\\u4e" not in shown or "\\u4e2d" in shown  # an escape is whole, or not there
    assert columns(visible("i" * 99, width)) > width - 1  # as much as fits


def test_a_font_that_was_installed_since_matplotlib_made_its_list_is_found(monkeypatch):
    listed = list(font_manager.fontManager.ttflist)
    name = "DejaVu Sans Mono"  # stands for a font with Chinese
    path = font_manager.findfont(name)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font for font in listed if font.name != name])
    monkeypatch.setattr(views_text, "FALLBACKS", (name,))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [path, __file__])  # and a file that is no font
    views_text._installed.cache_clear()
    try:
        assert views_text._installed() == (name,)
    finally:
        views_text._installed.cache_clear()


def test_characters_outside_the_basic_plane_are_not_only_an_ellipsis():
    for c in ("\U000e0001", "\U0002a6a5\U0002a6a5"):
        for width in (4, 8, 12):
            assert visible(c, width).startswith(("\\U", c[0])), (ascii(c), width)


def test_fonts_that_have_chinese_draw_it(monkeypatch):
    """Where one is installed, no escape; where none is, no box."""
    assert drawable("中") == ("中" if views_text._installed() else "\\u4e2d")
    monkeypatch.setattr(views_text, "_installed", lambda: ("STIXGeneral",))  # stands for such a font: it has what DejaVu lacks
    only = next(chr(code) for code in font_manager.get_font(font_manager.findfont("STIXGeneral")).get_charmap()
                if not font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_char_index(code) and chr(code).isprintable())  # fmt: skip
    assert families()[-1] == "STIXGeneral" and visible(only) == only
    figure = Figure(figsize=(2, 1))
    text = figure.text(0.5, 0.5, only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    assert text.get_text() == only and "STIXGeneral" in text.get_family()


# ---- many image tokens ------------------------------------------------------------------------------


def photograph_lens(rows, cols, seed=0):
    """A lens of a photograph's grid: four regions of one reading, and single tokens of their own in between."""
    rng = np.random.default_rng(seed)
    grid = np.full((rows, cols), "grass", dtype=object)
    grid[: rows // 2] = "sky"
    grid[:, : cols // 3] = "tree"
    grid[rows // 3 : rows // 3 + 3, cols // 2 : cols // 2 + 5] = "house"
    for _ in range(rows):
        grid[rng.integers(rows), rng.integers(cols)] = f"w{rng.integers(1000)}"
    made = lens(rows * cols, (rows, cols))
    tokens = tuple(tuple((t, *rest[1:]) for t, rest in zip(grid.flat, layer)) for layer in made.top_tokens)
    return grid, replace(made, top_tokens=tokens)


@pytest.mark.parametrize(("rows", "cols"), [(18, 24), (40, 36), (12, 40)])
def test_a_photograph_is_drawn_with_words(rows, cols):
    """Every region that has room is named once, in its own cells; the titles' counts are those of a brute-force count."""
    grid, made = photograph_lens(rows, cols)
    picture = Image.new("RGB", (28 * cols, 28 * rows))
    figure = made.plot_image(picture)
    figure.draw_without_rendering()
    whole = figure.axes[2]
    key = {text.get_text().split("”")[0].removeprefix("“"): to_hex(patch.get_facecolor()) for text, patch in zip(*_legend(figure))}
    assert {"sky", "grass", "tree"} <= set(key) and len(set(key.values())) == len(key)
    named = {}
    for text in whole.texts:
        x, y = text.get_position()
        named.setdefault(text.get_text(), []).append((int(y // 28), int(x // 28)))
    for token in ("sky", "grass", "tree", "house"):
        regions, n = ndimage.label(grid == token)
        found = [regions[place] for place in named[token]]
        assert 0 not in found and len(set(found)) == len(found), "a name outside its region, or a region named twice"
        large = [r for r in range(1, n + 1) if (regions == r).sum(1).max() >= 4]
        assert set(large) <= set(found)
    told = sum(token in key for token in grid.flat)
    for token, places in named.items():
        if token not in key:
            regions = ndimage.label(grid == token)[0]
            told += sum(int((regions == regions[place]).sum()) for place in places)
    assert f"{told} of {rows * cols} tokens" in whole.get_title()
    assert told > 0.9 * rows * cols
    boxes = [text.get_window_extent(figure._get_renderer()) for text in whole.texts]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.7).overlaps(b.shrunk(0.9, 0.7))]
    close = figure.axes[-1]
    inside = [t for t in close.texts if close.get_xlim()[0] < t.get_position()[0] < close.get_xlim()[1]]
    assert len(inside) == len(close.texts) == 10 * 8, "a word in every cell of the part that is drawn close up"


def _legend(figure):
    (legend,) = figure.legends
    return legend.get_texts()[:-1], legend.get_patches()[:-1]


def test_the_part_close_up_has_the_most_different_tokens():
    """Not the one of a frequent token that the lens is sure of."""
    made = lens(18 * 24, (18, 24))
    grid = np.full((18, 24), "end", dtype=object)
    grid[:, :11] = "shapes"
    grid[2:7, 2:8] = [[f"w{row},{col}" for col in range(6)] for row in range(5)]
    sure = torch.from_numpy(np.where(grid == "end", 1.0, 0.4).reshape(-1))
    tokens = tuple(tuple((t, *rest[1:]) for t, rest in zip(grid.flat, layer)) for layer in made.top_tokens)
    made = replace(made, top_tokens=tokens, top_probs=torch.stack((sure, 1 - sure), -1).expand(LAYERS + 1, -1, -1).float())
    close = made.plot_image(Image.new("RGB", (24 * 28, 18 * 28))).axes[-1]
    assert {f"w{row},{col}" for row in range(5) for col in range(6)} <= {text.get_text() for text in close.texts}


@pytest.mark.parametrize(("rows", "cols"), [(18, 24), (40, 36)])
def test_a_name_stays_within_its_region(rows, cols):
    grid, made = photograph_lens(rows, cols)
    grid[5, -2:], grid[7, -3:], grid[9, :2] = " orange", "<|im_end|>", "wwmwwm"
    tokens = tuple(tuple((t, *rest[1:]) for t, rest in zip(grid.flat, layer)) for layer in made.top_tokens)
    made = replace(made, top_tokens=tokens)
    figure = made.plot_image(Image.new("RGB", (28 * cols, 28 * rows)))
    figure.draw_without_rendering()
    whole = figure.axes[2]
    for text in whole.texts:
        rim = text.get_path_effects()[0]._gc["linewidth"] / 2 * figure.dpi / 72
        box = text.get_window_extent(figure._get_renderer()).padded(rim).transformed(whole.transData.inverted())
        (row, col), token = (int(place // 28) for place in text.get_position()[::-1]), text.get_text().replace("␣", " ")
        own = [c for c in range(cols) if all(grid[row, k] == token for k in range(min(c, col), max(c, col) + 1))]
        assert 28 * own[0] <= box.x0 and box.x1 <= 28 * (own[-1] + 1), token


def test_every_token_of_a_photograph():
    grid, made = photograph_lens(18, 24)
    figure = made.plot_image(Image.new("RGB", (24 * 28, 18 * 28)), every_token=True)
    (axes,) = [axes for axes in figure.axes if axes.texts]
    assert [text.get_text() for text in axes.texts] == list(grid.flat)


def test_colours_can_be_told_on_a_dark_picture():
    """On black, white and noise the colours keep their order, and none is darkened by more than half."""
    values = np.linspace(0, 1, 9)[None]
    for light in (0, 255, None):
        noise = np.random.default_rng(0).integers(0, 256, (10, 90), dtype=np.uint8)
        picture = Image.fromarray(noise if light is None else np.full_like(noise, light))
        figure = Figure(figsize=(9, 1), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        on_image(axes, values, picture.convert("RGB"), "cividis", 0, 1)
        axes.set_aspect("auto"), axes.set_axis_off()
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        seen = np.asarray(Image.open(buffer).convert("RGB")).reshape(100, 9, 100, 3).mean((0, 2)) / 255
        bar = colormaps["cividis"](values[0])[:, :3]
        assert (np.diff(seen.sum(-1)) > 0).all() and np.abs(seen - bar).max() < 0.5, light
