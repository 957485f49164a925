"""The activation store: what comes back is what run_with_cache gives, row for row, in every order."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import picture
from run_child import questions
from safetensors import safe_open

from analyses.data.examples import Example
from analyses.runs.activation_store import ActivationStore, store_activations
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache

NAMES = ["hook_embed", "blocks.1.hook_resid_post", "blocks.2.attn.hook_z", "blocks.0.mlp.hook_post"]
SMALL = {"batch_size": 3, "batches_per_shard": 2, "window": 32, "progress": False}


@pytest.fixture(scope="module")
def data():
    answered = [
        Example(e.id, e.question, "red" if number % 2 else "", e.images, domain="d", category=f"c{number % 3}")
        for number, e in enumerate(questions(24))
    ]
    return answered


@pytest.fixture(scope="module")
def store(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    assert store_activations(model, data, NAMES, folder, **SMALL).complete
    return ActivationStore(folder)


def batches_as_run(store):
    """The composition that the files record: lists of items."""
    for file in sorted(store.folder.glob("part-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            yield from json.loads(opened.metadata()["composition"])


def test_what_comes_back_is_what_run_with_cache_gives(store, model, data):
    """Row for row, to the bit, in the batches that the store says it ran; labels and masks from Inputs itself."""
    embeddings, seen = ImageEmbeddingsCache(model), 0
    for items in batches_as_run(store):
        batch = [data[item] for item in items]
        inputs = embeddings(model.to_inputs([e.question for e in batch], images=[list(e.images) for e in batch]))
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=NAMES)
        for row, (item, example) in enumerate(zip(items, batch)):
            back, real = store.question(example.id), inputs.attention_mask[row].bool()
            for name in NAMES:
                assert torch.equal(back[name], cache[name][row][real])
            assert torch.equal(back["token"].long(), inputs.tokens[row][real])
            assert torch.equal(back["is_image"], inputs.token_types[row][real] > 0)
            assert torch.equal(back["mrope"].T.long(), inputs.position_ids[:, row][:, real])
            assert back["position"].tolist() == list(range(int(real.sum()))) and set(back["item"].tolist()) == {item}
            assert int(back["is_image"].sum()) == sum(visual.n_tokens for visual in inputs[row].visuals)
            seen += len(back["item"])
    assert seen == len(store)


def test_a_question_alone_gives_the_same_activations(store, model, data):
    """Padding and batch leave no trace: positions and masks fit a run of the question by itself."""
    for example in data[:8]:
        inputs = model.to_inputs(example.question, images=list(example.images))
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=NAMES)
        back = store.question(example.id)
        for name in NAMES:
            assert torch.allclose(back[name], cache[name][0], atol=2e-5 * float(cache[name].std()) + 1e-5)
        assert torch.equal(back["token"].long(), inputs.tokens[0])


def rows_of(batches):
    joined = list(batches)
    return {name: torch.cat([batch[name] for batch in joined]) for name in joined[0]}


def keyed(rows, name):
    """(item, position) -> activation, each once."""
    keys = list(zip(rows["item"].tolist(), rows["position"].tolist()))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, rows[name]))


@pytest.mark.parametrize("pool", [1, 100, 10_000])
def test_shuffled_every_row_comes_once_with_its_own_labels(store, pool):
    name = "blocks.1.hook_resid_post"
    straight = rows_of(store.batches(64, name, seed=None))
    shuffled = rows_of(store.batches(64, name, seed=1, pool=pool))
    assert len(straight["item"]) == len(store) and name in shuffled and "hook_embed" not in shuffled
    expected, got = keyed(straight, name), keyed(shuffled, name)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    assert straight["item"].tolist() != shuffled["item"].tolist()


def test_the_order_follows_from_the_seed(store):
    def order(seed):
        return rows_of(store.batches(32, "hook_embed", seed=seed, pool=200))["item"].tolist()

    assert order(3) == order(3) and order(3) != order(4)


def test_a_large_pool_mixes_and_memory_holds_the_pool_and_a_part(store, monkeypatch):
    mixed = next(store.batches(64, "hook_embed", pool=10_000))
    assert mixed["item"].unique().numel() > 12
    largest = max(len(store._read(part, [])["item"]) for part in store._shards)
    lengths = []
    permutation = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda order: lengths.append(len(order)) or permutation(order))
    sizes = [len(batch["item"]) for batch in store.batches(16, "hook_embed", pool=100)]
    assert max(lengths) <= 100 + largest < len(store)
    assert set(sizes[:-1]) == {16} and sum(sizes) == len(store)
    assert all(len(batch["item"]) == 16 for batch in store.batches(16, "hook_embed", pool=100, drop_last=True))


def test_image_rows_and_text_rows(store):
    image, text = (rows_of(store.batches(50, "hook_embed", which=which)) for which in ("image", "text"))
    assert image["is_image"].all() and not text["is_image"].any()
    assert len(image["item"]) + len(text["item"]) == len(store) and len(image["item"])


def test_part_of_the_prompt_answers_and_dtype(model, data, tmp_path):
    store_activations(model, data, "hook_embed", tmp_path, "answer", "bfloat16", answers=True, **SMALL)
    store = ActivationStore(tmp_path)
    n_tokens = len(model.tokenizer("red").input_ids)
    answered = [number for number, example in enumerate(data) if example.answer]
    rows = rows_of(store.batches(100, seed=None))
    assert len(store) == n_tokens * len(answered) and sorted(rows["item"].unique().tolist()) == answered
    assert rows["hook_embed"].dtype == torch.bfloat16
    expected = model.embed.weight[rows["token"].long()].detach().bfloat16()
    assert torch.equal(rows["hook_embed"], expected)
    assert set(store.items["category"]) == {"c0", "c1", "c2"} and store.items["id"].tolist() == [e.id for e in data]


def test_interrupted_it_goes_on_and_shares_add_up(model, data, store, tmp_path):
    class Stop(Exception):
        pass

    def stopping():
        yield from data[:15]
        raise Stop

    turns = [lambda: iter(data), stopping]
    with pytest.raises(Stop):
        store_activations(model, lambda: turns.pop(0)(), NAMES, tmp_path / "a", **{**SMALL, "window": 8})
    assert list((tmp_path / "a").glob("part-*"))
    with pytest.raises(ValueError, match="not finished"):
        ActivationStore(tmp_path / "a")
    assert 0 < len(ActivationStore(tmp_path / "a", partial=True)) < len(store)
    with pytest.raises(ValueError, match=r"settings.keep: \"all\" there, \"image\" now"):
        store_activations(model, data, NAMES, tmp_path / "a", "image", **{**SMALL, "window": 8})
    store_activations(model, data, NAMES, tmp_path / "a", **{**SMALL, "window": 8})
    assert len(ActivationStore(tmp_path / "a")) == len(store)
    for k in (1, 0):
        store_activations(model, data, NAMES, tmp_path / "b", rank=(k, 2), **SMALL)
    both = ActivationStore(tmp_path / "b")
    for example in data:
        ours, theirs = store.question(example.id), both.question(example.id)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_part_that_was_cut_short_says_how_all_of_it_ran(model, data, tmp_path):
    """After Ctrl-C in a part, its file names the batches of before and of after: every question once."""

    def stopping():
        yield from data[:15]
        raise KeyboardInterrupt

    turns = [lambda: iter(data), stopping]
    settings = {**SMALL, "window": 8, "batches_per_shard": 100}
    with pytest.raises(KeyboardInterrupt):
        store_activations(model, lambda: turns.pop(0)(), NAMES, tmp_path, **settings)
    assert 0 < len(ActivationStore(tmp_path, partial=True))
    store_activations(model, data, NAMES, tmp_path, **settings)
    for file in tmp_path.glob("part-*"):
        with safe_open(file, "pt") as opened:
            ran = [item for batch in json.loads(opened.metadata()["composition"]) for item in batch]
            assert sorted(ran) == opened.get_tensor("item").unique().tolist()


def test_a_changed_part_is_noticed(model, data, tmp_path):
    store_activations(model, data[:6], "hook_embed", tmp_path, **{**SMALL, "batches_per_shard": 100})
    (file,) = tmp_path.glob("part-*")
    whole = file.read_bytes()
    for at in (len(whole) - 3, whole.index(b'"composition"') + 20):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=file.name):
            list(ActivationStore(tmp_path).batches(64))
    file.write_bytes(whole)
    assert len(list(ActivationStore(tmp_path).batches(64)))


def test_bad_images_are_recorded_and_named(model, tmp_path):
    picture(56, 56).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no")
    data = [Example(n, "what?", "", (tmp_path / f"{n}.png",)) for n in ("bad", "good")]
    store_activations(model, data, "hook_embed", tmp_path / "out", batches_per_shard=1, progress=False)
    store = ActivationStore(tmp_path / "out")
    assert store.failures["id"].tolist() == ["bad"] and len(store.question("good")["item"]) == len(store)
    assert sum(len(batch["item"]) for batch in store.batches(7)) == len(store)
    with pytest.raises(ValueError, match="'bad' gave no activation: .*bad.png"):
        store.question("bad")
    with pytest.raises(ValueError, match="no question 'ugly'"):
        store.question("ugly")


def test_what_cannot_be_stored_is_refused(model, data, store, tmp_path):
    for name in ("blocks.0.attn.hook_pattern", "vision_projector.hook_out", "vision_encoder.blocks.0.hook_resid_pre"):
        with pytest.raises(ValueError, match="one row per position"):
            store_activations(model, data, name, tmp_path)
    with pytest.raises(ValueError, match="no hook point is called 'blocks.9.hook'"):
        store_activations(model, data, "blocks.9.hook", tmp_path)
    with pytest.raises(ValueError, match="at least one hook name"):
        store_activations(model, data, [], tmp_path)
    with pytest.raises(ValueError, match="keep must be"):
        store_activations(model, data, "hook_embed", tmp_path, "imgae")
    with pytest.raises(ValueError, match="unknown dtype"):
        store_activations(model, data, "hook_embed", tmp_path, dtype="int8")
    for wrong in ({"names": "blocks.0.hook_resid_post"}, {"which": "imgae"}, {"batch_size": 0}, {"pool": 0}):
        with pytest.raises(ValueError, match="expected names among"):
            store.batches(**{"batch_size": 8, **wrong})
    with pytest.raises(ValueError, match="holds no run"):
        ActivationStore(tmp_path)
    state = store_activations(model, data, "hook_embed", tmp_path / "dry", dry_run=True)
    assert "24 questions" in state.describe() and not (tmp_path / "dry").exists()
