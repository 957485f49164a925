"""A run on a Ray cluster of two nodes, one of which is killed in the middle: the rows of one process."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from same_runs import one_thread

from analyses.cli import main
from analyses.data.examples import examples
from analyses.experiments.neurons import FiringExperiment
from analyses.runs.cluster import Cluster, Worker
from analyses.runs.engine import Shard, read_composition, read_failures
from analyses.runs.files import finished_shards, read_manifest, read_plan
from analyses.runs.sums import read_sums
from hooked_qwen2vl import HookedQwen2VL

LOAD = partial(HookedQwen2VL.from_pretrained, "scenes")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Pictures in files; the last one is damaged, and is recorded as such."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for number, example in enumerate(examples("scenes:train", 60)):
        path = folder / f"{number}.png"
        example.images[0].save(path)
        found.append(replace(example, images=(path,), item=None))
    path.write_bytes(b"no picture")
    return found


@pytest.fixture(scope="module")
def alone(scenes, questions, tmp_path_factory):
    """The same run in one process, with as many threads as a worker has."""
    out = tmp_path_factory.mktemp("alone")
    with one_thread():
        FiringExperiment(scenes, generate=2).start(questions, out, batch_size=1, progress=False)
    return out


def same_runs(out, alone) -> None:
    ours, theirs = read_sums(out), read_sums(alone)
    assert ours.keys() == theirs.keys()
    for key, (n, values) in theirs.items():
        assert ours[key][0] == n
        np.testing.assert_array_equal(ours[key][1], values)
    pd.testing.assert_frame_equal(read_failures(out), read_failures(alone))
    pd.testing.assert_frame_equal(read_composition(out), read_composition(alone))
    assert len(read_failures(out)) == 1


@pytest.fixture(scope="module")
def nodes():
    """A cluster on this machine: a head without processors, and two nodes of one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    there = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    yield cluster, there
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.alone
def test_a_node_killed_in_the_middle_changes_no_row(scenes, questions, alone, nodes, tmp_path):
    cluster, there = nodes
    n_shards, left = read_plan(alone)["part"].nunique(), []

    def kill() -> None:
        while (done := len(list(tmp_path.glob("part-*.parquet")))) < 4:
            time.sleep(0.05)
        cluster.remove_node(there.pop(), allow_graceful=False)
        left.append(n_shards - done)

    killer = threading.Thread(target=kill)
    killer.start()
    experiment = FiringExperiment(scenes, generate=2)
    state = experiment.start(questions, tmp_path, batch_size=1, progress=False, cluster=Cluster(cluster.address, LOAD))
    killer.join()
    assert state.complete and left[0] >= 4
    same_runs(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.alone
def test_the_command_on_the_node_that_is_left(nodes, tmp_path, capsys):
    """It goes on where another process was stopped, and a node with other weights is refused."""
    command = ["neurons", "--limit", "12", "--batch-size", "2", "--only-select", "--out"]
    on_nodes = ["--cluster", nodes[0].address]
    assert main([*command, str(tmp_path / "here")]) == 0
    assert main([*command, str(tmp_path / "there"), *on_nodes]) == 0
    tables = [pd.read_csv(tmp_path / where / "neurons.csv") for where in ("here", "there")]
    pd.testing.assert_frame_equal(*tables)
    other = Cluster(nodes[0].address, partial(HookedQwen2VL.from_pretrained, "scenes", dtype="bfloat16"))
    with pytest.raises(ValueError, match="a node's model differ.*bfloat16.*the driver's.*float32"):
        FiringExperiment(LOAD()).start(list(examples("scenes:train", 4)), tmp_path / "other", progress=False, cluster=other)
    assert not finished_shards(tmp_path / "other", ".parquet", True)


def test_what_a_worker_does_is_what_one_process_does(scenes, questions, tmp_path):
    experiment = FiringExperiment(scenes, generate=2)
    state = experiment.start(questions[:4], tmp_path, batch_size=2, progress=False)
    planned = read_plan(tmp_path)
    worker = Worker(lambda: scenes, experiment.of, read_manifest(tmp_path))
    given = {i: replace(q, images=examples_opened(q)) for i, q in enumerate(questions[:4])}
    shard = worker.do(Shard([], [], []), (planned, {**given, 3: "unreadable"}), state.manifest["seed"])
    assert [failure.error for failure in shard.failures] == ["unreadable"] and shard.items == [*planned["item"]]
    changed = {**state.manifest, "versions": {"torch": "0"}}
    assert worker.problem() == ""
    assert "a node's versions differ" in Worker(lambda: scenes, experiment.of, changed).problem()


def examples_opened(question):
    from hooked_qwen2vl import open_image

    return tuple(map(open_image, question.images))


def test_the_command_says_what_does_not_go_together(capsys, tmp_path):
    assert main(["flips", "--cluster", "auto", "--rank", "0/2", "--out", str(tmp_path)]) == 2
    assert "--cluster hands the whole run out" in capsys.readouterr().err
    assert main(["flips", "--cluster", "auto", "--question", "q", "--answer", "a", "--out", str(tmp_path)]) == 2
    assert "belong to a data set" in capsys.readouterr().err
