"""The command, run as a person runs it."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from conftest import picture
from tiny import CHAT_TEMPLATE, tiny_hf, tiny_tokenizer

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
    assert main(["scenes", "--n", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scenes.png").stat().st_size > 0


def test_help_is_quick():
    """Nothing heavy is imported for it."""
    import subprocess
    import sys

    code = "import sys; from hooked_qwen2vl.cli import main\ntry: main(['--help'])\nexcept SystemExit: print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("set()")
