"""Port and analyses on a pretended GPU (`pretend_device`): nothing mixes devices, nothing needs float64 there where MPS has none,
every result comes back on the CPU, and its numbers are those of a run on the CPU.

Each case runs twice, on the CPU and there. Prompts are given as they come from `Inputs.from_processor` or `Pairs.load`: on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from PIL import Image
from pretend_device import MixedDevices, NoFloat64, OnDevice, Pretence, needs_torch, on_device, pretended
from tiny import tiny_hf, tiny_processor, tiny_processor3
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._device import _device_constructors
from transformer_lens import patching

from analyses.answer_scores import all_scores
from analyses.attention_heads import detect_heads
from analyses.common.vocabulary import logits_of, predictions_of
from analyses.contextual_lens import contextual_score, ground
from analyses.counterfactuals import Pairs, changed_positions, check_pairs, scene_candidates
from analyses.data.benchmarks import load_scenes
from analyses.data.examples import Example, examples
from analyses.dictionaries import Dictionary, feature_activations, splice
from analyses.direct_path import direct_path_patch
from analyses.domain_neurons import count_firings, disable_neurons, mean_activations
from analyses.embedding_lens import contextual_neighbours, embedding_lens, text_bank
from analyses.experiments.ablation import Ablation, answer_log_probs, reference_of, sets_of_heads
from analyses.experiments.compare import compare_models, text_agreement
from analyses.experiments.features import image_activations
from analyses.experiments.flips import flip_study
from analyses.experiments.grounding import run_experiment
from analyses.experiments.hallucination import detect_hallucinations
from analyses.experiments.knockout import knockout_study
from analyses.experiments.locality import locality_study
from analyses.experiments.max_activating import top_images, written_tokens
from analyses.experiments.neurons import ablate, conditions, prepare, stream_by_layer
from analyses.explorer import explore
from analyses.flip_patching import ablate_flip, attribute_flip, component_effects
from analyses.interventions import ablate as ablate_parts
from analyses.interventions import contrast_direction, drop_tokens, hook_names, mask_image, steer
from analyses.knockout import attention_knockout
from analyses.logit_lens import logit_lens, residual_stack
from analyses.model_patching import patch_between_models
from analyses.patching import patch_sweep
from analyses.project_away import project_away_hooks, text_direction
from analyses.runs.activation_store import ActivationStore, store_activations
from analyses.saliency import saliency
from analyses.sinks import find_sinks
from analyses.trajectory import answer_trajectory
from analyses.views.attention import attention_on_image, maps_on_image
from analyses.views.patching import recovery_map, recovery_on_image
from hooked_qwen2vl import HookedCache, HookedQwen2VL, Inputs, cache_image
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache
from hooked_qwen2vl.scenes import load_split
from hooked_qwen2vl.selfcheck import self_check

pytestmark = needs_torch

# (dtype, whether the device has float64): a GPU in the published precision, and a Mac.
MODES = {"cuda bfloat16": (torch.bfloat16, True), "mps float32": (torch.float32, False)}
REST = {"cuda float32": (torch.float32, True), "mps bfloat16": (torch.bfloat16, False)}


@dataclasses.dataclass(frozen=True)
class World:
    """A model where the case is to run, the same model on the CPU, prompts on the CPU, and a folder."""

    model: HookedQwen2VL
    cpu_model: HookedQwen2VL
    clean: Inputs
    corrupted: Inputs
    folder: Path


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 7]


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 3, "do_sample": False, "verbose": False, **more}


# ---- what runs: name -> (world) -> a result -----------------------------------------------------------------------


def forward(w: World) -> Any:
    logits, cache_ = w.model.run_with_cache(w.clean, vision=True)
    later = w.model(w.model(w.clean, stop_at_layer=1), inputs=w.clean, start_at_layer=1)
    kept = w.model(w.model(w.clean, stop_at_layer=1).cpu(), inputs=w.clean, start_at_layer=1)  # a stream that was kept on the CPU
    stepped = w.model.run_blocks(w.model(w.clean, stop_at_layer=0), w.clean)
    loss = w.model(w.clean, return_type="loss")
    image = cache_image(cache_, "vision_encoder.blocks.0.hook_resid_post", w.clean)
    encoded = ImageEmbeddingsCache(w.model)(w.clean)
    return (
        logits.cpu(),
        later.cpu(),
        kept.cpu(),
        stepped.cpu(),
        loss.cpu(),
        image.cpu(),
        w.model(encoded).cpu(),
        w.model(w.model.encode(w.corrupted)).cpu(),
    )


def from_processor(w: World) -> Any:
    mapping = {"input_ids": w.clean.tokens, "attention_mask": w.clean.attention_mask, "pixel_values": w.clean.pixels,
               "image_grid_thw": torch.tensor([visual.grid for visual in w.clean.visuals])}  # fmt: skip
    return w.model(Inputs.from_processor(mapping, w.model.cfg)).cpu()


def caches(w: World) -> Any:
    """Kept on the CPU, as long runs keep them, and read back from a file."""
    _, kept = w.model.run_with_cache(w.clean, device="cpu")
    loaded = HookedCache.load(kept.save(w.folder / "cache.safetensors"), w.model)
    w.model.run_with_cache(w.clean)[1].save(w.folder / "there.safetensors")
    found = []
    for each in (kept, loaded):
        found += [each.accumulated_resid(apply_ln=True), each.stack_head_results(apply_ln=True), each.decompose_resid(apply_ln=True)]
        found += [each.get_full_resid_decomposition(expand_neurons=False), each.logit_attrs(each.decompose_resid(), tokens=5)]
        found += [each.stack_neuron_results(2, neuron_slice=(0, 4)), each.accumulated_resid(apply_ln=True, pos_slice=-1)]
        if w.model.cfg.dtype == torch.float32:  # in bfloat16 TransformerLens multiplies it with what the norm has widened
            found += [each.get_full_resid_decomposition(apply_ln=True, project_output_onto=w.model.W_U[:, 5])]
        found += [each.logit_lens(targets=[5]).values.cpu()]
        found += [each.logit_attrs(each.decompose_resid(), tokens=5, incorrect_tokens=7), each["resid_post", -1]]
    return found


def paths(w: World) -> Any:
    """Direct paths, with one cache on the model's device and one on the CPU."""
    kept = [w.model.run_with_cache(x, device=device)[1] for x, device in ((w.clean, "cpu"), (w.corrupted, None))]
    return [direct_path_patch(w.model, w.corrupted, *kept, lambda z: difference(z)[0], (1, 1), component, False) for component in "qk"]


def generation(w: World) -> Any:
    batch = Inputs.stack([w.clean, w.corrupted[0]], w.model.cfg, 0)
    tokens = w.model.generate(batch, **settings(return_type="tokens")).cpu()
    same = w.model.generate(batch, **settings(return_type="tokens", use_past_kv_cache=False)).cpu()
    grown, kept = w.model.generate(w.clean, return_cache=True, names_filter="blocks.0.hook_resid_post", **settings(return_type="inputs"))
    torch.manual_seed(0)
    w.model.generate(w.clean, **settings(do_sample=True, top_k=5, temperature=0.7, freq_penalty=0.5))
    return tokens, same, grown.tokens.cpu(), kept["blocks.0.hook_resid_post"].cpu()


def sweeps(w: World) -> Any:
    last = {"positions": "last"}
    kinds = {"resid_pre": {"positions": ["image", "last"]}, "z": last, "pattern": last, "v": {"positions": [3], "heads": [0]}}
    tower = {"resid_pre": {"positions": "image"}, "z": {"layers": [0], "heads": [1]}, "pattern": {"layers": [1], "heads": [0]}}
    kinds |= {f"vision_encoder.{kind}": more | {"positions": ["image"]} for kind, more in tower.items()}
    found = [patch_sweep(w.model, w.clean, w.corrupted, difference, kind, progress=False, **more) for kind, more in kinds.items()]
    return [(sweep.values, sweep.baseline, sweep.source_metric) for sweep in found]


def native_patching(w: World) -> Any:
    """TransformerLens's own loop, from a cache that is where the model is."""
    _, kept = w.model.run_with_cache(w.clean)
    return patching.get_act_patch_attn_head_out_all_pos(w.model, w.corrupted, kept, lambda z: difference(z)[0]).cpu()


def lenses(w: World) -> Any:
    stack, _ = residual_stack(w.model, w.clean)
    kept = (
        logits_of(w.model, stack[:, 0, -1]),
        predictions_of(w.model, stack[:, 0, -1].cpu(), torch.zeros(len(stack), 0, dtype=torch.long)).probs,
    )
    return logit_lens(w.model, w.clean, positions="image", top_k=3, targets=[5]), kept


def nearest_texts(w: World) -> Any:
    bank = text_bank(w.model, ["is the circle red?", "a blue star"], progress=False)
    return embedding_lens(w.model, w.clean, top_k=2), contextual_neighbours(w.model, w.clean, bank, top_k=2)


def knockouts(w: World) -> Any:
    return attention_knockout(w.model, w.clean, [5], window=1, only_correct=False, progress=False)


def neurons_off(w: World) -> Any:
    masks = {"decoder": torch.zeros(w.model.cfg.n_layers, w.model.cfg.d_mlp, dtype=torch.bool)}
    masks["decoder"][:, :9] = True
    means = {"decoder": torch.ones(masks["decoder"].shape)}
    with disable_neurons(w.model, masks):
        off = w.model(w.clean).cpu()
    with disable_neurons(w.model, masks, means):
        return off, w.model(w.clean).cpu()


# ---- those that need the embedded model's words --------------------------------------------------------------------


def trajectories(w: World) -> Any:
    item = answer_trajectory(w.model, w.clean, "red", ("red", "blue"))
    flip = attribute_flip(w.model, w.clean, 3, 5, 7)
    test = ablate_flip(w.model, w.clean, flip, n_random=1)
    return item, flip, component_effects(w.model, w.clean, flip, w.corrupted), test.random, test.ablated


def answers(w: World) -> Any:
    example = shown()
    inputs = w.cpu_model.to_inputs(example.question, images=list(example.images), answers="red")
    return (
        contextual_score(w.model, inputs),
        ground(w.model, inputs),
        all_scores(w.model, inputs),
        explore(w.model, inputs, list(example.images)),
    )


def pair_tables(w: World) -> Any:
    pairs = check_pairs(w.model, scene_candidates(6, seed=3, domain="shapes"), n=1, progress=False)
    pairs.save(w.folder / "pairs")
    loaded = Pairs.load(w.folder / "pairs")
    pair = loaded.kept[0]
    sweep = patch_sweep(w.model, pair.clean, pair.corrupted, pair.metric, positions="last", progress=False)
    return sweep.values, changed_positions(pair.clean, pair.corrupted), locality_study(w.model, loaded.kept[:1], progress=False)


def studies(w: World) -> Any:
    data = list(examples("scenes", 1))
    return flip_study(w.model, data, n_random=1, progress=False), knockout_study(w.model, data, window=1, progress=False)


def ablations(w: World) -> Any:
    """The reference stays on the device; the experiment's prompts carry answers."""
    data = [shown()]
    parts = sets_of_heads(w.model, [(0, 1)], n_random=1)
    reference = reference_of(w.model, limit=2)
    found = Ablation(w.model, parts, "mean", reference).run(data, progress=False)
    return found.table, answer_log_probs(w.model, w.cpu_model.to_inputs("red?", answers="red"))


def stored(w: World) -> Any:
    """Activations on disk, and a dictionary of features fitted to them."""
    data, name = list(examples("scenes:train", 3)), "blocks.1.hook_resid_post"
    folder = w.folder / f"store_{w.model.W_U.device.type}"
    store_activations(w.model, data, name, folder, "question", batch_size=2, progress=False)
    held = next(ActivationStore(folder).batches(64, seed=None))
    rows = image_activations(w.model, data, name)
    dictionary = Dictionary(name, name, rows[:4].T.clone(), torch.zeros(4), rows[:4].clone(), torch.zeros(rows.shape[1]))
    features = feature_activations(w.model, w.clean, dictionary.to(w.model.cfg.device)).cpu()
    logits = w.model.run_with_hooks(w.clean, fwd_hooks=splice(dictionary.to(w.model.cfg.device), error=False)).cpu()
    return held, rows, features, logits


def grounded(w: World) -> Any:
    return run_experiment(w.model, load_split("test", 8), progress=False)


def hallucinated(w: World) -> Any:
    return detect_hallucinations(w.model, load_scenes(2), "scenes", n_boot=2, progress=False)


def domain_neurons(w: World) -> Any:
    data = list(examples("scenes:train", 6))
    counts = count_firings(w.model, data, batch_size=3, generate=1, progress=False)
    neurons = counts.select()
    batches = prepare(w.model, data[:2])
    wanted = [condition for condition in conditions(neurons, seeds=1) if condition.module == "all"][:2]
    streams = stream_by_layer(w.model, batches, wanted, progress=False)
    neuron = ("decoder", 1, 3)
    tables = ablate(w.model, batches, wanted, crossed=(), progress=False), streams, written_tokens(w.model, neuron, top_k=3)
    return counts, neurons, tables, mean_activations(w.model, data[:2]), top_images(w.model, neuron, data, n=1)


def comparisons(w: World) -> Any:
    data = [shown()]
    tuned = HookedQwen2VL.from_pretrained("scenes", dtype=w.model.cfg.dtype)
    tuned.blocks[1].mlp.down_proj.weight.mul_(3.0)
    return compare_models({"here": w.model, "on the cpu": tuned}, data, ("image",)), patch_between_models(
        w.model, tuned, [w.clean], progress=False
    )


def agreement(w: World) -> Any:
    """The twin stays on the CPU."""
    return text_agreement(w.model, w.cpu_model, ["is it red?"])


def heads_and_directions(w: World) -> Any:
    direction = text_direction(w.model, "red", 2).cpu()
    logits = w.model.run_with_hooks(w.clean, fwd_hooks=project_away_hooks(w.clean, direction, [2]))
    return detect_heads(w.model), logits.cpu()


def interventions(w: World) -> Any:
    """What is changed, and by how much it matters; reference and directions may lie on the CPU."""
    _, reference = w.model.run_with_cache(w.corrupted, names_filter=hook_names(heads=[(0, 1)], mlps=[1]), device="cpu")
    direction = contrast_direction(w.model, w.clean, w.corrupted, 1)
    hooks = [ablate_parts(heads=[(0, 1)], mlps=[1], how=how, reference=reference) for how in ("mean", "resample")]
    hooks += [steer(direction.cpu(), [1], positions="last", inputs=w.clean), mask_image(w.clean), drop_tokens(w.clean, "image", 1)]
    logits = [w.model.run_with_hooks(w.clean, fwd_hooks=hook).cpu() for hook in hooks]
    maps = [saliency(w.model, w.clean, method, target=5, progress=False) for method in ("knockout", "occlusion", "rollout")]
    return logits, maps, find_sinks(w.model, w.clean)


ON_TINY = (forward, from_processor, caches, paths, generation, sweeps, native_patching, knockouts, neurons_off, interventions)
ON_SCENES = (lenses, nearest_texts, agreement, heads_and_directions)
SLOW = (trajectories, answers, pair_tables, studies, ablations, stored, grounded, hallucinated, domain_neurons, comparisons)


# ---- the two runs of a case ----------------------------------------------------------------------------------------


@cache
def shown() -> Example:
    """What the embedded model is asked."""
    return next(example for example in examples("scenes", 6) if example.category == "attribute")


def made(name: str, dtype: torch.dtype) -> HookedQwen2VL:
    if name == "scenes":
        return HookedQwen2VL.from_pretrained("scenes", dtype=dtype)
    processor = tiny_processor3() if name == "qwen3_vl" else tiny_processor()
    return HookedQwen2VL.from_hf(tiny_hf(family=name, dtype=dtype), processor)


def world(name: str, dtype: torch.dtype, folder: Path) -> World:
    model = made(name, dtype)
    if name == "scenes":
        image = shown().images[0]
        question, images = shown().question, (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    else:
        question, images = "red?", (picture(96, 64, 1), picture(96, 64, 2))
    return World(model, model, *(model.to_inputs(question, images=[image]) for image in images), folder)


def leaves(value: Any, where: str = "result") -> Iterator[tuple[str, Any]]:
    """Every number, text and tensor of a result, with its place."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, pd.DataFrame):
        value = {column: value[column].tolist() for column in value.columns}
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from leaves(part, f"{where}[{number}]")
    else:
        yield where, value


def same(ours: Any, theirs: Any) -> bool:
    """Numbers to float32's rounding."""
    if isinstance(theirs, (Tensor, float)):
        ours, theirs = (torch.as_tensor(value).double() for value in (ours, theirs))
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
    return type(ours) is type(theirs) and (not isinstance(theirs, (str, int)) or ours == theirs)


@torch.no_grad()
def run_there(name: str, case: Callable[[World], Any], mode: str, folder: Path) -> Pretence:
    """The case on the CPU and on the pretended device; what comes back there is on the CPU and, in float32, the same."""
    dtype, float64 = (MODES | REST)[mode]
    here = world(name, dtype, folder)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):  # the kernel there: others round ties to another side
        expected = dict(leaves(case(here)))
    with pretended(float64) as device:
        torch.manual_seed(0)
        found = dict(leaves(case(dataclasses.replace(here, model=on_device(made(name, dtype))))))
    assert not [place for place, value in found.items() if isinstance(value, OnDevice)]
    assert sum(device.operations.values()) > 20
    if dtype == torch.float32:
        assert list(found) == list(expected)
        assert not [place for place in found if not same(found[place], expected[place])]
    return device


named = pytest.mark.parametrize("case", ON_TINY, ids=lambda case: case.__name__)


@named
def test_the_port_and_its_sweeps(case, tmp_path):
    run_there("qwen2_vl", case, "mps float32", tmp_path)


@pytest.mark.parametrize("case", (forward, caches, generation), ids=lambda case: case.__name__)
def test_the_port_in_half_precision(case, tmp_path):
    run_there("qwen2_vl", case, "cuda bfloat16", tmp_path)


def test_the_line(tmp_path):
    run_there("qwen3_vl", forward, "mps float32", tmp_path)


@pytest.mark.parametrize("case", ON_SCENES, ids=lambda case: case.__name__)
def test_the_analyses(case, tmp_path):
    run_there("scenes", case, "mps float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.__name__)
def test_the_longer_analyses_and_the_experiments(case, tmp_path):
    run_there("scenes", case, "mps float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", REST)
@named
def test_the_port_in_the_other_precisions(case, mode, tmp_path):
    run_there("qwen2_vl", case, mode, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))
@pytest.mark.parametrize("case", (caches, generation, sweeps), ids=lambda case: case.__name__)
def test_the_line_everywhere(case, family, tmp_path):
    run_there(family, case, "mps float32", tmp_path)


# ---- the device itself ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_check_against_transformers_runs_there():
    model, reference = made("qwen2_vl", torch.float32), tiny_hf()
    with pretended(float64=False):
        assert self_check(on_device(model), on_device(reference))["ok"].all()


def test_it_refuses_what_cuda_and_mps_refuse():
    with pretended() as device:
        there, here = on_device(torch.arange(6.0)), torch.arange(6.0)
        refused = {
            "two tensors": lambda: there + here,
            "an index": lambda: here[there.long()],
            "a value": lambda: there.__setitem__(slice(0, 6), here),
            "numpy": lambda: there.numpy(),
            "an array": lambda: np.asarray(there),
            "a generator": lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
            "integers": lambda: there.long()[None] @ there.long()[:, None],
        }
        for what, call in refused.items():
            with pytest.raises(MixedDevices):
                call()
                pytest.fail(f"{what} was not refused")
        assert isinstance(there.double() * 2, OnDevice) and isinstance(here.to("cuda"), OnDevice)
        assert type(there.cpu()) is Tensor and device.transfers["_to_copy"] == 1
    with pretended(float64=False), pytest.raises(NoFloat64):
        on_device(torch.arange(6.0)).double()


def test_a_device_context_holds_there_though_it_is_torchs_first():
    """transformers loads inside `with torch.device("meta")`, and asks `torch.tensor([])` whether that holds."""
    _device_constructors.cache_clear()
    with pretended(), torch.device("meta"):
        assert torch.tensor([]).is_meta and torch.as_tensor([1.0]).is_meta


def test_pictures_take_what_is_on_the_device():
    image, values = picture(56, 56), torch.rand(2, 3, 4)
    with pretended():
        there = on_device(values)
        attention_on_image(there, (2, 2), image)
        maps_on_image({"map": there[:, 0]}, (2, 2), image)
        recovery_map(there[0], range(3), list("abcd"), "title")
        recovery_on_image(there.unflatten(-1, (2, 2))[:, 0], range(2), [np.asarray(image), torch.from_numpy(np.array(image))])


@torch.no_grad()
def test_a_decoding_step_waits_for_the_device_once(tmp_path):
    """Which rows go on and whether all was finite come together; the rest of a step is only sent."""
    model, waits = made("qwen2_vl", torch.float32), []
    with pretended() as device:
        inputs = on_device(model).to_inputs(["red?", "what?"], images=[[picture(56, 56)], []])
        for n in (4, 9):
            device.transfers.clear()
            model.generate(inputs, **settings(max_new_tokens=n, stop_at_eos=False, return_type="inputs"))
            waits.append(sum(device.transfers.values()))
    assert waits[1] - waits[0] == 5


@torch.no_grad()
def test_a_forward_waits_for_the_device_as_often_whatever_its_depth(tmp_path):
    waits = []
    for depth in (2, 4):
        model = HookedQwen2VL.from_hf(tiny_hf(n_layers=depth, vision_layers=depth), tiny_processor())
        with pretended() as device:
            inputs = on_device(model).to_inputs("red?", images=[picture(56, 56)])
            device.transfers.clear()
            model(inputs)
            waits.append(sum(device.transfers.values()))
    assert waits[0] == waits[1] <= 6


@torch.no_grad()
def test_encoded_prompts_are_where_the_model_is():
    """`Inputs` that are on the CPU are brought there once, not again in each run of a sweep."""
    model = made("qwen2_vl", torch.float32)
    prompts = model.to_inputs("red?", images=[picture(56, 56)]), model.to_inputs("red?")
    with pretended():
        on_device(model)
        for inputs in prompts:
            assert isinstance(model.to_inputs("red?").tokens, OnDevice)  # as they come from the processor
            encoded = model.encode(inputs)
            assert all(isinstance(x, OnDevice) for x in (encoded.tokens, encoded.position_ids, encoded.attention_mask))
