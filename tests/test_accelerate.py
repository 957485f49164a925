"""One model over CPU and disk, one data set over two processes: the same numbers, or an error; never garbage."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import PartialState, cpu_offload, debug_launcher, dispatch_model
from conftest import picture, prompts
from run_child import full_run
from same_runs import one_thread, one_thread_environment, same_csv, same_rows
from tiny import tiny_hf, tiny_processor, tiny_processor3
from transformer_lens import patching
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.tools.analysis import logit_lens as transformer_lens_logit_lens

from analyses.logit_lens import logit_lens
from analyses.runs.engine import describe_model, read_results, this_rank
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.devices import n_devices, to_its_device
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache

WHOLE = ["Block", "VisionProjector"]
MODULES = [
    "vision_encoder.patch_embed", "vision_encoder.blocks.0", "vision_encoder.blocks.1", "vision_projector", "embed",
    "blocks.0", "blocks.1", "blocks.2", "ln_final", "unembed",
]  # fmt: skip
HALF = ["vision_encoder.blocks.0", "vision_projector", "blocks.1", "ln_final", "unembed"]
SPREADS = ["half on disk", "tied, half on disk", "all on disk", "offloaded to CPU"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints, untied and tied."""
    found = {}
    for tie in (False, True):
        found[tie] = tmp_path_factory.mktemp("tied" if tie else "untied")
        tiny_hf(tie=tie).save_pretrained(found[tie])
    return found


@pytest.fixture(scope="module", params=SPREADS)
def pair(request, folders, processor, tmp_path_factory):
    """(plain, spread out): the same weights."""
    folder, offload = folders[request.param.startswith("tied")], tmp_path_factory.mktemp("offload")
    plain = HookedQwen2VL.from_pretrained(folder)
    if request.param == "offloaded to CPU":
        spread = HookedQwen2VL.from_pretrained(folder)
        cpu_offload(spread, execution_device=torch.device("cpu"), preload_module_classes=WHOLE)
    else:
        away = HALF if "half" in request.param else MODULES
        device_map = {name: "disk" if name in away else "cpu" for name in MODULES}
        spread = HookedQwen2VL.from_pretrained(folder, device_map=device_map, offload_folder=offload)
    plain.processor = spread.processor = processor
    assert any(weight.is_meta for weight in spread.parameters())
    return plain, spread


@pytest.mark.parametrize("kind", ["text", "batch"])
@torch.no_grad()
def test_logits_and_every_activation_are_the_plain_models(pair, kind):
    plain, spread = pair
    inputs = prompts(plain)[kind]
    assert torch.equal(plain(inputs), spread(inputs))
    ours, theirs = (model.run_with_cache(inputs, names_filter=lambda name: True)[1] for model in (spread, plain))
    fired = [name for name in plain.hook_dict if name in theirs]
    assert "blocks.1.attn.hook_result" in fired and "blocks.1.attn.hook_q_input" in fired
    assert all(torch.equal(ours[name], theirs[name]) for name in fired)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_successors_on_disk_are_the_plain_models(family, tmp_path):
    tiny_hf(family=family).save_pretrained(tmp_path)
    plain = HookedQwen2VL.from_pretrained(tmp_path)
    parts = [f"vision_encoder.{name}" for name, _ in plain.vision_encoder.named_children() if name != "blocks"]
    parts += [f"vision_encoder.blocks.{layer}" for layer in range(plain.cfg.vision.n_layers)]
    parts += ["vision_projector", "embed", *(f"blocks.{layer}" for layer in range(plain.cfg.n_layers)), "ln_final", "unembed"]
    spread = HookedQwen2VL.from_pretrained(tmp_path, device_map=dict.fromkeys(parts, "disk"), offload_folder=tmp_path / "offload")
    plain.processor = spread.processor = tiny_processor3() if family == "qwen3_vl" else tiny_processor()
    inputs = plain.to_inputs("red?", images=[picture(96, 64)])
    ours, theirs = (model.run_with_cache(inputs, vision=True) for model in (spread, plain))
    assert torch.equal(ours[0], theirs[0]) and ours[1].vision.keys() == theirs[1].vision.keys()
    assert all(torch.equal(ours[1].vision[name], theirs[1].vision[name]) for name in theirs[1].vision)
    said = [model.generate(inputs, max_new_tokens=3, do_sample=False, return_type="tokens", verbose=False) for model in (spread, plain)]
    assert torch.equal(*said)


@torch.no_grad()
def test_hooks_patching_lens_and_generation_are_the_plain_models(pair):
    plain, spread = pair
    inputs, other = (plain.to_inputs("red?", images=[picture(56, 84, seed)], template=False) for seed in (1, 2))

    def double(activation, hook):
        activation[:, 3:] *= 2
        return activation

    for name in ("blocks.1.attn.hook_result", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern", "ln_final.hook_scale"):
        hooked = [model.run_with_hooks(inputs, fwd_hooks=[(name, double)]) for model in (plain, spread)]
        assert torch.equal(*hooked) and not torch.equal(hooked[0], plain(inputs))
    _, clean = plain.run_with_cache(other)
    sweeps = [
        patching.get_act_patch_resid_pre(model, model.encode(inputs), clean, lambda logits: logits[0, -1, 7] - logits[0, -1, 9])
        for model in (plain, spread)
    ]
    assert torch.equal(*sweeps) and sweeps[0].std() > 0
    caches = [model.run_with_cache(inputs, names_filter=_with_results(model))[1] for model in (plain, spread)]
    lenses = [cache.accumulated_resid(apply_ln=True) for cache in caches]
    assert torch.equal(*lenses) and torch.equal(plain.unembed(lenses[0]), spread.unembed(lenses[1]))
    assert torch.equal(*(cache.stack_head_results(layer=2) for cache in caches))
    settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    hooks = [("blocks.1.hook_resid_post", double)]
    assert torch.equal(*(model.generate(inputs, **settings) for model in (plain, spread)))
    assert torch.equal(*(model.generate(inputs, fwd_hooks=hooks, **settings) for model in (plain, spread)))
    assert torch.equal(*(model.generate(inputs, use_past_kv_cache=False, **settings) for model in (plain, spread)))


def _with_results(model):
    return lambda name: not name.startswith("vision_")


def test_prefixes_stops_loss_and_gradients_are_the_plain_models(pair):
    plain, spread = pair
    inputs = plain.to_inputs("what?", images=[picture(140, 84)], answers="red")
    with torch.no_grad():
        encoded = spread.encode(inputs)
        assert torch.equal(encoded.image_embeds, plain.encode(inputs).image_embeds)
        assert encoded.encoded_by == spread.tower_stamp()  # and so it is not computed again
        assert torch.equal(ImageEmbeddingsCache(spread)(inputs).image_embeds, ImageEmbeddingsCache(plain)(inputs).image_embeds)
        assert plain(inputs, return_type="loss") == spread(encoded, return_type="loss")
        stopped = spread(inputs, stop_at_layer=1)
        assert torch.equal(spread(stopped, inputs=inputs, start_at_layer=1), plain(stopped, inputs=inputs, start_at_layer=1))
    gradients = []
    for model in (plain, spread):
        pixels = inputs.pixels.clone().requires_grad_()
        model(replace(inputs, pixels=pixels))[0, -1].max().backward()
        gradients.append(pixels.grad)
        model.zero_grad()
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


READS = {
    "W_Q": lambda m: m.W_Q, "W_K": lambda m: m.W_K, "W_V": lambda m: m.W_V, "W_O": lambda m: m.W_O, "b_Q": lambda m: m.b_Q,
    "W_in": lambda m: m.W_in, "W_gate": lambda m: m.W_gate, "W_out": lambda m: m.W_out, "W_U": lambda m: m.W_U,
    "QK": lambda m: m.QK, "OV": lambda m: m.OV, "accumulated_bias": lambda m: m.accumulated_bias(2),
    "directions": lambda m: m.tokens_to_residual_directions(5), "composition": lambda m: m.all_composition_scores("K"),
    "tl_parameters": lambda m: m.tl_parameters(), "export": lambda m: m.export_text_model("nowhere"),
    "process_weights": lambda m: m.process_weights(), "half": lambda m: m.half(), "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.float64), "block": lambda m: m.blocks[1].attn.W_O, "tower": lambda m: m.vision_projector.W_in,
}  # fmt: skip


@pytest.mark.parametrize("what", READS)
def test_what_would_touch_an_absent_weight_is_an_error(pair, what):
    plain, spread = pair
    inputs = plain.to_inputs("what?")
    with pytest.raises(RuntimeError, match="offloaded"), torch.no_grad():
        READS[what](spread)
    with torch.no_grad():  # and nothing was changed on the way there
        assert torch.equal(plain(inputs), spread(inputs)) and spread.cfg.dtype == torch.float32


@torch.no_grad()
def test_what_needs_no_weight_works(pair):
    plain, spread = pair
    for name in ("b_U", "b_in", "b_out"):
        assert torch.equal(getattr(plain, name), getattr(spread, name))
    assert torch.equal(plain.accumulated_bias(0), spread.accumulated_bias(0))
    _, cache = spread.run_with_cache(plain.to_inputs("what?", template=False))
    with pytest.raises(RuntimeError, match="offloaded"):
        cache.stack_head_results(layer=2)  # W_O is not here, and hook_result was not cached
    with pytest.raises(RuntimeError, match="offloaded"):
        cache.apply_ln_to_stack(cache.decompose_resid())  # the final norm's weight is not here
    assert describe_model(spread) == {**describe_model(plain), "name": spread.cfg.model_name}


def test_maps_that_would_go_wrong_are_refused(folders, tmp_path):
    def load(device_map, **more):
        return HookedQwen2VL.from_pretrained(folders[False], device_map=device_map, **more)

    disk = {name: "disk" if name in HALF else "cpu" for name in MODULES}
    with pytest.raises(ValueError, match="pass offload_folder="):
        load(disk)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        load(disk, offload_folder=tmp_path)
    halves = {**{name: "cpu" for name in MODULES if name != "blocks.1"}, "blocks.1.attn": "disk", "blocks.1.mlp": "cpu"}
    with pytest.raises(ValueError, match="'blocks.1.attn', a part of 'blocks.1', which must stay whole"):
        load(halves)
    with pytest.raises(ValueError, match="unembed"):
        load({name: "cpu" for name in MODULES if name != "unembed"})
    with pytest.raises(ValueError, match="device_map must be"):
        load("everywhere")
    with pytest.raises(ValueError, match="a map says itself"):
        load({"": "cpu"}, max_memory={"cpu": "1GiB"})
    with pytest.raises(ValueError, match="belong to a device_map"):
        HookedQwen2VL.from_pretrained(folders[False], max_memory={"cpu": "1GiB"})


@torch.no_grad()
def test_auto_puts_what_does_not_fit_on_disk(folders, tmp_path, processor):
    """Blocks stay whole where memory ends."""
    plain = HookedQwen2VL.from_pretrained(folders[False])
    size = sum(weight.nbytes for weight in plain.parameters())
    spread = HookedQwen2VL.from_pretrained(
        folders[False], device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "new"
    )
    places = spread.hf_device_map
    assert set(places.values()) == {"cpu", "disk"} and not any(".attn" in name or ".mlp" in name for name in places)
    plain.processor = processor
    inputs = prompts(plain)["two images"]
    assert torch.equal(plain(inputs), spread(inputs))


def test_reference_models_whose_weights_are_elsewhere_are_refused(tmp_path):
    hf = tiny_hf()
    dispatch_model(hf, {"model": "disk", "lm_head": "cpu"}, offload_dir=tmp_path)
    with pytest.raises(ValueError, match="spread over cpu, meta"):
        HookedQwen2VL.from_hf(hf)


def test_several_devices_bring_their_parts_together():
    """What the two helpers for several accelerators do; no second one is here, so `meta` stands for it."""
    entry = TransformerLensKeyValueCacheEntry(torch.empty(1, 0, 2, 4), torch.empty(1, 0, 2, 4))
    block = torch.nn.Identity()
    assert to_its_device(entry, block).past_keys.device.type == "cpu"
    block._hf_hook = type("Hook", (), {"execution_device": "meta"})()
    assert to_its_device(entry, block).past_values.device.type == "meta"
    model = torch.nn.Identity()
    assert n_devices(model) == 1
    model.hf_device_map = {"a": 0, "b": "cpu", "c": "disk"}
    assert n_devices(model) == 1
    model.hf_device_map["d"] = 1
    assert n_devices(model) == 2


def test_float16_that_overflows_is_an_error_that_names_the_layer(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.float16), processor)
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        assert model(inputs).isfinite().all()
        weight = model.blocks[1].mlp.down_proj.weight.clone()
        model.blocks[1].mlp.down_proj.weight.fill_(6e4)
        for call in (lambda: model(inputs), lambda: model.generate(inputs, verbose=False)):
            with pytest.raises(ValueError, match=r"blocks\.1 gave numbers that are not finite"):
                call()
        assert model(inputs, stop_at_layer=1).isfinite().all()
        model.blocks[1].mlp.down_proj.weight.copy_(weight)
        tower = model.vision_encoder.blocks[1].mlp.fc2.weight
        tower.fill_(6e4)
        with pytest.raises(ValueError, match=r"vision_encoder\.blocks\.1 gave numbers"):
            model(inputs)
        assert model(model.to_inputs("what?")).isfinite().all()  # the tower does not run


@pytest.mark.parametrize(
    "name, said",
    [
        ("vision_encoder.patch_embed.weight", r"vision_encoder\.patch_embed"), ("vision_projector.fc2.weight", "vision_projector"),
        ("blocks.0.attn.q_proj.weight", r"blocks\.0"), ("blocks.2.mlp.up_proj.weight", r"blocks\.2"),
        ("ln_final.w", "ln_final"), ("unembed.weight", "unembed"),
    ],
)  # fmt: skip
def test_float16_is_watched_from_the_patches_to_the_logits(name, said, processor):
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.float16), processor)
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        model.get_parameter(name).fill_(6e4)
        for call in (
            lambda: model(inputs), lambda: model(inputs, return_type="loss"), lambda: model(inputs, logits_at=-1),
            lambda: model.run_with_cache(inputs), lambda: model.generate(inputs, verbose=False),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=rf"^{said} gave numbers that are not finite: float16 ends at 65,504"):
                call()


@pytest.mark.parametrize("name", ["ln_final", "unembed"])
def test_lenses_in_float16_are_watched_too(name, processor):
    """They norm and unembed the cached stream themselves. The readout multiplies in float32, which does not overflow."""
    model = HookedQwen2VL.from_hf(tiny_hf(dtype=torch.float16), processor)
    inputs = model.to_inputs("what?", images=[picture(84, 56)])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        model.get_submodule(name).get_parameter("w" if name == "ln_final" else "weight").fill_(6e4)
        stream = cache.accumulated_resid(pos_slice=-1)
        calls = [lambda: transformer_lens_logit_lens(model, inputs), lambda: model.unembed(model.ln_final(stream))]
        calls += [lambda: logit_lens(model, inputs, "image")] if name == "ln_final" else []
        for call in calls:
            with pytest.raises(ValueError, match=rf"^{name} gave numbers that are not finite"):
                call()


def _share_of_the_run(out: str) -> None:
    PartialState._reset_state()  # of the test's own process, which this one was forked from
    share = this_rank()
    assert share[1] == 2
    full_run(out, 24)
    Path(out, f"share-{share[0]}").touch()


FLIPS = ["flips", "--limit", "5", "--random", "1", "--batch-size", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def launched(launcher, arguments) -> str:
    """What two processes print; each with one thread."""
    command = [sys.executable, *launcher, "-m", "hooked_qwen2vl.cli", *arguments]
    return subprocess.run(command, env=one_thread_environment(), check=True, capture_output=True, text=True).stdout


@one_thread()
def in_one_process(arguments) -> None:
    assert main(arguments) == 0


def same_tables(one, two):
    runs = sorted(file.parent.relative_to(one) for file in one.rglob("run.json"))
    for run in runs:
        same_rows(read_results(one / run), read_results(two / run))
    tables = sorted(file.relative_to(one) for file in one.rglob("*.csv"))
    for table in tables:
        same_csv(one / table, two / table)
    assert runs and tables


@pytest.mark.slow
def test_torchrun_gives_the_table_of_one_process(tmp_path):
    """The command itself, on the embedded model: both do a share, one makes the tables, row for row those of one process."""
    said = launched(TORCHRUN, [*FLIPS, "--out", str(tmp_path / "two")])
    assert said.count("wrote ") == 8
    in_one_process([*FLIPS, "--out", str(tmp_path / "one")])
    same_tables(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two" / "rows").glob("part-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, arguments",
    [
        (ACCELERATE, FLIPS),
        (TORCHRUN, ["neurons", "--limit", "24", "--test-limit", "8", "--seeds", "1", "--batch-size", "1"]),
        (TORCHRUN, ["hallucination", "--limit", "24", "--batch-size", "2", "--n-boot", "10"]),
    ],
    ids=["accelerate", "neurons", "hallucination"],
)
def test_launched_commands_give_the_tables_of_one_process(launcher, arguments, tmp_path):
    launched(launcher, [*arguments, "--out", str(tmp_path / "two")])
    in_one_process([*arguments, "--out", str(tmp_path / "one")])
    same_tables(tmp_path / "one", tmp_path / "two")


def test_two_launched_processes_give_the_table_of_one(tmp_path):
    """Two CPU processes of accelerate's: each does its share, and reading the folder merges them, row for row."""
    full_run(str(tmp_path / "one"), 24)
    (tmp_path / "two").mkdir()
    debug_launcher(_share_of_the_run, args=(str(tmp_path / "two"),), num_processes=2)
    assert {file.name for file in (tmp_path / "two").glob("share-*")} == {"share-0", "share-1"}
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    pd.testing.assert_frame_equal(one, two, check_exact=True)
