"""The explorer: its numbers against plain loops, its page against what it was given."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
import struct

import half_characters
import numpy as np
import pytest
import torch
from conftest import picture
from explorer_pages import NASTY, large

from analyses.explorer import _many_tokens, explore, recovery_by_position
from analyses.patching import patch_sweep
from hooked_qwen2vl.cli import main

_KINDS = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "float32": "<f4"}


@pytest.fixture(scope="module")
def inputs(model):
    return model.to_inputs("what is this?", images=[picture(140, 84, 1)], answers="red blue<|im_end|>", special_tokens=True)


@pytest.fixture(scope="module")
def result(model, inputs):
    return explore(model, inputs, [picture(140, 84, 1)], top_k=4, keep=20, question="what is this?")


def read_page(path) -> tuple[dict, dict[str, np.ndarray]]:
    """(header, arrays) of a page, by the layout that its module states."""
    page = path.read_text(encoding="utf-8")
    packed = gzip.decompress(base64.b64decode(re.search(r'id="data">([^<]*)<', page)[1]))
    (length,) = struct.unpack_from("<I", packed)
    header, body = json.loads(packed[4 : 4 + length].decode("utf-8", "surrogatepass")), packed[4 + length :]
    arrays = {
        name: np.frombuffer(body, _KINDS[about["kind"]], offset=about["offset"], count=int(np.prod(about["shape"]))).reshape(about["shape"])
        for name, about in header["arrays"].items()
        if about["kind"] != "bytes"
    }
    return header, arrays


def probabilities(header, values):
    return np.where(values == 0, 0, 10 ** (header["floor"] * (1 - values / 65535)))


# ---- what is computed ---------------------------------------------------------------------------


def test_every_number_against_the_models_own_activations(model, inputs, result):
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    n, last = inputs.shape[1], int(inputs.positions("last"))
    assert result.last == last and len(result.segments) == n
    streams = [*(cache["resid_pre", l][0] for l in range(model.cfg.n_layers)), cache["resid_post", -1][0]]
    answer = inputs.positions("answer")[:-1]  # without the end token
    assert list(result.answer) == answer.tolist()
    for layer, stream in enumerate(streams):
        mean = stream[answer].double().mean(0)
        for place in range(n):
            cosine = (stream[place].double() @ mean) / (stream[place].double().norm() * mean.norm())
            assert abs(result.contextual[layer, place] - cosine) < 1e-5
        x = stream[last].double()
        normed = x / (x.pow(2).mean() + model.cfg.eps).sqrt() * model.ln_final.w.double()
        probs = (normed @ model.W_U.double()).softmax(-1).detach()
        assert torch.allclose(result.kept_probs[layer].double(), probs[result.kept_ids], atol=1e-5)
        others = probs.clone()
        others[result.kept_ids] = 0
        assert abs(result.rest_prob[layer] - others.max()) < 1e-5 and others.max() > 0
    assert torch.allclose(result.kept_probs[-1], logits[0, last].softmax(-1)[result.kept_ids], atol=1e-5)
    assert sorted(result.queries) == list(range(n)) and result.queries[:3] == (last, *range(n - 3, n - 1))  # the answer's come next
    for layer in range(model.cfg.n_layers):
        assert torch.allclose(result.attention[layer], cache["pattern", layer][0, :, last], atol=1e-6)
        expected = cache["pattern", layer][0][:, list(result.queries)].transpose(0, 1)
        assert torch.allclose(result.attention_from[layer], expected, atol=1e-6)
    assert torch.allclose(result.attention.sum(-1), torch.ones(model.cfg.n_layers, model.cfg.n_heads), atol=1e-5)


def test_the_kept_tokens_are_the_largest_anywhere(model, inputs, result):
    everything = explore(model, inputs, [picture(140, 84, 1)], keep=10**6)
    assert len(everything.kept_ids) == model.cfg.d_vocab and not everything.rest_prob.any()
    best = everything.kept_probs.amax(0)
    assert best[result.kept_ids].min() >= best[[i for i in range(len(best)) if i not in result.kept_ids]].max()


def test_the_lens_covers_the_prompt_and_follows_the_answer(model, inputs, result):
    assert result.lens.positions == tuple(range(inputs.shape[1]))
    assert result.lens.target_ids.tolist() == inputs.tokens[0, list(result.answer)].tolist()  # two different tokens
    assert result.answer_text == "red blue"
    assert result.grids == (inputs.grid(),) and result.starts == (int(inputs.positions("image[0]")[0]),)


def test_a_padded_row_is_the_row_alone(model):
    images = [picture(140, 84, 1)], [picture(60, 115, 2), picture(56, 56, 3)]
    questions, answers = ["what?", "which of the two is red, if any?"], ["red", "blue"]
    batch = model.to_inputs(questions, images=images, answers=answers)
    alone = explore(model, model.to_inputs(questions[0], images=images[0], answers="red"), images[0])
    padded = explore(model, batch, images[0], row=0)
    assert padded.segments == alone.segments and padded.last == alone.last and padded.lens.positions != alone.lens.positions
    for field in ("attention", "contextual", "kept_probs", "rest_prob"):
        assert torch.allclose(getattr(padded, field), getattr(alone, field), atol=1e-5), field
    assert torch.allclose(padded.lens.top_probs, alone.lens.top_probs, atol=1e-5)
    assert len(explore(model, batch, images[1], row=1).grids) == 2


def test_the_answer_is_decoded_as_a_whole():
    """A character of three tokens is one in the header, not three marks."""
    hard = half_characters.model()
    prompt = hard.to_inputs("what?", images=[picture(84, 56)], answers="一只𪚥 café")
    assert explore(hard, prompt, [picture(84, 56)], top_k=2, keep=5).answer_text == "一只𪚥 café"


def test_half_precision_is_read_in_float32():
    hard = half_characters.model(dtype=torch.bfloat16)
    streams = torch.randn(4, hard.cfg.d_model).bfloat16() * 5
    _, probs, _ = _many_tokens(hard, streams, 10**6)
    with torch.no_grad():
        expected = (hard.ln_final(streams[None])[0].double() @ hard.W_U.double()).softmax(-1)
    assert torch.allclose(probs.double(), expected, rtol=1e-5)


def test_as_much_attention_is_kept_as_there_is_room_for(model, inputs, result):
    each = model.cfg.n_layers * (model.cfg.n_heads + 1) * inputs.shape[1]
    few = explore(model, inputs, [picture(140, 84, 1)], attention_size=3 * each)
    assert few.queries == result.queries[:3] and torch.equal(few.attention_from, result.attention_from[:, :3])
    one = explore(model, inputs, [picture(140, 84, 1)], attention_size=1)
    assert one.queries == (result.last,) and torch.equal(one.attention, result.attention)


def test_without_an_answer_there_is_no_contextual_map(model, batches):
    result = explore(model, batches["image"], [picture(140, 84, 1)])
    assert result.contextual is None and result.answer == () and result.lens.target_ids is None


def test_what_cannot_be_explored(model, batches, inputs):
    with pytest.raises(ValueError, match="no image to explore"):
        explore(model, batches["text"], [])
    with pytest.raises(ValueError, match="has 1 images, got 2"):
        explore(model, inputs, [picture(140, 84), picture(140, 84)])
    with pytest.raises(ValueError, match="of shape"):
        explore(model, inputs, [picture(140, 84, 1)], recovered=torch.zeros(2, 2))


def test_recovery_lies_where_it_was_patched(model):
    clean, other = (model.to_inputs("what?", images=[picture(84, 56, seed)]) for seed in (1, 2))

    def metric(logits):
        return logits[:, -1, 5] - logits[:, -1, 7]

    places = [int(p) for p in clean.positions("image")[1:4]] + [clean.shape[1] - 1]
    sweep = patch_sweep(model, clean, other, metric, layers=[0, 2], positions=places, progress=False)
    with torch.no_grad():
        clean_metric = metric(model(clean))
    found = recovery_by_position(sweep, clean_metric, (3, clean.shape[1]))
    expected = (sweep.values[..., 0] - sweep.baseline) / (clean_metric - sweep.baseline)
    assert torch.allclose(found[[0, 2]][:, places], expected, atol=1e-6)
    rest = torch.ones_like(found, dtype=torch.bool)
    rest[torch.tensor([[0], [2]]), torch.tensor(places)] = False
    assert found[rest].isnan().all() and not found[~rest].isnan().any()
    spans = patch_sweep(model, clean, other, metric, layers=[0], positions=["image"], progress=False)
    with pytest.raises(ValueError, match="single positions"):
        recovery_by_position(spans, clean_metric, (3, clean.shape[1]))


def test_table_and_pictures(result, tmp_path):
    table = result.to_dataframe()
    assert len(table) == result.lens.entropy.numel() and table["attention"].isna().sum() == len(result.segments)
    assert table["recovery"].isna().all() and not table["contextual"].isna().any()
    figure = result.plot(tmp_path / "maps.pdf")
    columns = min(5, len(result.lens.layer_labels))  # evenly spaced layers, every one where they are few
    assert len(figure.axes) == 3 * columns + 3 and (tmp_path / "maps.pdf").stat().st_size > 0  # and a colour bar a row
    heads = result.plot_heads(tmp_path / "heads.png")
    assert len(heads.axes) == len(result.attention) * (1 + result.attention.shape[1])


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_holds_what_it_was_given(result, tmp_path):
    recovered = dataclasses.replace(result, recovery=torch.randn(len(result.attention), len(result.segments)))
    recovered.page(tmp_path / "page.html")
    header, arrays = read_page(tmp_path / "page.html")
    ids = np.cumsum(header["ids"])
    assert np.array_equal(ids[arrays["top"]], result.lens.top_ids.numpy())
    assert np.array_equal(ids[arrays["kept"]], result.kept_ids.numpy())
    texts = dict(zip(ids.tolist(), header["texts"]))
    for layer, row in zip(result.lens.top_ids.tolist(), result.lens.top_tokens):
        assert [[texts[i] for i in at] for at in layer] == [list(at) for at in row]
    for name, values in (
        ("topProbs", result.lens.top_probs), ("keptProbs", result.kept_probs), ("restProb", result.rest_prob),
        ("followedProbs", result.lens.target_probs),
    ):  # fmt: skip
        assert np.allclose(probabilities(header, arrays[name]), values.numpy(), rtol=3e-4, atol=1e-12), name
    for name, values in (("contextual", result.contextual), ("entropy", result.lens.entropy)):
        low, high = (header["arrays"][name][key] for key in ("low", "high"))
        assert np.allclose(low + (high - low) * arrays[name] / 65535, values.numpy(), atol=(high - low) / 1e5), name
    largest = np.array(header["arrays"]["attention"]["largest"])[..., None]
    kept = largest * (arrays["attention"] / 255.0) ** 2
    assert header["queries"] == list(result.queries) and header["queries"][0] == result.last  # a small page holds all
    assert (np.abs(kept[:, :, 1:] - result.attention_from.numpy()) <= 0.004 * largest[:, :, 1:]).all()
    assert (np.abs(kept[:, :, 0] - result.attention_from.mean(2).numpy()) <= 0.004 * largest[:, :, 0]).all()
    assert np.array_equal(arrays["recovery"], recovered.recovery.numpy())


def test_nothing_of_the_models_is_markup(tmp_path):
    """Tokens that would end the script, or be tags, reach the page only inside its packed data."""
    result = large(rows=3, cols=4, layers=4, heads=2)
    hostile = dataclasses.replace(result, question="</script><b>{{data}}")
    hostile.page(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and "<b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;{{data}}" in page  # the title: escaped, and not filled in
    header, _ = read_page(tmp_path / "page.html")
    assert set(NASTY) <= set(header["texts"]) and header["question"] == hostile.question


def test_the_page_loads_nothing(result, tmp_path):
    result.page(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    outside = set(re.findall(r"https?://[^\"' )]+", page)) - {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not outside


def test_a_large_image_stays_small(tmp_path):
    """1,200 image tokens × 29 layers × top 5, the lens reading a hundred thousand different tokens."""
    large().page(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_the_command(tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["explore", "--top-k", "3", "--out", str(out)]) == 0
    assert str(out / "explorer.html") in capsys.readouterr().out
    header, arrays = read_page(out / "explorer.html")
    assert header["k"] == 3 and {"recovery", "contextual", "attention"} <= set(arrays)
    image = slice(header["images"][0]["start"], header["images"][0]["start"] + 36)
    assert np.isnan(arrays["recovery"][:, : image.start]).all() and not np.isnan(arrays["recovery"][:, image]).any()
    assert abs(arrays["recovery"][-1, header["last"]]) > 0.1  # the last position holds what is left of the answer
    assert main(["explore", "--question", "what?", "--out", str(out)]) == 2
