"""The fast sweep against TransformerLens's plain loop, and the identities of patching."""

from __future__ import annotations

import pytest
import torch
from conftest import picture
from tiny import tiny_hf
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

from analyses.patching import patch_sweep, recovery
from hooked_qwen2vl import HookedQwen2VL

SAME = 1e-5  # float32; measured 2e-6
LOOPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_by_pos,
}


@pytest.fixture(scope="module")
def model(processor):
    return HookedQwen2VL.from_hf(tiny_hf(), processor)


@pytest.fixture(scope="module")
def pair(model):
    return tuple(model.to_inputs("is it red?", images=[picture(84, 56, seed)]) for seed in (1, 2))


@pytest.fixture(scope="module")
def batch(model):
    """Two pairs of different length: the shorter is padded."""
    prompts = ["is it?", "what is the thing?"]
    return tuple(model.to_inputs(prompts, images=[[picture(84, 56, s)], [picture(56, 56, s + 10)]]) for s in (1, 2))


def difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 7]


@pytest.mark.parametrize(
    ("activation", "batch_size"), [*((kind, 7) for kind in LOOPS), ("resid_pre", 1), ("resid_pre", 64), ("k", 64), ("v", 2)]
)
def test_every_cell_equals_the_plain_loop(model, pair, activation, batch_size):
    clean, corrupted = pair
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = LOOPS[activation](model, corrupted, cache, lambda logits: difference(logits)[0])
    ours = patch_sweep(model, clean, corrupted, difference, activation, batch_size=batch_size, progress=False)
    got = ours.values[..., 0]
    if activation == "pattern":
        theirs = theirs.transpose(1, 2)  # that loop puts heads before positions
    assert got.shape == theirs.shape and theirs.std() > 1e-3
    assert (got - theirs).abs().max() < SAME * max(1.0, theirs.abs().max().item())


def test_batches_of_pairs_with_padding(model, batch):
    clean, corrupted = batch
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = patching.get_act_patch_resid_pre(model, corrupted, cache, difference, reduce="none", baseline=True)
    ours = patch_sweep(model, clean, corrupted, difference, progress=False)
    assert torch.allclose(ours.values, theirs.values, atol=1e-4)
    assert torch.allclose(ours.baseline, theirs.baseline, atol=1e-5)
    assert torch.allclose(ours.mean(), theirs.mean(), atol=1e-4)


TOWER_HOOKS = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
               "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "z": "attn.hook_z", "q": "attn.hook_q",
               "k": "attn.hook_k", "v": "attn.hook_v", "pattern": "attn.hook_pattern"}  # fmt: skip


def tower_by_hand(model, clean, corrupted, kind, metric):
    """Every cell of the tower by whole runs of the model with one hook: [layer token (head) batch]."""
    n_tokens = int((corrupted.token_types[0] > 0).sum())
    layers = []
    for layer in range(model.cfg.vision.n_layers):
        name = f"vision_encoder.blocks.{layer}.{TOWER_HOOKS[kind]}"
        source = model.run_with_cache(clean, names_filter=name)[1].vision[name]
        heads = range(model.cfg.vision.n_heads) if "attn." in name else [None]
        tokens = []
        for token in range(n_tokens):
            # the packed tokens of row 0 and row 1, one after the other
            patches = [4 * (token + row * n_tokens) + i for row in range(len(corrupted)) for i in range(4)]
            cells = []
            for head in heads:

                def put(activation, hook):
                    if head is None:
                        activation[0, patches] = source[0, patches]
                    elif kind == "pattern":
                        activation[0, head, patches] = source[0, head, patches]
                    else:
                        activation[0, patches, head] = source[0, patches, head]
                    return activation

                cells.append(metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, put)])))
            tokens.append(torch.stack(cells) if heads != [None] else cells[0])
        layers.append(torch.stack(tokens))
    return torch.stack(layers)


@pytest.mark.parametrize("kind", TOWER_HOOKS)
def test_the_tower(model, kind):
    clean, corrupted = (model.to_inputs("red?", images=[picture(84, 56, seed)]) for seed in (1, 2))
    with torch.no_grad():
        theirs = tower_by_hand(model, clean, corrupted, kind, difference)
    ours = patch_sweep(model, clean, corrupted, difference, f"vision_encoder.{kind}", batch_size=7, progress=False)
    assert ours.values.shape == theirs.shape and theirs.std() > 1e-4
    assert (ours.values - theirs).abs().max() < SAME * max(1.0, theirs.abs().max().item())


def test_the_tower_of_a_batch(model):
    """Two pairs of one length whose images are packed; and patching all of the tower is patching the image."""
    clean, corrupted = (model.to_inputs(["red?", "red!"], images=[[picture(84, 56, s)], [picture(84, 56, s + 10)]]) for s in (1, 2))
    with torch.no_grad():
        theirs = tower_by_hand(model, clean, corrupted, "resid_pre", difference)
        goal = difference(model(clean))
    ours = patch_sweep(model, clean, corrupted, difference, "vision_encoder.resid_pre", progress=False)
    assert ours.values.shape == theirs.shape
    assert (ours.values - theirs).abs().max() < SAME * max(1.0, theirs.abs().max().item())
    whole = patch_sweep(model, clean, corrupted, difference, "vision_encoder.resid_pre", positions=["image"], progress=False)
    assert (whole.values - goal).abs().max() < 1e-4
    with pytest.raises(ValueError, match="image tokens"):
        patch_sweep(model, clean, corrupted, difference, "vision_encoder.resid_pre", positions=["question"])


def test_noising_is_denoising_the_other_way_round(model, pair):
    clean, corrupted = pair
    a = patch_sweep(model, clean, corrupted, difference, direction="noise", progress=False)
    b = patch_sweep(model, corrupted, clean, difference, direction="denoise", progress=False)
    assert torch.equal(a.values, b.values)


def test_identities(model, pair):
    """All positions of a stream → 1; before the image 0; at layer 0 the image is all; at the end the last."""
    clean, corrupted = pair
    with torch.no_grad():
        goal = difference(model(clean))
    n = clean.shape[1]
    spans = {"all": range(n), "image": "image", "last": "last"}
    for activation in ("resid_pre", "resid_mid", "resid_post"):
        result = patch_sweep(model, clean, corrupted, difference, activation, positions=spans, progress=False)
        ratio = recovery(result, goal)["mean_of_ratios"]
        assert (ratio[:, 0] - 1).abs().max() < 1e-4, activation
    assert abs(ratio[-1, 1]) < 1e-4 and abs(ratio[-1, 2] - 1) < 1e-4  # after the last block
    every = recovery(patch_sweep(model, clean, corrupted, difference, progress=False), goal)["mean_of_ratios"]
    image = clean.positions("image")
    assert every[:, : int(image[0])].abs().max() < 1e-4
    outside = [place for place in range(n) if place not in image.tolist()]
    assert every[0, outside].abs().max() < 1e-4
    whole = recovery(patch_sweep(model, clean, corrupted, difference, positions=["image"], progress=False), goal)
    assert abs(whole["mean_of_ratios"][0, 0] - 1) < 1e-4


def test_named_rows_and_chosen_axes(model, pair):
    result = patch_sweep(
        *(model, *pair, difference, "z"), layers=[1, -1], positions=["question", (0, 0, 28, 28), -1], heads=[2], progress=False
    )
    assert result.values.shape == (2, 3, 1, 1)
    assert result.index_df["layer"].unique().tolist() == [1, 2]
    assert result.index_df["pos"].unique().tolist() == ["question", (0, 0, 28, 28), -1]


def test_another_metric_position(model, pair):
    clean, corrupted = pair
    place = int(clean.positions("question")[0])
    ours = patch_sweep(model, clean, corrupted, difference, metric_position=place, progress=False)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = patching.get_act_patch_resid_pre(model, corrupted, cache, lambda logits: logits[0, place, 5] - logits[0, place, 7])
    assert (ours.values[..., 0] - theirs).abs().max() < 1e-4
    assert torch.equal(ours.values[:, place + 1 :, 0], ours.baseline.expand_as(ours.values[:, place + 1 :, 0]))


def test_an_interrupted_sweep_goes_on(model, pair, tmp_path, monkeypatch):
    file = tmp_path / "sweep.safetensors"
    whole = patch_sweep(model, *pair, difference, progress=False)
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) > 100:
            raise KeyboardInterrupt
        return difference(logits)

    with pytest.raises(KeyboardInterrupt):
        patch_sweep(model, *pair, failing, checkpoint=file, batch_size=8, progress=False)
    calls.clear()
    resumed = patch_sweep(model, *pair, lambda logits: calls.append(1) or difference(logits), checkpoint=file, progress=False)
    assert torch.allclose(resumed.values, whole.values, atol=1e-5)
    assert len(calls) == 2 * pair[0].shape[1] + 2  # two of three layers, and the two unpatched runs
    with pytest.raises(ValueError, match="another sweep"):
        patch_sweep(model, *pair, difference, "attn_out", checkpoint=file, progress=False)


def test_prompts_that_do_not_correspond(model, pair):
    with pytest.raises(ValueError, match="do not correspond"):
        patch_sweep(model, pair[0], model.to_inputs("no"), difference)
    turned = model.to_inputs("is it red?", images=[picture(56, 84, 1)])
    with pytest.raises(ValueError, match="grid"):
        patch_sweep(model, pair[0], turned, difference)
    with pytest.raises(ValueError, match="one number for each"):
        patch_sweep(model, *pair, lambda logits: logits[0, -1], progress=False)
    sizes = [(84, 56), (84, 56), (56, 56)]  # two rows agree on where the image is, the third does not
    rows = [model.to_inputs(["is it?"] * 3, images=[[picture(*size, seed)] for size in sizes]) for seed in (1, 2)]
    with pytest.raises(ValueError, match="other positions in other rows"):
        patch_sweep(model, *rows, difference, positions=["image"], progress=False)


@pytest.mark.parametrize("activation", ["resid_pre", "z", "pattern"])
def test_places_after_the_one_that_is_read(model, pair, activation):
    """A span that reaches past the metric's position is patched as far as it can change what is read."""
    clean, corrupted = pair
    at = int(clean.positions("question")[0])
    spans = {"all": slice(None), "reaching past": slice(at - 4, at + 3), "after": slice(at + 1, None)}
    options = {"metric_position": at, "positions": spans, "progress": False}
    ours = patch_sweep(model, clean, corrupted, difference, activation, **options)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for layer in range(model.cfg.n_layers):
            name = get_act_name(activation, layer)
            for row, places in enumerate(spans.values()):
                for head in range(ours.values.shape[2]) if activation != "resid_pre" else [None]:

                    def put(x, hook, places=places, head=head, source=cache[name]):
                        index = (
                            (slice(None), head, places)
                            if activation == "pattern"
                            else (slice(None), places)
                            if head is None
                            else (slice(None), places, head)
                        )
                        x[index] = source[index]
                        return x

                    theirs = difference(model.run_with_hooks(corrupted, fwd_hooks=[(name, put)], logits_at=at))
                    got = ours.values[(layer, row) if head is None else (layer, row, head)]
                    assert (got - theirs).abs().max() < SAME, (layer, row, head)
    for bad in (slice(-4, -1), [1, 2], 999, "image"):
        with pytest.raises(ValueError, match="one position|no position"):
            patch_sweep(model, clean, corrupted, difference, metric_position=bad, progress=False)


def test_recovery_in_both_directions_by_hand(model):
    """(patched − corrupted) / (clean − corrupted), whichever run is patched; skipped pairs in neither average."""
    clean, corrupted = batch = tuple(
        model.to_inputs(["is it?"] * 2, images=[[picture(84, 56, s)], [picture(84, 56, s + 10)]]) for s in (1, 2)
    )
    with torch.no_grad():
        best, worst = (difference(model(inputs)) for inputs in batch)
    for direction in ("denoise", "noise"):
        sweep = patch_sweep(model, clean, corrupted, difference, positions=["last", slice(None)], direction=direction, progress=False)
        source, target = (best, worst) if direction == "denoise" else (worst, best)
        assert torch.allclose(sweep.source_metric, source, atol=1e-5) and torch.allclose(sweep.baseline, target, atol=1e-5)
        found = recovery(sweep)
        expected = (sweep.values - worst) / (best - worst)
        assert torch.allclose(found["per_example"], expected, atol=1e-4) and found["skipped"] == 0
        assert torch.allclose(found["mean_of_ratios"], expected.mean(-1), atol=1e-4)
        assert torch.allclose(found["ratio_of_means"], (sweep.values - worst).mean(-1) / (best - worst).mean(), atol=1e-4)
        assert torch.allclose(found["mean_of_ratios"][:, 1], torch.full((3,), float(direction == "denoise")), atol=1e-4)
        assert torch.allclose(recovery(sweep, best)["per_example"], expected, atol=1e-3)
        with pytest.raises(ValueError, match="clean run the metric was"):
            recovery(sweep, worst)
        gaps = (best - worst).abs()
        between = float(gaps.mean())
        kept = gaps >= between
        assert kept.sum() == 1
        some = recovery(sweep, epsilon=between)
        assert some["skipped"] == 1 and some["per_example"][..., ~kept].isnan().all()
        assert torch.allclose(some["mean_of_ratios"], expected[..., kept][..., 0], atol=1e-4)
        assert torch.allclose(some["ratio_of_means"], expected[..., kept][..., 0], atol=1e-4)


def test_transformer_lens_results_need_their_baselines(model, pair):
    clean, corrupted = pair
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        theirs = patching.get_act_patch_attn_head_out_all_pos(
            model, corrupted, cache, lambda l: difference(l), reduce="none", baseline=True
        )
        goal = difference(model(clean))
    assert recovery(theirs, goal)["per_example"].isfinite().all()
    with pytest.raises(ValueError, match="needs its baseline"):
        recovery(theirs)


def test_records_of_other_metrics_and_models_are_refused(model, pair, tmp_path, processor):
    file = tmp_path / "sweep.safetensors"
    options = {"layers": [0], "positions": ["last"], "checkpoint": file, "progress": False}
    done = patch_sweep(model, *pair, difference, **options)
    again = patch_sweep(model, *pair, difference, **options)
    assert torch.equal(done.values, again.values)
    with pytest.raises(ValueError, match="another metric"):
        patch_sweep(model, *pair, lambda logits: logits[:, -1, 5] - logits[:, -1, 8], **options)
    other = HookedQwen2VL.from_hf(tiny_hf(), processor)
    with torch.no_grad():
        other.blocks[2].ln2.w.mul_(1.01)
    with pytest.raises(ValueError, match="another sweep"):
        patch_sweep(other, *pair, difference, **options)
    for at in (0, 1):  # the same words and grid, another picture
        pictures = list(pair)
        pictures[at] = model.to_inputs("is it red?", images=[picture(84, 56, 9)])
        with pytest.raises(ValueError, match="another sweep"):
            patch_sweep(model, *pictures, difference, **options)
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"x" * 100):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="delete it"):
            patch_sweep(model, *pair, difference, **options)
