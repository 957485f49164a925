"""The command line under bad input: one paragraph and exit code 2, before any work; whole outputs that never mix."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture
from tiny import CHAT_TEMPLATE, tiny_hf, tiny_tokenizer

from analyses.cli.outputs import Outputs
from analyses.common.tables import read_csv, write_csv
from analyses.data.examples import Example, Unreadable, examples
from analyses.experiments.flips import flip_study
from analyses.experiments.knockout import knockout_study
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.files import whole_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf(n_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 28 * 28 * 64}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def refused(capsys, *arguments, words=""):
    """One paragraph on the error stream, exit code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2 and "Traceback" not in said.err, (arguments, said.err)
    paragraph = said.err.strip()
    assert paragraph and "\n\n" not in paragraph and len(paragraph) < 2500 and words in paragraph, (arguments, paragraph)
    return paragraph


EARLY = [
    (["neurons", "--share", "5"], "--share must be above 0 and at most 1, got 5.0"), (["neurons", "--quantile", "1"], "--quantile"),
    (["neurons", "--sources", "image,sound"], "got 'sound'"), (["neurons", "--generate", "-1"], "--generate"),
    (["knockout", "--window", "0"], "--window"), (["lens", "--top-k", "0"], "--top-k"), (["ground", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["hallucination", "--methods", "magic"], "unknown methods magic"), (["hallucination", "--sweep", "-1"], "--sweep"),
    (["hallucination", "--data", "pope:/nowhere"], "/nowhere"), (["scenes", "--out", "/dev/null"], "is a file"),
    (["lens", "--out", "/dev/null"], "is a file"), (["lens", "--out", "/dev/null/x"], "nothing can be written below it"),
    (["explore", "--out", "/dev/null/x"], "below it"), (["lens", "--out", "x" * 5000], "written"),
    (["lens", "--device", "cuda:99"], "--device cuda:99"), (["lens", "--device", "nonsense"], "--device nonsense"),
    (["lens", "--image", "/tmp", "--question", "what?"], "a folder"), (["lens", "--image", "/dev/zero", "--question", "what?"], "a device"),
    (["lens", "--image", "x" * 5000 + ".png", "--question", "what?"], "too long"), (["patch", "--data", "/nowhere.csv"], "/nowhere.csv"),
    (["compare", "--data", "/nowhere"], "/nowhere"), (["flips", "--data", "/dev/zero"], "/dev/zero"), (["flips", "--rank", "3/2"], "rank k/n"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, words", EARLY, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_arguments_are_checked_before_work(arguments, words, capsys, monkeypatch, tmp_path):
    """No model is loaded for them."""
    import hooked_qwen2vl.model

    def never(*args, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hooked_qwen2vl.model.HookedQwen2VL, "from_pretrained", never)
    monkeypatch.chdir(tmp_path)
    refused(capsys, *arguments, words=words)
    assert not list(tmp_path.iterdir())


def test_layers_and_tokens_that_are_not_there(checkpoint, capsys, tmp_path):
    picture(56, 56).save(tmp_path / "a.png")
    prompt = ["--model", checkpoint, "--image", tmp_path / "a.png", "--question", "what?", "--out"]
    refused(capsys, "ground", *prompt, tmp_path / "out", "--image-layer", "99", words="99")
    refused(capsys, "lens", *prompt, tmp_path / "out", "--top-k", "1000000", words="--top-k must be at most the")
    refused(capsys, "explore", *prompt, tmp_path / "page.html", "--top-k", "1000000", words="--top-k must be at most the")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png"]


BROKEN = [
    ("config.json", b""), ("config.json", b"[" * 100000), ("config.json", b'{"model_type": "qwen2_vl", "hidden_size": "x"}'), ("config.json", b"\xff\xfe"),
    ("model.safetensors", b""), ("model.safetensors", b"\xff" * 100), ("tokenizer.json", b"{}"), ("tokenizer.json", b'{"model": 5}'),
    ("tokenizer_config.json", b"{"), ("preprocessor_config.json", b"7"), ("preprocessor_config.json", b'{"patch_size": 0}'),
    ("chat_template.json", b"{"), ("chat_template.json", json.dumps({"chat_template": "{{ raise_exception('no') }}"}).encode()),
    ("chat_template.json", json.dumps({"chat_template": "{% for"}).encode()), ("generation_config.json", b"[]"),
]  # fmt: skip


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_checkpoint_is_a_paragraph(name, content, checkpoint, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "model", symlinks=True)
    (folder / name).write_bytes(content)
    picture(56, 56).save(tmp_path / "a.png")
    arguments = ["lens", "--model", folder, "--image", tmp_path / "a.png", "--question", "what?", "--out", tmp_path / "out"]
    assert refused(capsys, *arguments) and not (tmp_path / "out").exists()


def test_an_interruption_is_a_line_and_130(capsys, monkeypatch, tmp_path):
    import analyses.experiments.knockout

    def stop(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyses.experiments.knockout, "knockout_study", stop)
    assert main(["knockout", "--out", str(tmp_path / "out")]) == 130
    assert (
        capsys.readouterr().err == "\nhooked-qwen2vl: interrupted: nothing of this command was written.\n"
        and not (tmp_path / "out").exists()
    )


def test_no_memory_is_a_paragraph_and_a_fault_of_ours_is_not(capsys, monkeypatch):
    import analyses.experiments.knockout as module

    def fail_with(error):
        def study(*args, **more):
            raise error

        monkeypatch.setattr(module, "knockout_study", study)

    fail_with(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    )
    refused(capsys, "knockout", words="the memory is not enough")
    fail_with(OSError(28, "No space left on device", "out/x.csv"))
    refused(capsys, "knockout", words="out/x.csv: no space left on device: make room")
    fail_with(KeyError("ours"))
    with pytest.raises(KeyError):
        main(["knockout"])


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
    """As with `| head`: no complaint, and every file is written."""
    command = f"{sys.executable} -m hooked_qwen2vl.cli scenes --n 1 --out {tmp_path}/out | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert json.loads((tmp_path / "out" / "scenes.json").read_text())["files"]


def test_output_that_the_terminal_cannot_spell(monkeypatch, tmp_path):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["scenes", "--n", "1", "--out", str(tmp_path / "→")]) == 0
    terminal.flush()
    assert b"wrote " in terminal.buffer.getvalue() and rb"\u2192" in terminal.buffer.getvalue()


class Options:
    def __init__(self, out):
        self.out, self.limit, self.run = out, 3, main


def test_outputs_are_whole_and_never_mix(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), Outputs(Options(out), "lens") as files:
        files.path("half.png").write_bytes(b"half")
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    with Outputs(Options(out), "lens", question="one?") as files:
        for name in ("a.csv", "b.csv", "mine.csv"):
            files.path(name).write_text("one")
            assert not (out / name).exists()
    (out / "mine.csv").write_text("edited since")
    with pytest.raises(RuntimeError), Outputs(Options(out), "lens", question="two?") as files:
        files.path("a.csv").write_text("two")
        raise RuntimeError
    assert (out / "a.csv").read_text() == "one" and json.loads((out / "lens.json").read_text())["question"] == "one?"
    with Outputs(Options(out), "lens", question="two \ud800?") as files:
        files.path("a.csv").write_text("two")
    assert sorted(file.name for file in out.iterdir()) == [
        "a.csv",
        "index.html",
        "lens.json",
        "mine.csv",
    ]  # b.csv was of the first question
    manifest = json.loads((out / "lens.json").read_text())
    assert manifest["options"]["limit"] == 3 and list(manifest["files"]) == ["a.csv", "index.html"]
    assert files.wrote() == f"wrote {out / 'a.csv'}\nwrote {out / 'index.html'}"
    (out / "lens.json").write_text('{"files": {"../outside": "x", "a.csv": 3}}')
    (tmp_path / "new" / "outside").write_text("x")
    with Outputs(Options(out), "lens") as files:
        files.path("c.csv").write_text("three")
    assert (tmp_path / "new" / "outside").exists() and (out / "a.csv").exists()


def test_a_kill_while_files_are_written_leaves_the_old_ones(tmp_path):
    with Outputs(Options(tmp_path), "lens", question="one?") as files:
        files.path("a.csv").write_text("one")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code = f"""
import os
from pathlib import Path
from hooked_qwen2vl.files import whole_files
with whole_files(Path({str(tmp_path)!r})) as folder:
    (folder / "a.csv").write_text("two")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == -9
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    with whole_files(tmp_path):
        pass
    assert {file.name for file in tmp_path.iterdir()} == set(before)  # the killed one's is swept away


def test_cells_that_a_spreadsheet_would_run(tmp_path):
    texts = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "-",
        "=",
        "'quoted",
        "''",
        "plain",
        "-5",
        "+1e3",
        "\t=1",
        "a=b",
        "＝1",
        "-\n=x",
    ]
    table = pd.DataFrame({"=text": texts, "number": np.linspace(-1, 1, len(texts)), "count": range(len(texts))})
    write_csv(table, tmp_path / "t.csv")
    pd.testing.assert_frame_equal(read_csv(tmp_path / "t.csv", dtype={"'=text": str}, keep_default_na=False), table)
    raw = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    for cell in [*raw.iloc[:, 0], raw.columns[0]]:
        assert not (cell[0] in "=+-@\t＝" and len(cell) > 1) or cell in ("-5", "+1e3"), cell
    assert raw["number"].astype(float).tolist() == pytest.approx(table["number"].tolist()) and not raw["number"].str.startswith("'").any()


def test_studies_count_what_they_leave_out_and_record_what_cannot_be_read(scenes, tmp_path):
    asked = list(examples("scenes", 3))
    bad = [
        Unreadable("bad", "", "", problem="f, line 3: no question"),
        Example("gone", "what?", "red", (tmp_path / "gone.png",), candidates=("red",)),
    ]
    study = knockout_study(scenes, [*asked, *bad], progress=False)
    left = dict(study.left_out)
    assert left.pop("bad: f, line 3: no question") == 1 and any("gone.png" in reason for reason in left)
    used = study.effects.shape[-1] + study.skipped + sum(study.left_out.values())
    assert used == len(asked) + len(bad)
    with pytest.warns(UserWarning, match="2 questions failed"):
        flips = flip_study(scenes, [*asked[:2], *bad], n_random=1, progress=False, out=tmp_path / "run", batch_size=1)
    assert len(flips.prompts) + flips.skipped == 2
    with pytest.raises(ValueError, match="no item could be used: .*line 3"):
        knockout_study(scenes, bad, progress=False)


def test_an_index_stays_in_its_folder(checkpoint, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/../../outside.safetensors", "", 5, None, "a\0"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
        refused(capsys, "lens", "--model", folder, words="expected files of its own folder")


def test_a_checkpoint_that_changes_is_noticed(checkpoint, tmp_path):
    import shutil

    from hooked_qwen2vl.checkpoint import open_checkpoint

    folder = shutil.copytree(checkpoint, tmp_path / "model")
    opened = open_checkpoint(folder)
    name = next(iter(opened))
    assert len(opened[name])
    os.truncate(folder / "model.safetensors", 1000)
    for read in (lambda: opened[name], lambda: dict(opened.items())):
        with pytest.raises(ValueError, match="model.safetensors has changed since it was opened"):
            read()


def test_a_template_without_end_is_stopped(model, monkeypatch):
    """Nested loops that would take hours."""
    import hooked_qwen2vl.processor as module

    monkeypatch.setattr(module, "TEMPLATE_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(model.processor.tokenizer, "chat_template", endless)
    monkeypatch.setattr(type(model.processor), "_template", lambda self, name: endless, raising=False)
    with pytest.raises(ValueError, match="the chat template of the checkpoint took longer than 0.3 seconds"):
        model.to_inputs("what?")
