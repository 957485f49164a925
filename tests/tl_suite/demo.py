"""One of TransformerLens's notebooks, cell by cell, with the model of `swap.py` in its bridge's place.

    python demo.py NOTEBOOK RESULTS.json [--text]

Every cell is run, whatever became of those before it. `--text`: no prompt has an image.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")

import plotly.io
import swap
from IPython.core.interactiveshell import InteractiveShell
from tiny import tiny_processor, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

# Narrow, that a notebook takes seconds: as many layers and heads as GPT-2, which most notebooks name by number, in others few.
FEW = ("Activation_Patching_in_TL_Demo", "Attribution_Patching_Demo")


def size(notebook: Path, name: str) -> swap.SimpleNamespace:
    n_layers, n_heads = (2, 4) if "2L" in name else (4, 4) if notebook.stem in FEW else (12, 12)
    return swap.SimpleNamespace(
        n_layers=n_layers, d_model=16 * n_heads, n_heads=n_heads, d_head=16, d_mlp=64 * n_heads, d_vocab=10240, n_ctx=1024
    )


# Refused by name, and a cell that holds it counts as failed; without it the cells that follow would have no model.
REFUSED = ("refactor_factored_attn_matrices=True", "refactor_factored_attn_matrices=False")


def cells_of(notebook: Path) -> list[str]:
    """The code cells, without the lines that are the shell's (`%pip install`)."""
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    cells = [cell.replace(was, instead) for cell in cells for was, instead in [REFUSED]]
    return [re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.M) for cell in cells]


def run(notebook: Path, image: bool) -> dict[str, list[str]]:
    """Cell -> [outcome, what was said]."""
    cells = cells_of(notebook)
    words = sorted(set(re.findall(r" ?[A-Za-z]+", "\n".join(cells))))  # each one token, as GPT-2's tokenizer has most of them
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(words)
    processor = tiny_processor(tokenizer=tokenizer)

    def boot(name, *args, dtype=None, **kwargs):
        return swap.seeing(size(notebook, name), dtype, processor=processor, image=image)

    TransformerBridge.boot_transformers = TransformerBridge.boot_tl_legacy = staticmethod(boot)
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "autoreload")
    shell.showtraceback = lambda *args, **kwargs: None
    outcomes = {}
    for number, cell in enumerate(cells):
        plotly.io.renderers.default = "json"
        done = shell.run_cell(cell)
        error = done.error_before_exec or done.error_in_exec
        said = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcomes[f"demos/{notebook.name}::{number}"] = ["passed" if error is None else "failed", said]
    return outcomes


if __name__ == "__main__":
    done = run(Path(sys.argv[1]), "--text" not in sys.argv)
    Path(sys.argv[2]).write_text(json.dumps(done, indent=1))
