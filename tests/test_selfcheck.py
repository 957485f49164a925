"""The self-check passes on a right port and names the stage that is wrong."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import tiny_hf

import hooked_qwen2vl
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.cli import main
from hooked_qwen2vl.selfcheck import self_check
from hooked_qwen2vl.verification import photograph, report


@pytest.fixture()
def pair(processor):
    hf = tiny_hf(n_layers=2)
    return HookedQwen2VL.from_hf(tiny_hf(n_layers=2), processor), hf


def test_a_right_port_passes(pair):
    table = self_check(*pair)
    assert table["ok"].all() and len(table) == 2 + 1 + 2 + 1 + 3 * 2 + 1 + 1 + 2


@pytest.mark.parametrize(
    "weight, stage",
    [
        ("vision_encoder.blocks.1.ln2.w", "vision_encoder.blocks.1.hook_resid_post"),
        ("vision_projector.fc2.bias", "vision_projector.hook_out"),
        ("blocks.1.attn.k_proj.weight", "blocks.1.hook_attn_out"),
        ("blocks.0.mlp.down_proj.weight", "blocks.0.hook_mlp_out"),
        ("ln_final.w", "logits"),
    ],
)
def test_the_first_wrong_stage_is_named(pair, weight, stage):
    model, hf = pair
    with torch.no_grad():
        model.get_parameter(weight).mul_(1.1)
    table = self_check(model, hf)
    assert table[~table["ok"]].iloc[0]["stage"] == stage


def test_wrong_positions_of_a_video_are_named(pair, monkeypatch):
    model, hf = pair
    build = type(model.to_inputs("a")).build

    def late(*args, **more):
        inputs = build(*args, **more)
        inputs.position_ids[0][inputs.token_types == 2] += 1
        return inputs

    monkeypatch.setattr("hooked_qwen2vl.processor.Inputs.build", late)
    table = self_check(model, hf)
    assert table[~table["ok"]]["stage"].tolist() == ["positions of a video"]


def test_the_checkpoints_generation_settings_are_not_the_models(pair):
    """A repetition penalty or forbidden n-grams of `generation_config.json` change the reference's tokens, not its logits."""
    model, hf = pair
    theirs = hf.generation_config
    theirs.repetition_penalty, theirs.no_repeat_ngram_size, theirs.suppress_tokens = 3.0, 1, list(range(200))
    assert self_check(model, hf)["ok"].all() and hf.generation_config is theirs


def test_the_command_on_the_embedded_model(capsys):
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "every stage agrees" in said and 'backend="pil"' in said
    assert ("torchvision is not installed here" in said) == (find_spec("torchvision") is None)


@pytest.mark.slow
def test_the_report_that_a_user_sends_back(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["check", "--report", str(path), "--dtype", "float32"]) == 0
    found = json.loads(path.read_text())
    assert "wrote" in capsys.readouterr().out and found["ok"]
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["transformers"] and found["machine"]["threads"]
    hashes = found["checkpoint"]["sha256"]
    weights = Path(hooked_qwen2vl.__file__).parent / "scenes" / "checkpoint" / "model.safetensors"
    assert hashes["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest() and "config.json" in hashes
    (run,) = found["runs"]
    assert set(run["prompts"]) == {"drawing", "photograph"}
    for prompt in run["prompts"].values():
        assert len(prompt["stages"]) > 10 and all(stage["ok"] for stage in prompt["stages"])
        assert prompt["greedy_tokens"]["ours"] == prompt["greedy_tokens"]["reference"] and len(prompt["greedy_tokens"]["ours"]) == 32
        assert min(prompt["tokens_per_second"].values()) > 0
    assert run["prompts"]["photograph"]["image_tokens"] > run["prompts"]["drawing"]["image_tokens"]


def test_the_report_says_what_is_wrong_and_goes_on(pair, tmp_path):
    """A wrong weight in one precision, no memory in the other."""
    model, hf = pair
    with torch.no_grad():
        model.get_parameter("ln_final.w").mul_(1.1)

    def models(dtype):
        if dtype == "bfloat16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model, hf

    (tmp_path / "config.json").write_text("{}")
    found = report("name", tmp_path, models)
    wrong, lacking = found["runs"]
    assert not found["ok"] and not wrong["ok"] and not lacking["ok"] and "out of memory" in lacking["error"]
    stages = wrong["prompts"]["photograph"]["stages"]
    assert next(stage["stage"] for stage in stages if not stage["ok"]) == "logits"
    assert list(found["checkpoint"]["sha256"]) == ["config.json"] and photograph().size == (448, 299)
