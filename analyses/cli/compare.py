"""Compares models on the same questions, aligned by relative depth: lens, trajectory, patching, heads.

Without --with, the model is compared with its "twin": its own text decoder, exported as a Qwen2 (or Qwen3) and run by TransformerLens.
With --tuned, activations of the model are patched into its fine-tuned version, and the other way round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from analyses.cli.outputs import Outputs
from analyses.cli.shared import add_model, add_out, at_least_one, load_model, loading, readable
from hooked_qwen2vl.protocols import Model

NAME = "compare"
HELP = "compare with other models: lens, trajectories, patching and heads on the same questions"
EXAMPLES = (
    "",
    "--with gpt2 --with qwen=Qwen/Qwen2-0.5B-Instruct",
    "--tuned adapter/",
)
PRINTED = ["model", "condition", "items", "right", "right_of_candidates", "answer_prob", "first_depth", "settled_depth",
           "leaves_scene_depth", "reaches_last_depth"]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="[NAME=]MODEL",
                        help="another model: 'twin', or a folder or hub id of a text model or one of this line; may be repeated")  # fmt: skip
    parser.add_argument("--tuned", metavar="MODEL", help="a fine-tuned version of --model, or a LoRA adapter of it (a PEFT folder)")
    parser.add_argument("--data", default="scenes", help="scenes, a .jsonl file or a folder (default: scenes)")
    parser.add_argument("--items", type=int, default=12, metavar="N", help="questions (default 12)")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    at_least_one(options, "items")
    from analyses.data.examples import examples

    questions = readable(examples(options.data, options.items, keep_bad=True))
    model = load_model(options)
    return _tuned(options, model, questions) if options.tuned else _beside_others(options, model, questions)


def _beside_others(options: argparse.Namespace, model: Model, questions: list) -> int:
    from analyses.experiments.compare import CONDITIONS, compare_models, text_agreement

    name, agreement = str(options.model), None
    models = {name: model} | dict(_named(spec, options, model) for spec in options.others or ["twin"])
    if "twin" in models:
        agreement = text_agreement(model, models["twin"], [example.question for example in questions])
    shown = {"image": any(e.images for e in questions), "words": any(e.item for e in questions), "neither": True}
    result = compare_models(models, questions, [c for c in CONDITIONS if shown[c]])
    table, heads = result.to_dataframe(), result.heads[name]
    with Outputs(options, NAME, questions=[example.id for example in questions]) as out:
        out.table("compare.csv", table)
        out.table("compare_curves.csv", result.curves())
        result.plot(out.path("compare.png"))
        if heads.image:
            out.table("heads.csv", heads.to_dataframe())
            heads.plot(out.path("heads.png"))
        if agreement is not None:
            out.table("text_twin.csv", agreement)
        out.say(table[PRINTED].to_string(index=False, float_format=lambda x: f"{x:.2f}", na_rep=""))
        out.say(f"\n{result.skipped} of {len(questions)} questions left out: a tokenizer cannot tell their candidates apart")
        if heads.image:
            out.say(f"\nthe heads of {name}, on text and among image tokens")
            out.say(heads.sharing().to_string(index=False, float_format=lambda x: f"{x:.3f}"))
        differ = agreement is not None and not agreement["ok"].all()
        if agreement is not None:
            out.say(f"\ntext decoder and twin {'differ' if differ else 'agree'}: by {agreement['share'].max():.1e} of the spread")
    return int(differ)


def _tuned(options: argparse.Namespace, model: Model, questions: list) -> int:
    from analyses.model_patching import ACTIVATIONS, patch_between_models

    tuned = _qwen(options.tuned, options)
    prompts = [model.to_inputs(example.question, images=list(example.images)) for example in questions]
    with Outputs(options, NAME, questions=[example.id for example in questions]) as out:
        for direction, source, target in (("base_into_tuned", model, tuned), ("tuned_into_base", tuned, model)):
            for activation in ACTIVATIONS:
                result = patch_between_models(source, target, prompts, activation)
                out.table(f"{direction}_{activation}.csv", result.to_dataframe())
                result.plot(out.path(f"{direction}_{activation}.png"))
                table = result.to_dataframe().pivot(index="place", columns="span", values="explained").loc[list(result.places)]
                out.say(f"\n{direction.replace('_', ' ')}, {activation}: explained share, {result.explained.shape[-1]} prompts")
                out.say(table.to_string(float_format=lambda x: f"{x:.3f}", na_rep=""))
    return 0


def _named(spec: str, options: argparse.Namespace, model: Model) -> tuple[str, Any]:
    """(name, model) for NAME=MODEL or MODEL.

    A Qwen2-VL, Qwen2.5-VL or Qwen3-VL becomes a HookedQwen2VL, a text model TransformerLens's bridge, and "twin" the model's twin.

    Raises:
        ValueError: another model with a vision tower.
    """
    from transformers import AutoConfig

    from hooked_qwen2vl.config import FAMILIES

    if spec == "twin":
        return spec, _twin(model)
    label, _, place = spec.rpartition("=")
    with loading(place):
        config = None if place == "scenes" or _is_adapter(place) else AutoConfig.from_pretrained(place)
    if config is None or config.model_type in FAMILIES:
        other = _qwen(place, options)
    elif hasattr(config, "vision_config"):
        raise ValueError(f"{place} is a {config.model_type}: besides Qwen2-VL, Qwen2.5-VL and Qwen3-VL, only text models can be compared.")
    else:
        with loading(place):
            other = _bridge(place, options.device or "cpu", options.dtype or "float32")
    return label or place, other


def _qwen(place: str, options: argparse.Namespace) -> Any:
    """The HookedQwen2VL of a folder or hub id; for the folder of an adapter, --model with the adapter."""
    from hooked_qwen2vl.model import HookedQwen2VL

    base, adapter = (options.model, place) if _is_adapter(place) else (place, None)
    with loading(place):
        return HookedQwen2VL.from_pretrained(base, dtype=options.dtype, device=options.device, adapter=adapter)


def _is_adapter(place: str) -> bool:
    return (Path(place) / "adapter_config.json").exists() and not (Path(place) / "config.json").exists()


def _twin(model: Model) -> Any:
    """The model's text decoder, exported as a Qwen2 (or Qwen3) and run by TransformerLens."""
    with tempfile.TemporaryDirectory() as folder:
        place = model.export_text_model(Path(folder) / "text")
        return _bridge(str(place), model.cfg.device, str(model.cfg.dtype).removeprefix("torch."))


def _bridge(name: str, device: str, dtype: str) -> Any:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device, dtype=getattr(torch, dtype))
