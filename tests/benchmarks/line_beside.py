"""Qwen2.5-VL with an image here, in TransformerLens's bridge and in nnsight: forward, cache, one patching sweep, and who keeps the image.

    PYTHON tests/benchmarks/line_beside.py

PYTHON is the interpreter of an environment with TransformerLens, torchvision and nnsight beside torch and transformers: booting a
multimodal bridge installs packages, so never the project's own. One random model of `bench_line.py` for all, float32, one thread; two
images of one grid. Truth is transformers' own forward with the image: for each tool, seconds (the median of interleaved rounds), the
largest difference from the truth in units of its spread, and how far the truth without the image is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_line import both
from conftest import picture
from timing import interleaved
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import patch_sweep
from hooked_qwen2vl.selfcheck import reference_batch


def boot(hf: Any, tokenizer: Any) -> Any:
    """TransformerLens's bridge of the same weights, from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, tokenizer=tokenizer, device="cpu", dtype=torch.float32)


def tried(call: Callable[[], Any]) -> Any:
    """What a call gives, or its error in a line."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def away(values: Any, truth: torch.Tensor) -> str:
    """The largest difference from the truth, in units of its spread; or the error."""
    return values if isinstance(values, str) else f"{float((values - truth).abs().max() / truth.std()):.1e}"


@torch.no_grad()
def main() -> None:
    from nnsight import NNsight  # pyright: ignore[reportMissingImports] (of another environment)

    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=int, default=1, help="images of 77 tokens each in the prompt")
    options = parser.parse_args()
    model, hf = both("qwen2_5_vl")
    n_layers, right, wrong = model.cfg.n_layers, 11, 12
    prompts = [model.to_inputs("what is this?", images=[picture(320, 192, 10 * k + i) for i in range(options.images)]) for k in (1, 2)]
    clean, corrupted = (reference_batch(inputs) for inputs in prompts)
    print(f"{prompts[0].shape[1]} positions, {len(prompts[0].positions('image'))} of an image, {n_layers} layers")
    bridge, traced = boot(hf, model.processor.tokenizer), NNsight(hf)
    layers = traced.model.language_model.layers
    keys = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    image = {key: clean[key] for key in keys if key in clean}

    def fresh() -> None:
        """What a run left on transformers' model is forgotten."""
        for one in (hf, bridge.original_model):
            one.model.rope_deltas = None

    def reference(batch: dict[str, Any]) -> torch.Tensor:
        fresh()
        return hf(**batch, use_cache=False).logits

    truth = reference(clean)
    no_image = reference({key: value for key, value in clean.items() if key not in keys})
    print(f"truth without the image: {away(no_image, truth)} of the spread away\n")

    resid_pre: Any = patching.get_act_patch_resid_pre

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    # ---- forward and cache
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]

    def traced_run(**batch: Any) -> list[torch.Tensor]:
        fresh()
        with traced.trace(**batch, use_cache=False):
            kept: Any = []
            for layer in layers:
                kept.append(layer.output.save())
            kept = kept.save()
        return [one[0] if isinstance(one, tuple) else one for one in kept]

    def bridge_forward() -> torch.Tensor:
        fresh()
        return bridge(clean["input_ids"], attention_mask=clean["attention_mask"], **image)

    def bridge_cache() -> Any:
        fresh()
        return bridge.run_with_cache(clean["input_ids"], attention_mask=clean["attention_mask"], names_filter=names, **image)[1]

    states = traced_run(**clean)
    ours = model.run_with_cache(prompts[0], names_filter=names)[1]
    print("forward, logits:   here", away(model(prompts[0]), truth), "  bridge", away(tried(bridge_forward), truth))
    theirs = tried(bridge_cache)
    last = theirs if isinstance(theirs, str) else theirs[names[-1]]
    last = last[0] if isinstance(last, tuple) else last
    print("cache, last layer: here", away(ours[names[-1]], states[-1]), "  bridge", away(last, states[-1]))
    for what, call, beside in (
        ("forward / bridge", lambda: model(prompts[0]), bridge_forward),
        ("cache / bridge", lambda: model.run_with_cache(prompts[0], names_filter=names), bridge_cache),
        ("cache / nnsight", lambda: model.run_with_cache(prompts[0], names_filter=names), lambda: traced_run(**clean)),
    ):
        if isinstance(tried(beside), str):
            print(f"{what}: {tried(beside)}")
            continue
        pair = interleaved(call, beside)
        print(pair.row(0, what, ""))

    # ---- one sweep: resid_pre of the clean run into the corrupted one, some positions of every second layer
    some = [int(p) for p in prompts[0].positions("image")[:3]] + [prompts[0].shape[1] - 1]
    chosen = list(range(0, n_layers, 2))
    truths = torch.tensor([[_patched(hf, fresh, clean, corrupted, layer, at, metric) for at in some] for layer in chosen])

    start = time.process_time()
    values = patch_sweep(model, prompts[0], prompts[1], lambda logits: logits[:, -1, right] - logits[:, -1, wrong], progress=False).values[
        ..., 0
    ]
    print(
        f"\nsweep, patch_sweep, all {values.numel()} cells: {time.process_time() - start:.1f} s, {away(values[chosen][:, some], truths)} away"
    )
    encoded = [model.encode(one) for one in prompts]
    cache = model.run_with_cache(encoded[0], names_filter=lambda name: name.endswith("hook_resid_pre"))[1]
    start = time.process_time()
    values = resid_pre(model, encoded[1], cache, metric)
    print(
        f"sweep, transformer_lens.patching here, all cells: {time.process_time() - start:.1f} s, {away(values[chosen][:, some], truths)} away"
    )

    fresh()
    cache = tried(lambda: bridge.run_with_cache(clean["input_ids"], attention_mask=clean["attention_mask"], **image)[1])
    start = time.process_time()
    values = cache if isinstance(cache, str) else tried(lambda: resid_pre(bridge, corrupted["input_ids"], cache, metric))
    taken = time.process_time() - start
    found = values if isinstance(values, str) else values[chosen][:, some]
    blind = metric(reference({key: value for key, value in corrupted.items() if key not in keys}))
    print(f"sweep, transformer_lens.patching on the bridge: {taken:.1f} s, {away(found, truths)} away")
    if not isinstance(values, str):
        fresh()
        off = float((values[0, 0] - blind).abs() / truths.std())
        print(f"   a cell before the image, where patching changes nothing: {off:.1e} from a corrupted run without its image")

    entering = [_embedded(hf, fresh, clean), *states[:-1]]  # what enters each block
    start = time.process_time()
    values = torch.zeros(len(chosen), len(some))
    for row, layer in enumerate(chosen):
        for column, at in enumerate(some):
            fresh()
            with traced.trace(**corrupted, use_cache=False):
                stream = layers[layer].input.clone()
                stream[:, at] = entering[layer][:, at]
                layers[layer].input = stream
                logits = traced.lm_head.output[0, -1].save()
            values[row, column] = logits[right] - logits[wrong]
    print(f"sweep, nnsight, {values.numel()} cells: {time.process_time() - start:.1f} s, {away(values, truths)} away")

    # ---- generation
    def greedy(batch: dict[str, Any]) -> list[int]:
        fresh()
        return hf.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, -4:].tolist()

    def generated(with_cache: bool) -> list[int]:
        fresh()
        settings = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        return bridge.generate(clean["input_ids"], use_past_kv_cache=with_cache, **settings, **image)[0, -4:].tolist()

    mine = model.generate(prompts[0], max_new_tokens=4, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    print(f"\ngreedy tokens: transformers {greedy(clean)}, without the image {greedy({k: v for k, v in clean.items() if k not in keys})}")
    print(
        f"   here {mine[0, -4:].tolist()}; bridge: with a cache {tried(lambda: generated(True))}, without {tried(lambda: generated(False))}"
    )


def _embedded(hf: Any, fresh: Callable[[], None], batch: dict[str, Any]) -> torch.Tensor:
    return _streams(hf, fresh, batch)[0]


def _streams(hf: Any, fresh: Callable[[], None], batch: dict[str, Any]) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    hooks = [l.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone())) for l in hf.model.language_model.layers]
    fresh()
    hf(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def _patched(hf: Any, fresh: Callable[[], None], clean: dict, corrupted: dict, layer: int, at: int, metric: Callable) -> float:
    """One cell by a plain torch hook on transformers' model."""
    stream = _streams(hf, fresh, clean)[layer]

    def put(_: Any, args: tuple) -> tuple:
        patched = args[0].clone()
        patched[:, at] = stream[:, at]
        return (patched, *args[1:])

    hook = hf.model.language_model.layers[layer].register_forward_pre_hook(put)
    fresh()
    value = float(metric(hf(**corrupted, use_cache=False).logits))
    hook.remove()
    return value


if __name__ == "__main__":
    main()
