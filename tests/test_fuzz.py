"""A seeded fuzz of folders, images and arguments: a result or a paragraph, never another exception. Rows: test_rows.py."""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import warnings

import psutil
import pytest
import torch
from conftest import picture
from run_child import answer_with, questions
from tiny import CHAT_TEMPLATE, tiny_hf, tiny_tokenizer

from analyses.cli.shared import load_model
from analyses.counterfactuals import Candidate
from analyses.data.examples import Example
from analyses.runs.engine import read_results, run
from analyses.runs.plan import size_by_pixels
from hooked_qwen2vl.cache import HookedCache
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.processor import open_image

pytestmark = pytest.mark.slow
FOLDERS, IMAGES, RESULTS, ARGUMENTS = 300, 600, 300, 800  # 2,000; rows: 9,000 in test_rows.py
VALUES = [None, 0, -1, 1, 3.5, 10**30, "", "x", [], {}, [1, 2], {"a": 1}, True, float("nan"), "\ud800", [[[]]], 2**31, "cuda", "../../x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf(n_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 28 * 28 * 16}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def paragraph(error: BaseException) -> None:
    assert type(error) is ValueError or isinstance(error, (ValueError, OSError)), repr(error)
    assert 0 < len(str(error)) < 2500, error


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Cut, with bytes changed, put in, or replaced as a whole."""
    how = draw.randrange(5)
    if how == 0:
        return content[: draw.randrange(len(content) + 1)]
    if how == 1:
        changed = bytearray(content)
        for _ in range(draw.randint(1, 20)):
            changed[draw.randrange(min(len(changed), 4000))] = draw.randrange(256)
        return bytes(changed)
    if how == 2:
        at = draw.randrange(len(content))
        return content[:at] + draw.randbytes(draw.randint(1, 50)) + content[at:]
    return draw.choice([b"", b"{}", b"[]", b"null", b"[" * 50000, b"\xff\xfe\x00", b"7", b'"x"', draw.randbytes(100)])


def mutated(draw: random.Random, content: bytes) -> bytes:
    """Some JSON with one value, anywhere in it, replaced or gone."""
    try:
        tree = json.loads(content)
    except ValueError:
        return damaged(draw, content)
    place = tree
    while isinstance(place, (dict, list)) and len(place):
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if not isinstance(place[key], (dict, list)) or not len(place[key]) or draw.random() < 0.3:
            if draw.random() < 0.3:
                del place[key]
            else:
                place[key] = draw.choice(VALUES)
            break
        place = place[key]
    return json.dumps(tree).encode()


def test_folders(folder, tmp_path):
    """Loaded and asked, as the commands do it; what a changed file still allows gives numbers."""
    draw, outcomes, faults = random.Random(0), {"refused": 0, "ran": 0}, []
    names = sorted(file.name for file in folder.iterdir())
    image = picture(56, 56)
    for number in range(FOLDERS):
        place = shutil.copytree(folder, tmp_path / str(number))
        name = draw.choice(names)
        content = (place / name).read_bytes()
        (place / name).write_bytes((mutated if name.endswith(".json") and draw.random() < 0.7 else damaged)(draw, content))
        options = argparse.Namespace(model=str(place), dtype=None, device=None, adapter=None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = load_model(options)
                with torch.no_grad():
                    model(model.to_inputs("what?", images=[image]), logits_at=-1)
            outcomes["ran"] += 1
        except Exception as error:
            try:
                paragraph(error)
            except AssertionError:
                faults.append(f"{number}, {name}: {error!r}")
            outcomes["refused"] += 1
        shutil.rmtree(place)
    assert not faults, "\n".join(faults)
    assert min(outcomes.values()) > FOLDERS / 20, outcomes


def test_images(tmp_path):
    draw, refused = random.Random(1), 0
    whole = {}
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        buffer = io.BytesIO()
        picture(60, 40).save(buffer, kind)
        whole[kind] = buffer.getvalue()
    for number in range(IMAGES):
        kind = draw.choice(list(whole))
        file = tmp_path / f"{number}.{kind}"
        file.write_bytes(damaged(draw, whole[kind]))
        for read in (open_image, lambda path: size_by_pixels(Example("q", "what?", "", (path,)))):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(file)
            except Exception as error:
                paragraph(error)
                refused += 1
        file.unlink()
    assert refused > IMAGES / 2


def test_saved_results_and_caches(model, tmp_path):
    """Damaged headers and bodies: what was saved, or the file's name."""
    draw, refused = random.Random(3), 0
    Candidate("what?", picture(30, 20), picture(30, 20, 1), "red", "blue", ((0.0, 0.0, 5.0, 5.0),)).save(tmp_path / "result.safetensors")
    model.run_with_cache("what?", names_filter="hook_embed")[1].save(tmp_path / "cache.safetensors")
    for name, load in (("result", Candidate.load), ("cache", lambda path: HookedCache.load(path, model))):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        file = tmp_path / f"damaged-{name}"
        for _ in range(RESULTS // 2):
            file.write_bytes(damaged(draw, content))
            try:
                load(file)
            except Exception as error:
                paragraph(error)
                assert str(file) in str(error), error
                refused += 1
    assert refused > RESULTS / 2


COMMANDS = ("lens", "explore", "flips", "patch", "knockout", "ground", "hallucination", "neurons", "compare", "check", "scenes")
OPTIONS = (
    "--model --image --question --answer --top-k --out --data --limit --components --random --batch-size --rank --dry-run --candidates --corrupted --other "
    "--activation --direction --n --window --image-layer --text-layer --max-new-tokens --images --objects --synonyms --judgements --skip-bad --methods --sweep "
    "--n-boot --test --test-limit --generate --share --quantile --sources --seeds --only-select --with --tuned --items --seed --dtype --device --adapter --nonsense"
).split()
WORDS = ["", "0", "-1", "1", "3", "1e9", "nan", "inf", "x", "\ud800", "é", "scenes", "scenes:nowhere", "pope:", "pope:/dev/zero", "chair:x", "/dev/null", "/dev/zero",
         "/", "..", "x" * 5000, "0/2", "2/1", "image,text", ",", "cuda", "cpu", "float32", "int8", "a\nb", "[1]"]  # fmt: skip


def test_arguments(tmp_path, monkeypatch, capsys):
    """Every command with random options and words; where they pass, no model is loaded."""
    import hooked_qwen2vl.model

    def stop(*args, **more):
        raise ValueError("no model in this test")

    monkeypatch.setattr(hooked_qwen2vl.model.HookedQwen2VL, "from_pretrained", stop)
    monkeypatch.chdir(tmp_path)
    draw, codes = random.Random(2), set()
    for _ in range(ARGUMENTS):
        arguments = [draw.choice(COMMANDS)]
        for _ in range(draw.randint(0, 4)):
            arguments.append(draw.choice(OPTIONS))
            arguments += [draw.choice(WORDS)] * (draw.random() < 0.8)
        arguments += {
            "scenes": ["--n", "1", "--out", str(tmp_path / "scenes")],
            "hallucination": ["--limit", "2"],
            "patch": ["--n", "2"],
        }.get(arguments[0], [])
        try:
            codes.add(main(arguments))
        except SystemExit as stopped:
            codes.add(stopped.code)
        except Exception as error:
            raise AssertionError(arguments) from error
        said = capsys.readouterr().err
        assert "Traceback" not in said, (arguments, said)
    assert codes <= {0, 2} and 2 in codes


def test_memory_is_flat_over_a_thousand_questions(model, tmp_path):
    """Resident memory after 300 and after 1,000 questions of a run."""
    process, seen = psutil.Process(), []
    work = answer_with(model)

    def measured(batch):
        seen.append(process.memory_info().rss)
        return list(work(batch))

    run("answers", lambda: iter(questions(1000)), measured, tmp_path, model=model, batch_size=4, window=64, progress=False)
    assert len(read_results(tmp_path)) == 2000
    early, late = max(seen[: len(seen) * 3 // 10]), max(seen)
    assert late - early < 60e6, (early, late)
