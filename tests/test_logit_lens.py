"""The lens against its definition."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import half_characters
import pytest
import torch
from tiny import tiny_tokenizer

from analyses.common.vocabulary import characters, predictions_of
from analyses.logit_lens import logit_lens

ORDER = 1e-5  # logits this close may change places, as the last bits of a product depend on its shape; measured: 1.2e-6


@pytest.mark.parametrize("positions", ["last", "image", "question", slice(3, 9), -2])
def test_the_lens_is_the_norm_and_unembedding_of_every_entry(model, batches, positions):
    inputs = batches["image"]
    lens = logit_lens(model, inputs, positions, top_k=3, targets=[5, 7])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    streams = [cache["resid_pre", layer] for layer in range(model.cfg.n_layers)] + [cache["resid_post", -1]]
    for layer, stream in enumerate(streams):
        x = stream[0, list(lens.positions)].double()
        normed = x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() * model.ln_final.w.double()
        probs = (normed @ model.W_U.double()).softmax(-1).detach()
        top = probs.topk(3)
        assert torch.allclose(lens.top_probs[layer].double(), top.values, atol=1e-5)
        assert torch.equal(lens.top_ids[layer], top.indices)
        assert torch.allclose(lens.target_probs[layer].double(), probs[:, [5, 7]], atol=1e-5)
        assert torch.allclose(lens.entropy[layer].double(), -(probs * probs.log()).sum(-1), atol=1e-4)


def test_the_last_entry_is_the_models_prediction(model, batches):
    inputs = batches["batch"]
    with torch.no_grad():
        logits = model(inputs)
    for row in range(len(inputs)):
        lens = logit_lens(model, inputs, "last", row=row)
        assert lens.top_ids[-1, 0, 0] == logits[row, lens.positions[0]].argmax()


def test_table_and_picture(model, batches, tmp_path):
    lens = logit_lens(model, batches["image"], "image", top_k=2)
    assert lens.grid == batches["image"].grid()
    table = lens.to_dataframe()
    assert len(table) == (model.cfg.n_layers + 1) * len(lens.positions) * 2
    figure = lens.plot(tmp_path / "lens.png")
    assert (tmp_path / "lens.png").stat().st_size > 0
    assert len(figure.axes[0].texts) == (model.cfg.n_layers + 1) * len(lens.positions)


def test_every_column_of_the_table(model, batches):
    """Row by row from the fields; texts from the tokenizer."""
    inputs = batches["two images"]
    lens = logit_lens(model, inputs, "image[1]", top_k=2, targets=[0, 7])
    assert lens.grid == inputs.grid(0, 1) != inputs.grid(0, 0)
    assert logit_lens(model, inputs, "image[0]").grid == inputs.grid(0, 0)
    assert lens.target_ids.tolist() == [0, 7] and lens.target_tokens == tuple(map(model.tokenizer.decode, ([0], [7])))
    plain = logit_lens(model, inputs, "question")
    assert plain.target_ids is None and plain.target_tokens == () and plain.grid is None and plain.target_probs is None
    assert plain.prompt_tokens == tuple(model.tokenizer.decode([i]) for i in inputs.tokens[0, list(plain.positions)])
    rows = iter(lens.to_dataframe().to_dict("records"))
    for layer, label in enumerate(["0_pre", "1_pre", "2_pre", "final_post"]):
        for index, position in enumerate(inputs.positions("image[1]").tolist()):
            for rank in range(2):
                token = int(lens.top_ids[layer, index, rank])
                assert next(rows) == {
                    "layer": layer, "layer_label": label, "position": position, "prompt_token": "<|image_pad|>", "rank": rank + 1,
                    "token_id": token, "token": model.tokenizer.decode([token]),
                    "probability": float(lens.top_probs[layer, index, rank]), "entropy_nats": float(lens.entropy[layer, index]),
                    "differs_from_model": False,
                }  # fmt: skip
    assert next(rows, None) is None
    with pytest.raises(FrozenInstanceError):
        lens.grid = None


def test_the_first_and_the_last_entry_there_is(model, batches):
    L = model.cfg.n_layers
    for layers, expected in (([-L - 1], (0,)), ([L], (L,)), ([-1, 0], (L, 0))):
        assert logit_lens(model, batches["image"], layers=layers).layers == expected
    for layers in ([L + 1], [-L - 2], []):
        with pytest.raises(ValueError, match="layers must be in"):
            logit_lens(model, batches["image"], layers=layers)


def test_the_characters_of_tokens():
    """A token that is a part of a character is at that character, and so is the next part."""
    hard = half_characters.model()
    ids = hard.tokenizer("a𪚥 é红!")["input_ids"]
    text, spans = characters(hard, ids)
    assert text == "a𪚥 é红!" and len(spans) == len(ids)
    assert spans == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (3, 4), (3, 4), (4, 5), (5, 6)]
    half = hard.tokenizer("红 猫")["input_ids"][:2]  # ends with a part of a character
    assert characters(hard, half) == ("红 \ufffd", [(0, 1), (1, 3)]) and characters(hard, []) == ("", [])


def test_positions_that_are_not_there(model, batches):
    with pytest.raises(ValueError, match="no segment called"):
        logit_lens(model, batches["text"], "image")
    with pytest.raises(ValueError, match="no position 10000"):
        logit_lens(model, batches["text"], 10_000)


def test_the_overlay_and_the_page(model, batches, tmp_path):
    from conftest import picture

    lens = logit_lens(model, batches["image"], "image[0]")
    figure = lens.plot_image(picture(140, 84, 1), tmp_path / "overlay.png")
    assert (tmp_path / "overlay.png").stat().st_size > 0
    assert sum(len(axes.images) for axes in figure.axes) >= 2 * 4
    lens.page(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "https://unpkg.com" not in page and page.count("CircuitsVis.render(") == 4
    assert page.count("<table>") == len(lens.positions)
    with pytest.raises(ValueError, match="one whole image"):
        logit_lens(model, batches["image"], "last").plot_image(picture(140, 84, 1))


def test_tokens_on_a_page_are_text():
    from analyses.views.circuits import as_json, as_text

    assert as_text("<b>") == "&lt;b&gt;" and "</script>" not in as_json({"t": "</script>"})


@pytest.fixture(params=[32768, 128], ids=["one slice", "several slice"])
def slices(request, monkeypatch):
    """The vocabulary of the tiny models in one piece, and in pieces of which top tokens and targets are apart."""
    monkeypatch.setattr("analyses.common.vocabulary.SLICE", request.param)
    monkeypatch.setattr("analyses.common.vocabulary.FLOAT32_TOKENS", request.param // 2)


@pytest.mark.usefixtures("slices")
def test_the_same_call_on_another_transformer_lens_model(tmp_path):
    """A GPT-2 made here, as a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=3, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    tokens = torch.randint(0, 120, (1, 9))
    lens = logit_lens(bridge, tokens, slice(4, 9), top_k=2)
    with torch.no_grad():
        probs = bridge(tokens)[0, 4:9].softmax(-1)
    assert torch.equal(lens.top_ids[-1], probs.topk(2).indices)
    assert torch.allclose(lens.top_probs[-1], probs.topk(2).values, atol=1e-6)
    assert torch.allclose(lens.entropy[-1], torch.special.entr(probs).sum(-1), atol=1e-5)
    assert lens.top_ids.shape == (4, 5, 2)


def test_layers_asked_for_are_those_of_the_whole_lens(model, batches):
    """Nothing else is read, and the numbers are the same."""
    inputs = batches["image"]
    whole = logit_lens(model, inputs, "image", top_k=3, targets=[5])
    some = logit_lens(model, inputs, "image", top_k=3, targets=[5], layers=[-2, 0])
    L = model.cfg.n_layers
    assert some.layers == (L - 1, 0) and some.layer_labels == (f"{L - 1}_pre", "0_pre")
    for name in ("top_ids", "top_probs", "entropy", "final_probs", "final_ranks", "target_probs", "target_ranks"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[[L - 1, 0]]), name
    assert set(some.to_dataframe()["layer"]) == {L - 1, 0}
    read = []
    hooks = [(f"blocks.{layer}.hook_resid_pre", lambda x, hook: read.append(hook.name)) for layer in range(L)]
    with model.hooks(fwd_hooks=[*hooks, ("ln_final.hook_normalized", lambda x, hook: read.append(tuple(x.shape)))]):
        logit_lens(model, inputs, 4, layers=[0])
    assert [shape for shape in read if isinstance(shape, tuple)][1:] == [(1, 1, model.cfg.d_model)] * 2
    with pytest.raises(ValueError, match="layers must be in"):
        logit_lens(model, inputs, "image", layers=[L + 1])


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows, top_k", [(1, 1), (5, 7), (9, 64), (7, 130)])
def test_the_readout_is_the_sorted_softmax(dtype, rows, top_k):
    """Against torch's softmax and stable sort of the same logits, in float64: several chunks, a last block in part
    filled, and ties. In bfloat16 the logits are those of float32 products of the rounded weights."""
    from tiny import tiny_hf

    from hooked_qwen2vl import HookedQwen2VL

    tied = HookedQwen2VL.from_hf(tiny_hf(dtype=dtype))
    with torch.no_grad():
        tied.unembed.weight[200:260] = tied.unembed.weight[20:80]  # sixty tokens with a twin
    vectors = torch.randn(rows, tied.cfg.d_model).to(dtype) * 5
    targets = torch.randint(80, 200, (rows, 3))  # none with a twin
    ours = predictions_of(tied, vectors, targets, top_k, chunk_size=4)
    with torch.no_grad():
        normalized = tied.ln_final(vectors[None])[0]
        logits = normalized.float() @ tied.W_U.float()
    logits[:, 200:260] = logits[:, 20:80]  # twins are equal to the last bit, whatever the product's order
    probs = logits.double().softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    best = probs.gather(-1, order)  # another word may stand there only if rounding tells the two apart
    assert ((probs.gather(-1, ours.ids) - best).abs() <= ORDER * best).all()
    assert all(len(set(row)) == top_k for row in ours.ids.tolist())
    assert torch.allclose(ours.probs.double(), probs.gather(-1, order), atol=1e-6)
    assert torch.allclose(ours.entropy.double(), torch.special.entr(probs).sum(-1), atol=1e-5)
    assert torch.allclose(ours.target_probs.double(), probs.gather(-1, targets), atol=1e-6)
    ahead = logits[:, None, :] - logits.gather(-1, targets)[..., None]
    least, most = (ahead > ORDER).sum(-1), (ahead > -ORDER).sum(-1) - 1  # -1: not the word itself
    assert ((least <= ours.target_ranks) & (ours.target_ranks <= most)).all() and (least == most).float().mean() > 0.8


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("top_k", [1, 2, 3, 70, 200])
def test_ties_go_to_the_lowest_id(model, top_k):
    """A vector that every token reads alike: more blocks tie than there is room for."""
    ours = predictions_of(model, torch.zeros(2, model.cfg.d_model), torch.tensor([[9], [250]]), top_k)
    assert torch.equal(ours.ids, torch.arange(top_k).expand(2, -1))
    assert not ours.target_ranks.any()


@pytest.mark.usefixtures("slices")
def test_far_apart_and_tied_across_blocks():
    """The best word comes last, hundreds of nats above, and brings its block before that of the first of two twins."""
    from tiny import tiny_hf

    from hooked_qwen2vl import HookedQwen2VL

    model = HookedQwen2VL.from_hf(tiny_hf())
    with torch.no_grad():
        model.ln_final.w.fill_(1.0)
        model.unembed.weight.zero_()
        model.unembed.weight[[10, 240, 250], 0] = torch.tensor([100.0, 100.0, 500.0])
    read = predictions_of(model, torch.eye(model.cfg.d_model)[:1], torch.tensor([[240, 250, 3]]), 3)
    assert read.ids.tolist() == [[250, 10, 240]] and read.target_ranks.tolist() == [[1, 0, 3]]
    assert read.probs[0, 0] == 1 and read.entropy == 0


@pytest.mark.parametrize("target", [-1, 10_000])
def test_targets_that_are_no_tokens(model, target):
    with pytest.raises(ValueError, match=f"targets must be token ids in 0..{model.cfg.d_vocab - 1}"):
        predictions_of(model, torch.zeros(1, model.cfg.d_model), torch.tensor([[5, target]]))


def test_more_words_than_there_are(model, batches):
    with pytest.raises(ValueError, match="number of tokens"):
        logit_lens(model, batches["image"], top_k=10_000)
