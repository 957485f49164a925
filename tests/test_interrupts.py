"""Ctrl-C keeps what is done; parts that are damaged, copied or of another run are named; the disk may be full."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from run_child import questions

from analyses.common.sums import add_up
from analyses.data.benchmarks import load_scenes
from analyses.experiments.hallucination import HallucinationExperiment
from analyses.experiments.neurons import FiringExperiment
from analyses.runs import activation_store, engine
from analyses.runs.activation_store import ActivationStore, store_activations
from analyses.runs.engine import read_composition, read_failures, read_results, run
from analyses.runs.files import unfinished_path
from analyses.runs.sums import read_sums, write_sums
from hooked_qwen2vl import HookedQwen2VL

SMALL = {"batch_size": 3, "batches_per_shard": 4, "window": 64, "progress": False}
N = 40
ONE_BY_ONE = {"q5", "q11", "q17"}  # the batch of the question that fails


def mixed(batch):
    """Rows of every type a column may have; two a question, some without; one question fails."""
    for example in batch:
        number = int(example.id[1:])
        if number == 5:
            raise ValueError("the fifth fails")
        for place in range(number % 3):
            yield {
                "id": example.id, "place": place, "x": float(torch.rand(())), "half": np.float32(random.random()), "word": example.question,
                "flags": [bool(n % 2) for n in range(place)], "deep": [[0.5], []], "gap": None if place else number,
                "nothing": None, "nan": float("nan"),
            }  # fmt: skip


def terms(batch):
    for example in batch:
        yield {
            "id": example.id,
            "domain": example.id[-1],
            "source": "text",
            "module": "m",
            "layer": 0,
            "n": 1,
            "values": torch.rand(5).numpy(),
        }


class StopAt:
    """A work that is interrupted when its batch number comes."""

    def __init__(self, work, at):
        self.work, self.at, self.calls, self.asked = work, at, 0, []

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.asked += [example.id for example in batch]
        return list(self.work(batch))


@pytest.mark.parametrize("summed", [False, True])
def test_interrupted_at_every_batch_it_ends_as_if_never_stopped(summed, tmp_path):
    work, more = (terms, {"write": write_sums}) if summed else (mixed, {})
    run("mixed", questions(N), work, tmp_path / "whole", **SMALL, **more)
    for at in range(2, 17, 3):
        out, left = tmp_path / str(at), StopAt(work, at)
        with pytest.raises(KeyboardInterrupt, match=rf"interrupted: \d+ of {N} questions are done and kept in .*the same command again"):
            run("mixed", questions(N), left, out, **SMALL, **more)
        again = StopAt(work, 2)
        with pytest.raises(KeyboardInterrupt):  # and once more, one batch on
            run("mixed", questions(N), again, out, **SMALL, **more)
        last = StopAt(work, None)
        assert run("mixed", questions(N), last, out, **SMALL, **more).complete
        assert not (set(left.asked) & set(again.asked) | set(left.asked + again.asked) & set(last.asked)) - ONE_BY_ONE
        assert not list(out.glob("unfinished-*")) and not list(out.glob(".writing-*"))
        assert read_composition(out).equals(read_composition(tmp_path / "whole"))
        pd.testing.assert_frame_equal(read_failures(out), read_failures(tmp_path / "whole"))
        if summed:
            ours, theirs = read_sums(out), read_sums(tmp_path / "whole")
            assert ours.keys() == theirs.keys()
            assert all(ours[key][0] == theirs[key][0] and np.array_equal(ours[key][1], theirs[key][1]) for key in theirs)
            assert all(value.dtype == np.float32 for _, value in ours.values())
        else:
            pd.testing.assert_frame_equal(read_results(out), read_results(tmp_path / "whole"), check_exact=True)
    if not summed:
        assert read_failures(tmp_path / "whole")["id"].tolist() == ["q5"]


def test_an_interrupted_store_ends_as_if_never_stopped(model, tmp_path, monkeypatch):
    names = ["blocks.1.hook_resid_post"]
    store_activations(model, questions(12), names, tmp_path / "whole", **SMALL)
    cached, calls = type(model).run_with_cache, []

    def stopping(self, *args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cached(self, *args, **more)

    monkeypatch.setattr(type(model), "run_with_cache", stopping)
    with pytest.raises(KeyboardInterrupt, match="of 12 questions are done"):
        store_activations(model, questions(12), names, tmp_path / "stopped", **SMALL)
    assert list((tmp_path / "stopped").glob("unfinished-*"))
    store_activations(model, questions(12), names, tmp_path / "stopped", **SMALL)
    ours, theirs = ActivationStore(tmp_path / "stopped"), ActivationStore(tmp_path / "whole")
    for id in theirs.items["id"]:
        one, other = ours.question(id), theirs.question(id)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run("mixed", questions(N), mixed, out, **SMALL)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def read(out):
    return read_results(out), read_failures(out), read_composition(out)


def same(ours, theirs):
    return all(one.equals(other) for one, other in zip(ours, theirs))


def test_a_part_that_belongs_elsewhere_is_named(copy, tmp_path):
    one, other = copy / "part-00000.parquet", copy / "part-00001.parquet"
    kept = other.read_bytes()
    other.write_bytes(one.read_bytes())
    for look in (read, lambda out: run("mixed", questions(N), mixed, out, **SMALL)):
        with pytest.raises(ValueError, match=r"part-00001.parquet holds questions \[.*of shard 0; the plan has.*Delete it"):
            look(copy)
    other.unlink()
    run("mixed", questions(N), mixed, copy, **SMALL)  # as the message says
    assert other.read_bytes() == kept
    run("mixed", questions(N), mixed, tmp_path / "other", {"another": "setting"}, **SMALL)
    other.write_bytes((tmp_path / "other" / other.name).read_bytes())
    with pytest.raises(ValueError, match="part-00001.parquet belongs to another run than run.json describes"):
        read(copy)


def test_no_flipped_bit_passes(copy, whole):
    """Each file of a run with single bits flipped: the same tables, or its name and what to do; never other tables."""
    expected, draw, noticed = read(whole), random.Random(0), 0
    for name in ("part-00000.parquet", "part-00001.parquet", "plan.parquet", "run.json"):
        content = (copy / name).read_bytes()
        places = draw.sample(range(8 * len(content)), 60)
        for place in places:
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (copy / name).write_bytes(flipped)
            try:
                assert same(read(copy), expected), (name, place)
            except ValueError as error:
                noticed += 1
                assert str(copy) in str(error) and len(str(error)) < 700 and "\n" not in str(error), (name, place, error)
        (copy / name).write_bytes(content)
    assert noticed > 150 and same(read(copy), expected)


def test_cut_and_foreign_files_are_named(copy):
    for name in ("part-00000.parquet", "plan.parquet", "run.json"):
        content = (copy / name).read_bytes()
        for broken in (
            b"",
            content[:-20],
            content[: len(content) // 2],
            b"{}",
            b"PAR1",
            b"[" * 100000,
            b"\xff\xfe",
            json.dumps({"data": 3}).encode(),
        ):
            (copy / name).write_bytes(broken)
            for look in (read, lambda out: run("mixed", questions(N), mixed, out, **SMALL)):
                with pytest.raises(ValueError, match=rf"{name}|other settings") as caught:
                    look(copy)
                assert len(str(caught.value)) < 900
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(ValueError, match=f"{name}.*(a pipe|not there)|holds no run"):
            read(copy)
        (copy / name).unlink()
        (copy / name).write_bytes(content)
    for odd in (".writing-x", ".writing-host-abc-1", ".writing-"):
        (copy / odd).write_text("no process of ours")
    (copy / ".writing-folder").mkdir()
    (copy / "part-00000.parquet").unlink()
    assert run("mixed", questions(N), mixed, copy, **SMALL).complete


def test_an_interrupted_part_of_another_run_is_named(tmp_path, copy):
    with pytest.raises(KeyboardInterrupt):
        run("mixed", questions(N), StopAt(mixed, 3), tmp_path / "other", {"another": "setting"}, **SMALL)
    (left,) = (tmp_path / "other").glob("unfinished-*")
    shutil.copy(left, copy)
    (copy / "part-00000.parquet").unlink()
    with pytest.raises(ValueError, match="unfinished-00000.parquet does not belong to this run. Delete it"):
        run("mixed", questions(N), mixed, copy, **SMALL)
    unfinished_path(copy, 0, ".parquet").write_bytes(left.read_bytes()[:100])
    with pytest.raises(ValueError, match="unfinished-00000.parquet cannot be read"):
        run("mixed", questions(N), mixed, copy, **SMALL)


def test_a_full_disk_keeps_what_is_written(tmp_path, whole, monkeypatch):
    written, write = [], engine.write_rows

    def full(state, number, part, file):
        write(state, number, part, file)
        if number == 2 and not written:
            written.append(file)
            file.write_bytes(file.read_bytes()[:50])
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with pytest.raises(OSError, match="No space left"):
        run("mixed", questions(N), mixed, tmp_path / "out", write=full, **SMALL)
    assert len(list((tmp_path / "out").glob("part-*"))) == 2 and not list((tmp_path / "out").glob(".writing-*"))
    run("mixed", questions(N), mixed, tmp_path / "out", **SMALL)
    assert same(read(tmp_path / "out"), read(whole))


def test_a_store_knows_its_parts(model, tmp_path):
    names = ["blocks.0.hook_resid_post"]
    store_activations(model, questions(24), names, tmp_path, batch_size=3, batches_per_shard=2, progress=False)
    files = sorted(tmp_path.glob("part-*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match="part-00001.safetensors holds questions"):
        ActivationStore(tmp_path)
    flipped = bytearray(content)
    flipped[-200] ^= 4
    files[1].write_bytes(flipped)
    with pytest.raises(ValueError, match="part-00001.safetensors cannot be read .*checksum"):
        store = ActivationStore(tmp_path)
        list(store.batches(4))
    assert activation_store.SUFFIX == ".safetensors"


def test_sums_of_pieces_are_the_sums_bit_by_bit():
    """The order of adding is kept: what is done goes first."""
    draw = np.random.default_rng(0)
    rows = [
        {"domain": "a", "source": "t", "module": "m", "layer": 0, "n": 1, "values": draw.random(50, dtype=np.float32)} for _ in range(9)
    ]
    ((key, (n, first)),) = add_up(rows[:4]).items()
    later = add_up([{**rows[0], "n": n, "values": first}, *rows[4:]])
    assert np.array_equal(later[key][1], add_up(rows)[key][1])
    assert not np.array_equal(first + add_up(rows[4:])[key][1], add_up(rows)[key][1])


@pytest.mark.parametrize("kind", [HallucinationExperiment, FiringExperiment])
def test_a_model_that_changed_after_an_interruption_is_refused(kind, tmp_path, monkeypatch):
    """`hallucination` and `neurons`: what is kept is of the model that began."""
    model, data, calls = HookedQwen2VL.from_pretrained("scenes"), load_scenes(6), []
    work = kind.__call__

    def stopping(self, batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(self, batch)

    monkeypatch.setattr(kind, "__call__", stopping)
    made = kind(model, ["probability"], None, 2) if kind is HallucinationExperiment else kind(model, 1)
    with pytest.raises(KeyboardInterrupt, match="of 6 questions are done"):
        made.start(data, tmp_path, batch_size=1, progress=False)
    assert list(tmp_path.glob("unfinished-*"))
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="model.weights: "):
        made.start(data, tmp_path, batch_size=1, progress=False)
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] -= 1
