"""The command `flips` over a data set: killed, resumed, shared and refused, always with the figures of `flip_study`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import picture
from same_runs import ROUNDING, one_thread, one_thread_environment, same_rows

from analyses.data.examples import Example, examples
from analyses.experiments.flips import flip_study, read_flip_study
from analyses.runs.engine import read_results, run
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main

N = 12
FLIPS = ["flips", "--random", "2", "--batch-size", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_each():
    """As the process that is killed has."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def expected(one_thread_each):
    """What the library gives in memory."""
    model = HookedQwen2VL.from_pretrained("scenes")
    return flip_study(model, examples("scenes", N), n_random=2, progress=False)


def same(study, other):
    for table in ("prompts", "flips"):
        same_rows(getattr(study, table), getattr(other, table))
    for table in ("summary", "last_shift", "by_category"):
        same_rows(getattr(study, table)(), getattr(other, table)())
    assert study.skipped == other.skipped


@pytest.mark.slow
def test_killed_and_started_again_it_gives_what_memory_gives(expected, tmp_path, capsys):
    command = [*FLIPS, "--limit", str(N), "--out", str(tmp_path)]
    arguments = [sys.executable, "-m", "hooked_qwen2vl.cli", *command]
    process = subprocess.Popen(arguments, env=one_thread_environment(), stderr=subprocess.PIPE)
    part = tmp_path / "rows" / "part-00000.parquet"
    while not part.exists() and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="not finished"):
        read_flip_study(tmp_path / "rows")
    written = part.stat().st_mtime_ns

    assert main(command) == 0
    assert part.stat().st_mtime_ns == written  # what was there is not done again
    same(read_flip_study(tmp_path / "rows"), expected)
    assert len(expected.flips) > 2 and len(expected.prompts) == N
    said = capsys.readouterr().out
    for name in ("flips.csv", "trajectories.csv", "flip_tests.csv", "outcomes.csv", "flips.png", "trajectories.png"):
        assert str(tmp_path / name) in said and (tmp_path / name).stat().st_size > 0
    assert f"{len(expected.flips)} eligible flips" in said and "normed twice" in said
    assert pd.read_csv(tmp_path / "flips.csv")["final_difference"].tolist() == pytest.approx(expected.flips["final_difference"])

    # the same folder with something else
    for change, named in ((["--random", "3"], "settings.random: 2 there, 3 now"), (["--components", "1"], "settings.components"),
                          (["--limit", "5"], "data.questions")):  # fmt: skip
        assert main([*command, *change]) == 2
        assert named in capsys.readouterr().err
    same(read_flip_study(tmp_path / "rows"), expected)


def folder(path, n):
    """The first questions as files; the second image is cut short, the third question has no candidates."""
    lines = []
    for place, example in enumerate(examples("scenes", n)):
        example.images[0].save(path / f"{place}.png")
        line = {"id": example.id, "image": f"{place}.png", "question": example.question, "answer": example.answer,
                "category": example.category, "candidates": [] if place == 2 else example.candidates}  # fmt: skip
        lines.append(json.dumps(line))
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:300])
    (path / "questions.jsonl").write_text("\n".join(lines))


def test_shares_of_a_folder_with_a_bad_image(expected, tmp_path, capsys):
    folder(tmp_path, 6)
    command = [*FLIPS, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "flips: 6 questions in 6 batches, 2 shards" in said and "memory" in said and not (tmp_path / "out").exists()

    assert main([*command, "--limit", "4", "--out", str(tmp_path / "some")]) == 0  # gone through twice, said once
    assert capsys.readouterr().out.count("a limit leaves questions out: 4 of 6 are kept") == 1

    assert main([*command, "--rank", "1/2"]) == 0
    assert "1 of 2 shards" in capsys.readouterr().out and not (tmp_path / "out" / "flips.csv").exists()
    assert main([*command, "--rank", "0/2"]) == 0
    said = capsys.readouterr().out
    assert "1 questions without candidates left out" in said and "1 questions failed" in said
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert failures["id"].tolist() == ["test-0-1"] and failures["error"].str.len()[0] > 10

    study = read_flip_study(tmp_path / "out" / "rows")
    whole = expected.prompts.set_index("id").loc[["test-0-0", "test-0-3", "test-0-4", "test-0-5"]].reset_index()
    figures = ["id", "outcome", "final", "birth_1", "stability", "final_prob", "last_tv"]
    same_rows(study.prompts[figures].astype({"birth_1": float}), whole[figures].astype({"birth_1": float}))  # NaN: never on top
    assert study.skipped == 1
    own = expected.flips[expected.flips["id"].isin(study.prompts["id"])]
    assert study.flips["final_difference_ablated"].tolist() == pytest.approx(own["final_difference_ablated"], abs=ROUNDING)
    assert study.prompts["id"].iloc[study.flips["prompt"]].tolist() == study.flips["id"].tolist()


def test_parts_without_any_flip_are_read(tmp_path):
    """A column of empty lists knows no type of its own."""

    def work(batch):
        return [{"id": e.id, "flip_layer": [] if e.id < "3" else [1, 2], "flip_gained": [] if e.id < "3" else ["a", "b"]} for e in batch]

    run("lists", [Example(str(i), "what?", "") for i in range(6)], work, tmp_path, batch_size=1, batches_per_shard=3, progress=False)
    table = read_results(tmp_path)
    assert [list(layers) for layers in table["flip_layer"]] == [[]] * 3 + [[1, 2]] * 3
    assert list(table["flip_gained"][5]) == ["a", "b"]


def test_nothing_to_follow_is_said(tmp_path, capsys):
    picture(56, 56).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "what?", "answer": "red"}')
    assert main([*FLIPS, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "needs candidates" in capsys.readouterr().err
    for wrong, named in ((["--rank", "2/2"], "rank k/n"), (["--batch-size", "0"], "--batch-size"),
                         (["--question", "what?", "--answer", "red", "--dry-run"], "--dry-run belong")):  # fmt: skip
        assert main([*FLIPS, *wrong, "--out", str(tmp_path / "out")]) == 2
        assert named in capsys.readouterr().err
