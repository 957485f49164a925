"""Runs over data sets: killed at any moment, shared, resumed, refused; always the same table."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import picture
from run_child import command, full_run, questions
from same_runs import ONE_THREAD
from tiny import tiny_hf

from analyses.data.examples import Example
from analyses.experiments.neurons import EffectExperiment
from analyses.runs.engine import describe_model, read_composition, read_failures, read_results, run, seeded, this_rank
from analyses.runs.plan import make_plan, memory_for, size_by_model, size_by_pixels
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.image_embeddings import ImageEmbeddingsCache

SMALL = {"batch_size": 3, "batches_per_shard": 2, "window": 16, "progress": False}


def lengths(batch):
    return [{"id": e.id, "length": len(e.question), "words": e.question.split()} for e in batch]


def test_the_table_is_what_work_gives_in_the_order_of_the_data(tmp_path):
    data = questions(40)
    state = run("lengths", data, lengths, tmp_path, **SMALL)
    assert state.complete and not state.todo
    table = read_results(tmp_path)
    assert table["id"].tolist() == [e.id for e in data] and table["item"].tolist() == list(range(40))
    assert table["length"].tolist() == [len(e.question) for e in data]
    assert [list(words) for words in table["words"]] == [e.question.split() for e in data]
    assert read_failures(tmp_path).empty


def test_batches_have_one_size_and_lose_nobody(model):
    data = questions(50)
    size = size_by_model(model)
    plan = make_plan(data, size, 4, 3, 20)
    assert sorted(plan["item"]) == list(range(50))
    assert plan.groupby("batch")["size"].nunique().max() == 1 and plan.groupby("batch").size().max() == 4
    assert plan.groupby("batch")["part"].nunique().max() == 1 and plan.groupby("part")["batch"].nunique().max() == 3
    assert (plan["item"] // 20).groupby(plan["part"]).nunique().max() == 1  # shards end with their window
    for item, example in enumerate(data):  # the sizes are those of the real inputs
        inputs = model.to_inputs(example.question, images=list(example.images))
        assert size(example).grids == tuple(visual.grid[1:] for visual in inputs.visuals)


def test_batches_may_be_of_one_domain(model):
    data = [replace(example, domain="ab"[item % 2]) for item, example in enumerate(questions(50))]
    for by_domain, most in ((True, 1), (False, 2)):
        plan = make_plan(data, size_by_model(model, by_domain=by_domain), 4, 3, 50)
        assert plan.groupby("batch")["domain"].nunique().max() == most and sorted(plan["item"]) == list(range(50))
        assert plan["size"].str.endswith((", a", ", b")).all() == by_domain


def test_a_rotated_photograph_has_the_size_it_is_seen_in(model, tmp_path):
    exif = picture(140, 84).getexif()
    exif[0x0112] = 6
    picture(140, 84).save(tmp_path / "photo.jpg", exif=exif)
    example = Example("a", "what?", "", (tmp_path / "photo.jpg",))
    (grid,) = size_by_model(model)(example).grids
    assert grid == model.to_inputs("what?", images=[tmp_path / "photo.jpg"]).visuals[0].grid[1:]
    assert grid[0] > grid[1]


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time: a server that has imported everything forks them."""
    context = get_context("forkserver")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ONE_THREAD | {"PYTHONPATH": os.pathsep.join(paths)}).items():
            patch.setenv(name, value)
        context.set_forkserver_preload(["run_child"])
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
        yield context


def test_killed_twenty_times_it_ends_as_if_never_stopped(processes, tmp_path):
    """kill -9 while it starts and plans, and in the midst of the work, some parts on; each time it is really at work."""
    n, moments, killed = 180, random.Random(1), tmp_path / "killed"
    full_run(str(tmp_path / "whole"), n)
    expected = read_results(tmp_path / "whole")
    counts = [0]
    for _ in range(20):
        process = processes.Process(target=full_run, args=(str(killed), n, 0.02))
        process.start()
        goal = counts[-1] + moments.randint(0, 3)
        while goal > counts[-1] and len(list(killed.glob("part-*"))) < goal and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        counts.append(len(list(killed.glob("part-*"))))
    assert counts == sorted(counts) and 20 < counts[-1]  # nothing written is lost
    full_run(str(killed), n)
    pd.testing.assert_frame_equal(read_results(killed), expected, check_exact=True)
    assert len(expected) == 2 * n and len(expected.drop_duplicates(["id", "place"])) == 2 * n
    assert read_composition(killed).equals(read_composition(tmp_path / "whole"))
    assert not list(killed.glob(".writing-*"))  # what kills left behind is swept away


COMMANDS = {
    "flips": ["--limit", "72", "--random", "2", "--batch-size", "1"],
    "hallucination": ["--limit", "72", "--batch-size", "1", "--n-boot", "10"],
    "neurons": ["--limit", "40", "--test-limit", "16", "--seeds", "1", "--batch-size", "1"],
}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_twelve_times_ends_as_if_never_stopped(name, processes, tmp_path):
    """The command itself, on the embedded model, killed and interrupted at random moments: each of its runs, and every table."""
    moments, killed = random.Random(name), tmp_path / "killed"

    def start(out):
        process = processes.Process(target=command, args=(name, *COMMANDS[name], "--out", str(out)))
        process.start()
        return process

    def parts(out):
        return len(list(out.rglob("part-*")))

    whole = start(tmp_path / "whole")
    counts = [0]
    whole.join()
    assert whole.exitcode == 0
    total = parts(tmp_path / "whole")
    for turn, goal in enumerate(sorted(moments.choices(range(total - 4), k=12))):  # so that none finishes, however fast the machine
        how = signal.SIGINT if turn % 2 and goal > counts[-1] else signal.SIGKILL  # Ctrl-C where the command itself is at work
        process = start(killed)
        while parts(killed) < goal and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.1))
        os.kill(process.pid, how)
        process.join()
        assert process.exitcode == (130 if how == signal.SIGINT else -signal.SIGKILL)
        counts.append(parts(killed))
    assert counts == sorted(counts) and total / 2 < counts[-1] < total
    last = start(killed)
    last.join()
    assert last.exitcode == 0
    runs = sorted(file.parent.relative_to(killed) for file in killed.rglob("run.json"))
    assert len(runs) == (3 if name == "neurons" else 1)
    for run_folder in runs:
        ours, theirs = (read_results(out / run_folder) for out in (killed, tmp_path / "whole"))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
        assert read_composition(killed / run_folder).equals(read_composition(tmp_path / "whole" / run_folder))
        assert len(ours) and not list((killed / run_folder).glob(".writing-*"))
    tables = sorted(file.relative_to(killed) for file in killed.rglob("*.csv"))
    assert tables and all((killed / table).read_bytes() == (tmp_path / "whole" / table).read_bytes() for table in tables)


def test_shares_give_the_same_table_as_one(tmp_path):
    full_run(str(tmp_path / "one"), 30)
    for k in (2, 0, 1):
        with pytest.raises(ValueError, match="not finished|holds no run"):
            read_results(tmp_path / "three")
        full_run(str(tmp_path / "three"), 30, rank=(k, 3))
    one, three = read_results(tmp_path / "one"), read_results(tmp_path / "three")
    pd.testing.assert_frame_equal(one, three, check_exact=True)
    assert one["noise"].nunique() > 30  # random numbers differ between questions


def test_what_is_done_is_not_done_again(tmp_path):
    calls = []

    def counted(batch):
        calls.extend(e.id for e in batch)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return lengths(batch)

    data = questions(40)
    with pytest.raises(KeyboardInterrupt):
        run("lengths", data, counted, tmp_path, **SMALL)
    some = read_results(tmp_path, partial=True)
    assert 0 < len(some) < 40
    again = []
    run("lengths", data, lambda batch: again.extend(e.id for e in batch) or lengths(batch), tmp_path, **SMALL)
    assert not set(again) & set(some["id"]) and len(again) + len(some) == 40


def test_one_bad_image_is_kept_with_its_reason(tmp_path):
    picture(56, 56).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:400])
    (tmp_path / "text.png").write_text("no image")
    names = ["good.png", "cut.png", "good.png", "text.png", "missing.png", "good.png"]
    data = [Example(f"q{i}", "what is this?", "", (tmp_path / name,)) for i, name in enumerate(names)]
    state = run("lengths", data, lengths, tmp_path / "out", **SMALL)
    assert state.complete
    assert read_results(tmp_path / "out")["id"].tolist() == ["q0", "q2", "q5"]
    failures = read_failures(tmp_path / "out").set_index("id")["error"]
    assert list(failures.index) == ["q1", "q3", "q4"]
    assert "cut.png" in failures["q1"] or "cut short" in failures["q1"]
    assert "text.png" in failures["q3"] and "missing.png" in failures["q4"]
    assert read_composition(tmp_path / "out")["items"].tolist() == [[0, 2], [5]]


def test_one_bad_question_leaves_its_batch_alone(tmp_path):
    def picky(batch):
        if any(e.id == "q4" for e in batch):
            raise ValueError("q4 is too long")
        return [{"id": e.id, "mates": len(batch)} for e in batch]

    data = [Example(f"q{i}", "go on", "") for i in range(9)]
    run("picky", data, picky, tmp_path, **SMALL)
    assert read_results(tmp_path)["id"].tolist() == [f"q{i}" for i in range(9) if i != 4]
    assert read_results(tmp_path)["mates"].tolist() == [3, 3, 3, 1, 1, 3, 3, 3]
    assert read_failures(tmp_path)[["id", "error"]].values.tolist() == [["q4", "q4 is too long"]]
    assert read_composition(tmp_path)["items"].tolist() == [[0, 1, 2], [3], [4], [5], [6, 7, 8]]


def test_an_error_of_the_work_itself_stops_the_run(tmp_path):
    def broken(batch):
        raise ValueError("no such layer")

    def exhausted(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(ValueError, match="every question of the first shard.*no such layer"):
        run("broken", questions(12), broken, tmp_path / "a", **SMALL)
    assert not list((tmp_path / "a").glob("part-*"))
    with pytest.raises(RuntimeError, match="out of memory"):  # never recorded as a bad question
        run("broken", questions(12), exhausted, tmp_path / "b", **SMALL)
    for rows in ([{"id": "another"}], [{"length": 3}], [{"id": "q0", "item": 3}], ["q0"]):
        with pytest.raises(TypeError, match="work must give rows"):
            run("broken", questions(2), lambda batch, rows=rows: rows, tmp_path / "c", **SMALL)
    with pytest.raises(TypeError, match="'weird' cannot be written"):
        run("broken", questions(1), lambda batch: [{"id": "q0", "weird": object()}], tmp_path / "d", **SMALL)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"settings": {"window": 5, "layer": 2}}, r"settings.layer: 1 there, 2 now"),
        ({"settings": {"layer": 1, "more": [1]}}, r"settings.more: null there, \[1\] now"),
        ({"batch_size": 4}, r"settings.batch_size: 3 there, 4 now"),
        ({"seed": 1}, r"seed: 0 there, 1 now"),
        ({"name": "other"}, r'name: "lengths" there, "other" now'),
        ({"n": 39}, r"data.questions: 40 there, 39 now"),
    ],
)
def test_another_setting_in_the_same_folder_is_refused(change, named, tmp_path):
    def go(n=40, name="lengths", settings=None, **more):
        return run(name, questions(n), lengths, tmp_path, settings or {"layer": 1}, **SMALL | more)

    go()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=named):
        go(**change)
    with pytest.raises(ValueError, match=named):
        go(**change, dry_run=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    go()


def test_other_weights_data_or_versions_are_refused(tmp_path, processor, monkeypatch):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    data = questions(8)
    run("lengths", data, lengths, tmp_path, model=model, **SMALL)
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match="model.weights: "):
        run("lengths", data, lengths, tmp_path, model=model, **SMALL)
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight.copy_(HookedQwen2VL.from_hf(tiny_hf(), processor).blocks[1].mlp.up_proj.weight)
    run("lengths", data, lengths, tmp_path, model=model, **SMALL)
    picture_of_3 = data[3].images[0].copy()
    picture_of_3.putpixel((0, 0), (1, 2, 3))
    edited = [*data[:3], replace(data[3], images=(picture_of_3,)), *data[4:]]
    with pytest.raises(ValueError, match="data.digest: "):
        run("lengths", edited, lengths, tmp_path, model=model, **SMALL)
    monkeypatch.setattr("analyses.runs.engine._version", lambda package: "0.0")
    with pytest.raises(ValueError, match='versions.torch: .*"0.0" now'):
        run("lengths", data, lengths, tmp_path, model=model, **SMALL)


def test_data_that_cannot_be_trusted_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only once"):
        run("lengths", iter(questions(3)), lengths, tmp_path / "a", **SMALL)
    with pytest.raises(ValueError, match="'q1' comes twice"):
        run("lengths", [*questions(3), *questions(2)[1:]], lengths, tmp_path / "b", **SMALL)
    with pytest.raises(ValueError, match="no question"):
        run("lengths", [], lengths, tmp_path / "c", **SMALL)
    turns = iter([questions(5), questions(5)[::-1]])
    with pytest.raises(ValueError, match="not what was planned"):
        run("lengths", lambda: iter(next(turns)), lengths, tmp_path / "d", **SMALL)
    turns = iter([questions(40), questions(16)])
    with pytest.raises(ValueError, match="ended before the plan"):
        run("lengths", lambda: iter(next(turns)), lengths, tmp_path / "e", **SMALL)
    with pytest.raises(ValueError, match="a setting is"):
        run("lengths", questions(3), lengths, tmp_path / "f", {"f": object()}, **SMALL)


def test_a_dry_run_says_and_does_nothing(tmp_path, model):
    def never(batch):
        raise AssertionError

    state = run("lengths", questions(30), never, tmp_path / "out", model=model, dry_run=True, rank=(1, 2), **SMALL)
    assert not (tmp_path / "out").exists()
    text = state.describe()
    assert "30 questions" in text and "rank 1/2" in text and "6×10 patches" in text and "memory" in text
    run("lengths", questions(30), lengths, tmp_path / "out", model=model, **SMALL, rank=(0, 2))
    state = run("lengths", questions(30), never, tmp_path / "out", model=model, dry_run=True, **SMALL)
    done = len(read_results(tmp_path / "out", partial=True))
    assert f"written already: {done} questions" in state.describe()
    assert f"to do here: {30 - done} questions" in state.describe()


def test_a_prefix_is_computed_once_an_image(model, monkeypatch):
    images = [[picture(84, 56, 1)], [picture(56, 56, 2)], [picture(84, 56, 1)]]
    inputs = model.to_inputs(["what?", "go on", "red?"], images=images)
    embeddings = ImageEmbeddingsCache(model)
    first, again = embeddings(inputs), embeddings(inputs[[1, 0]])
    assert embeddings.computed == 2
    expected = model.encode(inputs)
    assert torch.allclose(first.image_embeds, expected.image_embeds, atol=1e-5) and first.encoded_by == expected.encoded_by
    assert not torch.allclose(first.image_embeds, expected.image_embeds.flip(0), atol=1e-2)
    alone = ImageEmbeddingsCache(model)(inputs[1])  # what was met before changes no bit
    assert torch.equal(again[0].image_embeds, alone.image_embeds)
    with torch.no_grad():
        assert torch.allclose(model(first), model(inputs), atol=1e-4)
    calls = []
    run_tower = type(model).run_tower
    monkeypatch.setattr(type(model), "run_tower", lambda self, i: calls.append(1) or run_tower(self, i))
    with torch.no_grad():
        model(embeddings(inputs))
    assert not calls  # the model takes it as its own


def test_the_store_of_prefixes_forgets_and_notices_edits(processor):
    model = HookedQwen2VL.from_hf(tiny_hf(), processor)
    one, two = (model.to_inputs("what?", images=[picture(84, 56, seed)]) for seed in (1, 2))
    embeddings = ImageEmbeddingsCache(model, capacity=1)
    for inputs in (one, one, two, one):
        embeddings(inputs)
    assert embeddings.computed == 3
    with torch.no_grad():
        model.vision_encoder.blocks[0].attn.W_O.mul_(2.0)
        assert torch.equal(embeddings(one).image_embeds, model.encode(one).image_embeds)


def test_what_is_watched_is_kept_with_its_image_and_counts_as_memory(model):
    @contextmanager
    def watch(inputs):
        yield [inputs.pixels.sum()[None].expand(1000).clone()]

    one, two = (model.to_inputs("what?", images=[picture(84, 56, seed)]) for seed in (1, 2))
    both = model.to_inputs(["what?", "what?"], images=[[picture(84, 56, 2)], [picture(84, 56, 1)]])
    prefix = model.encode(one).image_embeds.nbytes
    roomy, narrow = (ImageEmbeddingsCache(model, capacity, watch) for capacity in (2 * prefix + 8000, 2 * prefix + 7999))
    for store, computed in ((roomy, 2), (narrow, 4)):
        for inputs in (one, two, both):
            encoded, seen = store.watched(inputs)
        assert [float(values[0][0]) for values in seen] == [float(two.pixels.sum()), float(one.pixels.sum())]
        assert torch.equal(encoded.image_embeds[: len(encoded.image_embeds) // 2], store(two).image_embeds)
        assert store.computed == computed


def test_random_numbers_depend_on_seed_and_items_only():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0, 3, 4):
        drawn = torch.rand(2), np.random.rand(), random.random()
    assert torch.equal(torch.rand(3), expected)  # what was there before goes on
    with seeded(0, 3, 4):
        assert torch.equal(torch.rand(2), drawn[0]) and np.random.rand() == drawn[1] and random.random() == drawn[2]
    for seed, items in ((1, (3, 4)), (0, (3,)), (0, (4, 3))):
        with seeded(seed, *items):
            assert not torch.equal(torch.rand(2), drawn[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_the_estimate_of_memory_is_near_what_is_allocated(model, gradients):
    """Peak of what torch allocates in a forward, or in one whose activations are kept, without the weights."""
    images = [[picture(224, 140, seed)] for seed in range(6)]
    data = [Example(f"{i}", "what is this?", "red", tuple(images[i]), "a") for i in range(6)]
    inputs = model.encode(model.to_inputs(["what is this?"] * 6, images=images))
    memory = memory_for(model, [(size_by_model(model)(data[0]), 6)], gradients=gradients)
    with torch.set_grad_enabled(gradients), torch.profiler.profile(profile_memory=True) as profile:
        list(EffectExperiment(model)(data)) if gradients else model(inputs)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 1e6 and memory.embeddings == 0
    assert 0.5 < (memory.total - memory.weights) / peak < 2.5
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())


def test_shares_are_spelt_k_of_n(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert this_rank() == (0, 1) and this_rank("1/4") == (1, 4)
    for wrong in ("4/4", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(ValueError, match="rank k/n"):
            this_rank(wrong)


def test_the_manifest_says_what_was_run(tmp_path, model):
    run("lengths", questions(6), lengths, tmp_path, {"layer": 1}, model=model, seed=3, **SMALL)
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["name"] == "lengths" and manifest["seed"] == 3 and manifest["settings"]["layer"] == 1
    assert manifest["model"] == describe_model(model) and manifest["versions"]["torch"]
    plan = pd.read_parquet(tmp_path / "plan.parquet")
    assert plan["id"].tolist() and set(plan.columns) >= {"item", "id", "batch", "part", "size"}
    assert size_by_pixels(questions(2)[1]).grids == ((56, 56),)
