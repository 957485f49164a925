"""Every experiment over a data set: no figure depends on how questions were batched, or on where it was done."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from tiny import tiny_hf, tiny_processor

from analyses.counterfactuals import check_pairs, scene_candidates
from analyses.data.benchmarks import EXACT, Question
from analyses.data.examples import Example, examples
from analyses.domain_neurons import count_firings as count_in_memory
from analyses.domain_neurons import disable_neurons, mean_activations
from analyses.experiments.experiment import Experiment
from analyses.experiments.flips import FlipExperiment, flip_study, read_flip_study
from analyses.experiments.hallucination import HallucinationExperiment, detect_hallucinations, read_hallucinations
from analyses.experiments.locality import locality_study
from analyses.experiments.max_activating import top_images
from analyses.experiments.neurons import (
    FIRING,
    RANDOM,
    AblationExperiment,
    Condition,
    EffectExperiment,
    FiringExperiment,
    ablate,
    ablation_effects,
    answer,
    count_firings,
    prepare,
    read_ablations,
    read_effects,
    read_firings,
    stream_by_layer,
)
from analyses.runs.engine import read_failures
from hooked_qwen2vl import HookedQwen2VL

BATCH_SIZES = (2, 3, 5)  # each beside 1
TOLERANCE = 1e-5
DOMAINS = ("a", "b", "c")
SHAPES = ((56, 56), (140, 84), (60, 115))
FAST = ["probability", "internal_confidence", "contextual", "contextual_control"]


@pytest.fixture(scope="module")
def model():
    """In float64, so that a difference is a fault and not rounding."""
    return HookedQwen2VL.from_hf(tiny_hf(dtype=torch.float64), tiny_processor())


def questions() -> list[Example]:
    """Domains a and b mix pictures of several sizes, two pictures and none, c has no picture; answers of several lengths."""
    texts = ("what?", "which of the two things is the red one?", "is it red")
    answers = ("red", "blue", "th red", "blue blue red")
    images = [(0,), (), (1,), (2, 0), (), (1,), (0,), (2,), (), (0, 1), ()]
    return [
        Example(f"q{i}", texts[i % 3], answers[i % 4], tuple(picture(*SHAPES[k], seed=10 * i + k) for k in which),
                "c" if i in (4, 8) else "ab"[i % 2], candidates=("red", "blue", "th"), category="xy"[i % 2])
        for i, which in enumerate(images)
    ]  # fmt: skip


def asked() -> list[Question]:
    """What can be asked for hallucinations: each has a picture."""
    return [
        Question(e.id, e.question, e.answer, e.images or (picture(84, 56, seed=i),), e.domain, "existence" if i % 2 else "colour",
                 judge=EXACT, noun="red" if i % 2 else "")
        for i, e in enumerate(questions())
    ]  # fmt: skip


def off() -> list[Condition]:
    generator = torch.Generator().manual_seed(0)
    own = {"decoder": torch.rand(3, 72, generator=generator) < 0.4, "vision": torch.rand(2, 96, generator=generator) < 0.4}
    return [Condition(FIRING, "all", "a", 0, own), Condition(RANDOM, "decoder", "b", 1, {"decoder": ~own["decoder"]})]


def flips(model, size):
    """The embedded model's, since the tiny one never flips between answers; two questions have lost their picture."""
    data = [dataclasses.replace(e, images=e.images if i % 5 else ()) for i, e in enumerate(examples("scenes", 20))]
    study = flip_study(HookedQwen2VL.from_pretrained("scenes"), data, n_random=2, batch_size=size, progress=False)
    assert len(study.flips) > 3 and len(study.prompts) > 5
    return {"prompts": study.prompts, "flips": study.flips, "summary": study.summary(), "skipped": study.skipped}


def hallucinations(model, size):
    found = detect_hallucinations(model, asked(), "d", FAST, max_new_tokens=4, n_boot=5, batch_size=size, progress=False)
    assert found.claims[FAST].notna().any(axis=0).all()
    return {"claims": found.claims}


def firings(model, size):
    counts = count_firings(model, questions(), batch_size=size, generate=3, progress=False)
    assert counts.domains == DOMAINS and counts.tokens["decoder"][:, 2].all() and not counts.tokens["vision"][2].any()
    return counts.fired | {f"{module} tokens": tokens for module, tokens in counts.tokens.items()}


def effects(model, size):
    found = ablation_effects(model, questions(), DOMAINS, batch_size=size)
    assert all(effect[:2].abs().max() > 1e-3 for effect in found.values()) and not found["vision"][2].any()
    return found


def ablations(model, size):
    found = ablate(model, questions(), off(), batch_size=size, progress=False)
    assert found.outcomes["log_prob"].nunique() > len(questions())
    return {"outcomes": found.outcomes, "accuracy": found.accuracy()}


def prepared(model, size):
    found = ablate(model, prepare(model, questions(), size), off(), progress=False)
    return {"outcomes": found.outcomes.sort_values(["id", "selection"], ignore_index=True), "accuracy": found.accuracy()}


def streams(model, size):
    keys = ["selection", "module", "target", "seed", "domain", "layer", "source"]
    return {"table": stream_by_layer(model, prepare(model, questions(), size), off(), progress=False).sort_values(keys, ignore_index=True)}


def means(model, size):
    return mean_activations(model, questions(), batch_size=size)


def tops(model, size):
    neurons = ("decoder", 1, 5), ("vision", 0, 7), ("projector", 0, 3)
    return {str(neuron): top_images(model, neuron, questions(), batch_size=size).to_dataframe() for neuron in neurons}


EVERY = (flips, hallucinations, firings, effects, ablations, prepared, streams, means, tops)
_ALONE: dict[str, dict] = {}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, other[name], check_exact=False, rtol=0, atol=TOLERANCE, obj=name)
        else:
            np.testing.assert_allclose(np.asarray(value), np.asarray(other[name]), rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("figures", EVERY, ids=lambda f: f.__name__)
def test_no_figure_depends_on_the_batches(model, figures, size):
    if figures.__name__ not in _ALONE:
        _ALONE[figures.__name__] = figures(model, 1)
    assert_same(_ALONE[figures.__name__], figures(model, size))


def test_no_figure_depends_on_the_batches_of_a_sweep(scenes):
    pairs = check_pairs(scenes, scene_candidates(4, domain="shapes", category="attribute", grid=(4, 4)), n=1, progress=False)
    studies = [locality_study(scenes, pairs, size, progress=False) for size in (1, 2, 3, 5)]
    for study in studies[1:]:
        torch.testing.assert_close(study.spans, studies[0].spans, rtol=0, atol=TOLERANCE)
        assert study.hits == studies[0].hits


def saying(model, ids):
    """The model's unembedding, made to say these tokens one after the other, and the last of them for ever."""
    calls: list[int] = []

    def say(module, arguments, logits):
        token = ids[min(len(calls), len(ids) - 1)]
        calls.append(token)
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], token), logits.shape[-1]).to(logits) * 100

    return model.unembed.register_forward_hook(say)


def test_an_answer_is_judged_by_its_own_length(model):
    """One that goes on past its own right answer is wrong, also in a batch that is decoded further and sees it end."""
    red, blank, end = model.to_tokens("red")[0].tolist(), model.to_tokens(" ")[0, 0].item(), model.cfg.special.eos[0]
    data = [Example("short", "what?", "red", (), "a"), Example("long", "what?", "blue blue blue blue blue blue", (), "a")]
    for ids, text in (([*red, end], "red"), ([*red, *[blank] * 8, end], None), ([*red, blank], None)):
        for some in (data[:1], data):
            (batch,) = prepare(model, some)
            with saying(model, ids):
                assert answer(model, batch)[0][0] == text


# ---- in memory, or in a folder ------------------------------------------------------------------------


def flips_of(model, **more):
    return flip_study(model, questions(), n_random=2, batch_size=2, progress=False, **more)


def hallucinations_of(model, **more):
    return detect_hallucinations(model, asked(), "d", FAST, max_new_tokens=4, n_boot=5, batch_size=2, progress=False, **more)


def firings_of(model, **more):
    return count_firings(model, questions(), generate=3, batch_size=2, progress=False, **more)


def effects_of(model, **more):
    return ablation_effects(model, questions(), DOMAINS, batch_size=2, **more)


def ablations_of(model, **more):
    return ablate(model, questions(), off(), batch_size=2, progress=False, **more)


RUNS = (  # (the experiment, how its folder is read, its figures)
    (flips_of, read_flip_study, lambda study: {"prompts": study.prompts, "flips": study.flips, "skipped": study.skipped}),
    (hallucinations_of, lambda out: read_hallucinations(out, "d"), lambda found: {"claims": found.claims, "layers": found.layers}),
    (firings_of, read_firings, lambda counts: counts.fired | {f"{module} tokens": n for module, n in counts.tokens.items()}),
    (effects_of, lambda out: read_effects(out, DOMAINS), dict),
    (ablations_of, read_ablations, lambda found: {"outcomes": found.outcomes}),
)


@pytest.mark.parametrize(("do", "read", "figures"), RUNS, ids=lambda f: f.__name__)
def test_a_folder_gives_what_memory_gives(model, tmp_path, do, read, figures):
    """In shares, the second of which finds all there; read again without the model; nothing is done twice."""
    out = tmp_path / "out"
    expected = figures(do(model))
    assert do(model, out=out, rank=(1, 2)) is None  # the other share is missing
    with pytest.raises(ValueError, match="not finished"):
        read(out)
    assert_same(expected, figures(do(model, out=out, rank=(0, 2))))
    written = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    assert len(written) > 1
    assert_same(expected, figures(do(model, out=out)))
    assert_same(expected, figures(read(out)))
    assert written == {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    with pytest.raises(ValueError, match="pass out="):
        do(model, rank=(0, 2))


def test_a_question_that_fails_is_said(model, tmp_path):
    data = questions()
    for place, example in enumerate(data[:3]):
        for image in example.images[:1]:
            image.save(tmp_path / f"{place}.png")
            data[place] = dataclasses.replace(example, images=(tmp_path / f"{place}.png",))
    (tmp_path / "2.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="2.png"):  # in memory it stops at once
        flip_study(model, data, n_random=1, progress=False)
    with pytest.warns(UserWarning, match=r"1 questions failed and are not in the result, the first \(q2\)"):
        study = flip_study(model, iter(data), n_random=1, progress=False, out=tmp_path / "out", batch_size=1)
    assert read_failures(tmp_path / "out")["id"].tolist() == ["q2"]
    assert len(study.prompts) + study.skipped == len(data) - 1 and "q2" not in set(study.prompts["id"])


def test_a_folder_of_another_experiment_is_refused(model, tmp_path):
    flip_study(model, questions()[:3], n_random=1, progress=False, out=tmp_path / "out")
    for read in (read_firings, read_ablations, lambda out: read_hallucinations(out, "d"), lambda out: read_effects(out, DOMAINS)):
        with pytest.raises(ValueError, match="holds 'flips', which has no"):
            read(tmp_path / "out")
    with pytest.raises(ValueError, match='name: "flips" there, "neurons: firings" now'):
        count_firings(model, questions(), progress=False, out=tmp_path / "out")
    with pytest.raises(ValueError, match="not what prepare made"):
        ablate(model, prepare(model, questions()), off(), out=tmp_path / "else")


def test_settings_decide_the_rows(model):
    """Two experiments with different arguments have different settings (or the seed that a run keeps)."""
    half = [dataclasses.replace(off()[0], seed=1)]
    for kind, changes in (
        (FlipExperiment, ({}, {"n_components": 1}, {"n_random": 1}, {"seed": 1})),
        (HallucinationExperiment, ({}, {"methods": FAST}, {"vocabulary": {"a": "b"}}, {"max_new_tokens": 1}, {"image_layer": 1}, {"text_layer": 1})),
        (FiringExperiment, ({}, {"generate": 1}, {"modules": ["decoder"]})),
        (EffectExperiment, ({}, {"modules": ["decoder"]})),
        (AblationExperiment, ({"wanted": off()}, {"wanted": half}, {"wanted": off(), "crossed": ()})),
    ):  # fmt: skip
        experiments = [kind(model, **change) for change in changes]
        known = [(experiment.settings, experiment.seed) for experiment in experiments]
        assert all(one not in known[:place] for place, one in enumerate(known)), kind
        assert issubclass(kind, Experiment)


def test_counting_over_a_data_set_is_counting(model):
    ours, theirs = count_firings(model, questions(), progress=False), count_in_memory(model, questions(), progress=False)
    assert all(torch.equal(ours.fired[module], theirs.fired[module]) for module in theirs.fired) and ours.domains == theirs.domains


# ---- names of earlier versions ------------------------------------------------------------------------


def test_names_of_earlier_versions(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import analyses.studies as studies

        for name in ("flip_study", "read_flip_study", "locality_study", "knockout_study", "FlipStudy", "LocalityStudy", "SPANS", "wilson"):
            assert getattr(studies, name) is not None
        assert studies.locality_study is locality_study and studies.flip_study is flip_study
        saved = studies.LocalityStudy((True,), (0.1,), (0.2,), torch.rand(1, 2, 5), ("x",), 1, 0, "m").save(tmp_path / "study")
        assert studies.LocalityStudy.load(saved).hits == (True,)
    import analyses.domain_neurons as methods

    with pytest.warns(DeprecationWarning, match="read_firings is now analyses.experiments.neurons.read_firings"):
        assert methods.read_firings is read_firings
    with pytest.warns(DeprecationWarning, match="FiringExperiment"):
        assert methods.firing_work is FiringExperiment
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert methods.count_firings and methods.find_domain_neurons and methods.disable_neurons is disable_neurons
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = methods.nothing
