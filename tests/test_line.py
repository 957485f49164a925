"""Qwen2.5-VL and Qwen3-VL beside transformers: every stage, positions, decoding; and each part wrong once, which must show."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import picture
from test_geometries import PUBLISHED
from test_weights import old_layout
from tiny import real_rows, reference_logits, spread, tiny_hf, tiny_processor, tiny_processor3

from analyses.cli import main
from hooked_qwen2vl import HookedQwen2VL, Inputs, cache_image, vision_qwen3, vision_qwen25
from hooked_qwen2vl import model as model_module
from hooked_qwen2vl.config import convert_config
from hooked_qwen2vl.selfcheck import reference_batch, reference_stages, relative_error, self_check

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TOLERANCE = 1e-5  # of the spread; 5.4e-6 is the largest seen in logits
STAGE_TOLERANCE = 3e-5  # 1.5e-5 seen: a stage's spread is smaller than its largest number
FRAMES = [picture(84, 56, 10 + i) for i in range(5)]
WIDE, TALL, SMALL, BIG = picture(140, 84, 1), picture(60, 115, 2), picture(56, 56, 3), picture(300, 190, 4)
CHANGES = {  # more hostile shapes: (family, configuration)
    "one window is larger than the image": ("qwen2_5_vl", {"window": 560}),
    "a window is one token": ("qwen2_5_vl", {"window": 28, "full": ()}),
    "windows that divide nothing, tied": ("qwen2_5_vl", {"window": 84, "tie": True, "n_key_value_heads": 1}),
    "one merger, after the last block of the tower": ("qwen3_vl", {"deepstack": (3,)}),
    "three mergers, tied, as many heads": ("qwen3_vl", {"deepstack": (0, 1, 3), "tie": True, "n_key_value_heads": 4}),
    "no merger, a table as large as the grid": ("qwen3_vl", {"deepstack": (), "side": 12}),
}


def processor_of(family: str):
    return tiny_processor3() if family == "qwen3_vl" else tiny_processor()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(hooked model, reference)."""
    hf = tiny_hf(family=request.param)
    return HookedQwen2VL.from_hf(hf, processor_of(request.param)), hf


def prompts(model: HookedQwen2VL) -> dict[str, Inputs]:
    return {
        "image": model.to_inputs("what is this?", images=[WIDE]),
        "large image": model.to_inputs("what is this?", images=[BIG]),
        "text": model.to_inputs("red or blue, the thing"),
        "video": model.to_inputs("what happens?", videos=[FRAMES], fps=1.5),
        "image and video": model.to_inputs("is it there?", images=[TALL], videos=[FRAMES], fps=3),
        "batch": model.to_inputs(
            ["what?", "which of the two is red?", "the red thing", "go on"],
            images=[[WIDE], [TALL, SMALL], [], [SMALL]],
            videos=[[], [], [FRAMES], []],
            answers=["blue", None, "red red", None],
            fps=0.7,
        ),
        "no template": model.to_inputs("the red", images=[TALL], template=False),
    }


def logits_error(model: HookedQwen2VL, hf, inputs: Inputs) -> float:
    """The largest difference from the reference in float64, of its spread: in float32 the reference rounds as much as this model."""
    exact = copy.deepcopy(hf).double()
    with torch.no_grad():
        ours, theirs = (real_rows(x, inputs) for x in (model(inputs), reference_logits(exact, inputs)))
    return ((ours - theirs).abs().max() / spread(theirs)).item()


def reference_positions(hf, inputs: Inputs):
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    batch = reference_batch(inputs)
    positions, delta = hf.model.get_rope_index(**{name: batch[name] for name in names if name in batch})
    return positions, delta.flatten()


def test_every_stage_positions_and_logits_are_the_references(pair):
    model, hf = pair
    for kind, inputs in prompts(model).items():
        theirs = reference_stages(hf, inputs)
        logits, cache = model.run_with_cache(inputs, names_filter=[name for name in theirs if name != "logits"])
        for name, expected in theirs.items():
            ours = logits if name == "logits" else cache[name]
            if not name.startswith("vision"):
                ours, expected = real_rows(ours, inputs), real_rows(expected, inputs)
            assert relative_error(ours, expected) < STAGE_TOLERANCE, (kind, name)
        assert logits_error(model, hf, inputs) < TOLERANCE, kind
        positions, delta = reference_positions(hf, inputs)
        assert torch.equal(inputs.position_ids, positions) and torch.equal(inputs.rope_delta, delta), kind


def test_the_processors_batch_gives_the_same_prompts(pair):
    model, _ = pair
    for kind, inputs in prompts(model).items():
        again = Inputs.from_processor(reference_batch(inputs), model.cfg)
        assert torch.equal(again.position_ids, inputs.position_ids), kind
        if kind != "no template" and "and" not in kind:
            assert [set(row) for row in again.segments] == [set(row) for row in inputs.segments], kind


@pytest.mark.parametrize("change", CHANGES)
def test_hostile_shapes(change):
    family, config = CHANGES[change]
    hf = tiny_hf(family=family, **config)
    model = HookedQwen2VL.from_hf(hf, processor_of(family))
    inputs = model.to_inputs(["what?", "which is red?", "go on"], images=[[WIDE], [TALL, BIG], []])
    assert logits_error(model, hf, inputs) < TOLERANCE


def test_greedy_tokens_of_a_padded_batch(pair):
    model, hf = pair
    table = self_check(model, hf)
    assert table["ok"].all(), table.to_string()
    inputs = prompts(model)["batch"]
    hf.model.rope_deltas = None
    expected = hf.generate(**reference_batch(inputs), max_new_tokens=6, do_sample=False, eos_token_id=-1)[:, -6:]
    for cached in (True, False):
        ours = model.generate(
            inputs, max_new_tokens=6, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, return_type="tokens", verbose=False
        )
        assert torch.equal(ours[:, -6:], expected), cached


def test_bfloat16_is_no_worse_than_the_references_own(pair):
    model, _ = pair
    family = model.cfg.vision.tower
    hf = tiny_hf(family=family, dtype=torch.bfloat16)
    ours = HookedQwen2VL.from_hf(hf, processor_of(family))
    inputs = prompts(ours)["batch"]
    wide = tiny_hf(family=family, dtype=torch.bfloat16).double()
    with torch.no_grad():
        exact = real_rows(reference_logits(wide, inputs), inputs)
        error = (real_rows(ours(inputs), inputs) - exact).pow(2).mean().sqrt()
        reference = (real_rows(reference_logits(hf, inputs), inputs) - exact).pow(2).mean().sqrt()
    assert error <= 1.25 * reference


# ---- one part wrong -----------------------------------------------------------------------------------


def no_windows(model, monkeypatch):
    monkeypatch.setattr(model.vision_encoder, "cfg", replace(model.cfg.vision, full_attention_layers=(0, 1, 2)))


def other_windows(model, monkeypatch):
    for part in (model.vision_encoder, model.vision_projector):
        monkeypatch.setattr(part, "cfg", replace(model.cfg.vision, window=3))


def windows_out_of_order(model, monkeypatch):
    right = vision_qwen25.window_order
    monkeypatch.setattr(vision_qwen25, "window_order", lambda *args: (right(*args)[0].argsort(), right(*args)[1]))


def not_back_in_raster_order(model, monkeypatch):
    monkeypatch.setattr(model.vision_projector, "cfg", replace(model.cfg.vision, window=1000))


def deepstack_off_by_one(model, monkeypatch):
    right = model_module.deepstack_terms
    monkeypatch.setattr(model_module, "deepstack_terms", lambda *args: right(*args)[::-1])


def positions_not_interpolated(model, monkeypatch):
    right = vision_qwen3.interpolation
    monkeypatch.setattr(vision_qwen3, "interpolation", lambda *args: (right(*args)[0], right(*args)[1].round()))


def mrope_in_sections(model, monkeypatch):
    monkeypatch.setattr(model.cfg, "text", replace(model.cfg.text, mrope_interleaved=False))


def exact_gelu(model, monkeypatch):
    for block in model.vision_encoder.blocks:
        monkeypatch.setattr(block.mlp, "activation", F.gelu)


def no_query_norm(model, monkeypatch):
    for block in model.blocks:
        monkeypatch.setattr(block.attn.q_norm, "forward", lambda x: x)


FAULTS = {
    "qwen2_5_vl": (no_windows, other_windows, windows_out_of_order, not_back_in_raster_order),
    "qwen3_vl": (deepstack_off_by_one, positions_not_interpolated, mrope_in_sections, exact_gelu, no_query_norm),
}


def test_one_part_wrong_shows(pair):
    model, hf = pair
    inputs = prompts(model)["large image"]
    for fault in FAULTS[model.cfg.vision.tower]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault(model, monkeypatch)
            assert logits_error(model, hf, inputs) > 10 * TOLERANCE, fault.__name__
    assert logits_error(model, hf, inputs) < TOLERANCE


def test_time_in_frames_shows():
    hf = tiny_hf(family="qwen2_5_vl")
    model = HookedQwen2VL.from_hf(hf, processor_of("qwen2_5_vl"))
    inputs = prompts(model)["video"]
    frames = replace(inputs.visuals[0], seconds_per_frame=1 / model.cfg.vision.tokens_per_second)
    wrong = Inputs.build(inputs.tokens, model.cfg, None, [frames], inputs.pixels)
    with torch.no_grad():
        assert (model(wrong) - reference_logits(hf, inputs)).abs().max() > 1e-2


# ---- order, places, errors ----------------------------------------------------------------------------


def test_the_towers_activations_in_raster_order(pair):
    model, hf = pair
    inputs = model.to_inputs(["first", "second?"], images=[[WIDE], [BIG, TALL]])
    _, cache = model.run_with_cache(inputs, vision=True)
    weight, bias = model.vision_encoder.patch_embed.weight, model.vision_encoder.patch_embed.bias
    raster = inputs.pixels.split([visual.n_patches for visual in inputs.visuals])
    for number, (row, image) in enumerate(((0, 0), (1, 0), (1, 1))):
        visual = inputs.visuals[number]
        t, h, w = visual.grid
        merged = raster[number].view(h // 2, w // 2, 2, 2, -1).transpose(1, 2).reshape(h, w, -1)
        ours = cache_image(cache, "vision_encoder.hook_patch_embed", inputs, row, image)
        torch.testing.assert_close(ours, F.linear(merged, weight, bias), rtol=1e-4, atol=1e-4)
        tokens = cache_image(cache, "vision_projector.hook_out", inputs, row, image)
        found = cache["hook_embed"][row, inputs.resolve(f"image[{image}]", row)].unflatten(0, (h // 2, w // 2))
        torch.testing.assert_close(tokens, found)


def test_a_videos_frames_and_times_are_places(pair):
    model, _ = pair
    inputs = prompts(model)["video"]
    whole = inputs.resolve("video[0]").tolist()
    assert whole == inputs.resolve("video").tolist() == sum((inputs.resolve(f"video[0].frame[{t}]").tolist() for t in range(3)), [])
    if not model.cfg.vision.timestamps:
        assert inputs.span("video[0]") == slice(whole[0], whole[-1] + 1)
        return
    with pytest.raises(ValueError, match="not contiguous"):
        inputs.span("video[0]")
    text = [model.tokenizer.decode(inputs.tokens[0, inputs.resolve(f"video[0].time[{t}]")]) for t in range(3)]
    assert text == ["<0.3 seconds>", "<1.7 seconds>", "<2.7 seconds>"]  # frames 0, 1 | 2, 3 | 4, 4 at 1.5 a second
    again = Inputs.from_processor(reference_batch(inputs), model.cfg)
    assert [again.resolve(f"video[0].time[{t}]").tolist() for t in range(3)] == [
        inputs.resolve(f"video[0].time[{t}]").tolist() for t in range(3)
    ]


@pytest.mark.parametrize("fps", [None, 0, -1, float("nan"), True, "2", [1.0, 2.0]])
def test_a_video_needs_its_frame_rate(pair, fps):
    with pytest.raises(ValueError, match="fps"):
        pair[0].to_inputs("what happens?", videos=[FRAMES], fps=fps)


def test_a_model_without_time_refuses_a_frame_rate(model):
    with pytest.raises(ValueError, match="no effect"):
        model.to_inputs("what happens?", videos=[FRAMES], fps=2)


# ---- files --------------------------------------------------------------------------------------------


def test_published_configurations_are_read():
    middle, new = (convert_config(PUBLISHED[family], family) for family in FAMILIES)
    assert (middle.d_head, middle.vision.window, middle.vision.tokens_per_second) == (128, 4, 2)
    assert middle.vision.full_attention_layers == (7, 15, 23, 31) and middle.text.tie_word_embeddings and middle.rotary_base == 1e6
    assert (new.d_head, new.n_heads, new.vision.position_side, new.rotary_base) == (128, 16, 48, 5e6)
    assert new.vision.deepstack_layers == (5, 11, 17) and new.text.mrope_section == (24, 20, 20) and new.special.eos == (151645,)


@pytest.mark.parametrize(
    "family, part, change, message",
    [
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [11, 5, 17]}, "in order"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 2300}, "the square of a side"),
        ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_vl", "text_config", {"num_hidden_layers": 3}, "fewer than the decoder's 3 blocks"),
        ("qwen3_vl", "text_config", {"num_experts": 8}, "num_experts = 8"),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen2_5_vl", "vision_config", {"window_size": 14}, "window_size = 14"),
        ("qwen2_5_vl", "vision_config", {"tokens_per_second": 0}, "tokens_per_second = 0"),
        ("qwen2_5_vl", "vision_config", {"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes"),
    ],
)
def test_what_is_not_computed_is_refused(family, part, change, message):
    config = {**PUBLISHED[family], part: {**PUBLISHED[family][part], **change}}
    with pytest.raises(ValueError, match=message):
        convert_config(config, family)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_as_published_equals_the_reference(family, tie, tmp_path):
    """Qwen2.5-VL: a flat configuration, names without `language_model`, shards; Qwen3-VL: `rope_scaling` in its text configuration."""
    hf = tiny_hf(family=family, tie=tie)
    old_layout(tmp_path, hf, 2) if family == "qwen2_5_vl" else hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if family == "qwen3_vl":
        rope = config["text_config"].pop("rope_parameters")
        config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "dtype": "bfloat16"}
        config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = HookedQwen2VL.from_pretrained(tmp_path, dtype=torch.float32)
    model.processor = processor_of(family)
    for name, inputs in prompts(model).items():
        assert logits_error(model, hf, inputs) < TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_loaded_and_checked(family, tmp_path, capsys):
    """As transformers writes it; the command `check` compares it with the class that its configuration names."""
    hf, processor = tiny_hf(family=family), processor_of(family)
    hf.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    assert main(["check", "--model", str(tmp_path)]) == 0
    assert "every stage agrees" in capsys.readouterr().out
    model = HookedQwen2VL.from_pretrained(tmp_path)
    videos = {"videos": [FRAMES], "fps": 2}
    ours, theirs = (m.to_inputs("what?", **videos) for m in (model, HookedQwen2VL.from_hf(hf, processor)))
    assert model.cfg.original_architecture == type(hf).__name__ and ours.shape[1] >= theirs.shape[1]
