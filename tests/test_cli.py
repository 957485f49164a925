"""The command, run as a person runs it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
from conftest import picture
from test_explorer import read_page
from tiny import CHAT_TEMPLATE, tiny_hf, tiny_tokenizer

from analyses.cli import COMMANDS, _parser
from analyses.cli.outputs import _words
from analyses.cli.shared import SAMPLES
from analyses.views.figure import Figure
from analyses.views.index import index_page
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf(n_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 28 * 28 * 64}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def test_the_lens(folder, tmp_path, capsys):
    image = tmp_path / "image.png"
    picture(84, 56).save(image)
    arguments = ["lens", "--model", str(folder), "--image", str(image), "--question", "what?", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "lens.csv", keep_default_na=False)
    assert set(table["layer"]) == {0, 1, 2} and "final_post" in said
    assert (tmp_path / "lens.png").stat().st_size > 0
    assert main([*arguments, "--answer", "red"]) == 0
    assert "answer:   red" in capsys.readouterr().out


def test_bad_input_ends_with_two(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for model, image in (("/nowhere/at/all", "x.png"), (str(folder), "nowhere.png")):
        code = main(["lens", "--model", model, "--image", image, "--question", "what?", "--out", str(out)])
        assert code == 2 and capsys.readouterr().err.startswith("hooked-qwen2vl: ")
    assert not out.exists()


def test_the_embedded_model_needs_no_arguments(tmp_path, capsys):
    assert main(["lens", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for name in ("lens.csv", "lens.png", "lens.html", "lens_image.png", "lens_image.csv", "explorer.html"):
        assert str(tmp_path / name) in said and (tmp_path / name).stat().st_size > 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(f'"{name}"' in page for name in ("lens.png", "lens_image.png", "lens.html", "explorer.html")) and "lens.csv" in page
    assert main(["scenes", "--n", "2", "--out", str(tmp_path)]) == 2 and "a folder of its own" in capsys.readouterr().err


@pytest.fixture
def figures_written(monkeypatch) -> dict:
    """By name of file, the figures that commands write."""
    written = {}
    saved = Figure.saved

    def keep(figure, path):
        written[Path(path).name] = figure
        return saved(figure, path)

    monkeypatch.setattr(Figure, "saved", keep)
    return written


def test_lens_writes_its_question_over_the_picture(tmp_path, figures_written):
    arguments = ["--image", str(SAMPLES / "glyphs.png"), "--question", "What digit is red?", "--answer", "4"]
    assert main(["lens", *arguments, "--out", str(tmp_path / "lens")]) == 0
    assert "What digit is red?" in figures_written["lens.png"].get_suptitle()


@pytest.mark.parametrize(("direction", "words", "not_words"), [("noise", "share lost", "recover"), ("denoise", "recovery", "lost")])
def test_patch_names_its_colours(tmp_path, figures_written, direction, words, not_words):
    assert main(["patch", "--direction", direction, "--out", str(tmp_path / "patch")]) == 0
    for name in ("patch.png", "patch_image.png"):
        *_, bar = figures_written[name].axes
        assert bar.get_ylabel().startswith(words)
        assert not_words not in bar.get_ylabel() + figures_written[name].get_suptitle()


def test_each_question_has_a_folder_of_its_own(monkeypatch, tmp_path, capsys):
    """Without --out: named after what is asked; other options never replace what is there, the same ones do and say so."""
    monkeypatch.chdir(tmp_path)

    def scenes(*more):
        assert main(["scenes", "--n", "1", *more]) == 0
        return capsys.readouterr().out

    assert "in place of" not in scenes() and "in place of" not in scenes("--seed", "1")
    assert "in place of" in scenes() and sorted(p.name for p in Path("out/scenes").iterdir()) == ["example", "example-2"]
    page = Path("out/scenes/example-2/index.html").read_text(encoding="utf-8")
    assert "hooked-qwen2vl scenes --n 1 --seed 1" in page and 'src="scenes.png"' in page


def test_a_folder_is_named_after_what_is_asked():
    asked = {"model": "Qwen/Qwen2-VL-2B-Instruct", "image": ["/a/cat photo.jpg"], "question": "What is <b>here</b>? 颜色", "answer": None}
    assert _words(Namespace(**asked)) == "Qwen2-VL-2B-Instruct-cat-photo-What-is-b-here-b-颜色"
    assert _words(Namespace(model="scenes")) == "example" and _words(Namespace(model="scenes", data="..")) == "example"
    assert len(_words(Namespace(model="m", question="颜" * 300)).encode()) <= 80
    assert _words(Namespace(model="scenes", data="pope:/data/coco/pope_random.json")) == "pope_random.json"


def test_a_page_shows_what_is_text_as_text(tmp_path):
    (tmp_path / "a.csv").write_text("name,value\n<b>x</b>,0.123456\n" + "y,1\n" * 40, encoding="utf-8")
    page = index_page("lens", "hooked-qwen2vl lens '<b>'", {"question": "<i>?"}, "said <u>", [tmp_path / "a.csv"])
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>")) and "0.1235" in page and "the first 20 of 41 rows" in page


def test_help_and_refusals_are_quick():
    """Nothing heavy is imported for help, the version, and options that cannot be right."""
    code = """
import sys
from contextlib import suppress
from hooked_qwen2vl.cli import main
for line in ("--help", "--version", "lens --help", "lense", "lens --imgae a.png", "patch --dtype float7", "flips --limit x", "lens --image a.png"):
    with suppress(SystemExit):
        assert main(line.split()) == 2
    assert not {"torch", "pandas", "numpy", "matplotlib", "PIL"} & set(sys.modules), line
for line in ("lens --model /no/such", "patch --adapter=./none", "neurons --data /no/such", "flips --data /no/such", "ablate --data /no/such", "compare --data x"):
    with suppress(SystemExit):
        assert main(line.split()) == 2
    assert "torch" not in sys.modules, line
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_asking_a_model_of_ours_loads_none_of_transformer_lenss_own():
    """TransformerLens's bridges and transformers' generation load hundreds of architectures, which takes a second."""
    code = """
import sys
import analyses.explorer, analyses.logit_lens, hooked_qwen2vl.model
assert "transformers" in sys.modules
print({"transformer_lens.model_bridge", "transformers.generation.utils"} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lens", "--imgae", "a.png"], ["usage: hooked-qwen2vl lens", "--imgae", "did you mean --image?"]),
        (["patch", "--curupted=x"], ["usage: hooked-qwen2vl patch", "did you mean --corrupted?"]),
        (["lense"], ["did you mean lens?"]),
    ],
)
def test_a_misspelt_option_shows_its_commands_usage_and_the_nearest_name(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and all(word in said for word in words), said


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_every_help_has_examples_that_can_be_typed(command, capsys):
    with pytest.raises(SystemExit):
        main([command.NAME, "--help"])
    assert "examples:\n  hooked-qwen2vl" in capsys.readouterr().out
    for line in command.EXAMPLES:
        assert _parser().parse_args([command.NAME, *shlex.split(line)]).run is command.run


def test_what_is_wrong_with_a_pair_is_said_with_what_to_do(folder, tmp_path, capsys):
    picture(84, 56).save(tmp_path / "a.png")
    picture(84, 84, 1).save(tmp_path / "b.png")
    common = ["patch", "--model", str(folder), "--image", str(tmp_path / "a.png"), "--question", "what?", "--out", str(tmp_path / "out")]
    assert main([*common, "--corrupted", str(tmp_path / "b.png"), "--answer", "red", "--other", "blue"]) == 2
    said = capsys.readouterr().err
    assert "a.png has 84×56 pixels and gives 2×3 image tokens" in said and "Resize the other to 84×56" in said
    picture(84, 56, 1).save(tmp_path / "b.png")
    assert main([*common, "--corrupted", str(tmp_path / "b.png"), "--answer", "an answer of many words", "--other", "blue"]) == 2
    said = capsys.readouterr().err
    assert "is 23 tokens, 'a' + 'n' + ' '" in said and "blue" not in said


def test_knockout_of_ones_own_image(folder, tmp_path, capsys):
    picture(84, 56).save(tmp_path / "a.png")
    common = ["knockout", "--model", str(folder), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert main([*common, "--question", "what is it?"]) == 0
    table, said = pd.read_csv(tmp_path / "out" / "knockout.csv"), capsys.readouterr().out
    assert "answer:" in said and len(table) == 2 * 3 and set(table["items"]) == {1} and table["effect_percent"].ne(0).any()
    assert main(common) == 2 and "one prompt needs --image and --question" in capsys.readouterr().err
    assert main([*common, "--question", "what?", "--answer", "red blue"]) == 2 and "tokens, 'red'" in capsys.readouterr().err


def test_chat_messages_given_as_a_prompt(folder):
    model = HookedQwen2VL.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"messages=\["):
        model.to_inputs([{"role": "user", "content": "what?"}])


def test_a_video_in_the_explorer(folder, tmp_path, capsys):
    """A folder of frames: each pair of frames is a picture of its own, and its tokens are that pair's."""
    (tmp_path / "frames").mkdir()
    for number in range(4):
        picture(84, 56, number).save(tmp_path / "frames" / f"{number}.png")
    common = ["explore", "--model", str(folder), "--question", "what?", "--out", str(tmp_path / "out"), "--video"]
    assert main([*common, str(tmp_path / "frames")]) == 0
    header, _ = read_page(tmp_path / "out" / "explorer.html")
    assert [image["name"] for image in header["images"]] == ["video 0, frame 0", "video 0, frame 2"]
    assert [(image["rows"], image["cols"]) for image in header["images"]] == [(2, 3)] * 2
    first, second = (image["start"] for image in header["images"])
    assert second == first + 6 and set(header["segments"][first : second + 6]) == {"video[0]"}
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    assert main([*common, str(tmp_path / "clip.mp4")]) == 2 and "ffmpeg" in capsys.readouterr().err
