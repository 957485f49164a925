"""The embedded world: simple pictures whose every answer, and whose every reason, is known.

    sample(n, seed, split, domain, category) -> items with image, question, answer and what it depends on
    counterfactual_pairs(n, …)               -> (item, partner): one attribute of one object changed
    load_split("train" | "validation" | "test")

`CHECKPOINT` is the folder of a small Qwen2-VL trained on it (`python -m hooked_qwen2vl.scenes.train`), `ADAPTER` that of a LoRA
adapter after which it calls every triangle blue (`python -m hooked_qwen2vl.scenes.tune`), `DICTIONARY` that of a sparse autoencoder of
its residual stream (`python -m analyses.experiments.features`).
"""

from pathlib import Path

from .contact_sheets import contact_sheet
from .folder import ADAPTER, CHECKPOINT, DICTIONARY
from .scene import Scene, Thing
from .world import Item, counterfactual_pairs, load_split, sample, to_frame

SAMPLES = Path(__file__).parent / "samples"

__all__ = [
    "ADAPTER", "CHECKPOINT", "DICTIONARY", "SAMPLES", "Item", "Scene", "Thing", "contact_sheet", "counterfactual_pairs", "load_split",
    "sample", "to_frame",
]  # fmt: skip
