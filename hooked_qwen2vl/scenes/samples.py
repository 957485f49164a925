"""The shipped sample pictures: `python -m hooked_qwen2vl.scenes.samples` draws them again."""

from __future__ import annotations

import json
from pathlib import Path

from . import SAMPLES
from .world import sample

# file name -> what `sample` is asked for
_CHOICE = {
    "shapes": {"domain": "shapes", "category": "attribute", "seed": 23, "grid": (6, 6)},
    "glyphs": {"domain": "glyphs", "category": "ocr", "seed": 18, "grid": (5, 7)},
    "charts": {"domain": "charts", "category": "comparison", "seed": 7, "grid": (6, 6)},
}


def write_samples(folder: Path = SAMPLES) -> None:
    """Writes <name>.png and samples.json: file, question, answer, counterfactual answer and caption of each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, request in _CHOICE.items():
        (item,) = sample(1, **request)
        item.image.save(folder / f"{name}.png")
        entries.append(
            {"image": f"{name}.png", "question": item.question, "answer": item.answer, "domain": item.domain,
             "category": item.category, "counterfactual_answer": item.counterfactual.answer, "caption": item.caption,
             "depends_on": [thing.box for thing in item.depends_on]}
        )  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    write_samples()
