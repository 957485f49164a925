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
import tqdm
from IPython.core.interactiveshell import InteractiveShell
from tiny import tiny_processor, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

# Narrow, that a notebook takes seconds: as many layers and heads as GPT-2, whose numbers the cells name, or as few as they allow.
LAYERS_AND_HEADS = {
    "Activation_Patching_in_TL_Demo": (4, 4),
    "Attribution_Patching_Demo": (4, 4),
    "Exploratory_Analysis_Demo": (12, 7),  # head 81 is in its twelfth layer
    "Patchscopes_Generation_Demo": (12, 4),
}


def size(notebook: Path, name: str) -> swap.SimpleNamespace:
    """Of the model of this name."""
    n_layers, n_heads = (2, 4) if "2L" in name else LAYERS_AND_HEADS.get(notebook.stem, (12, 12))
    return swap.SimpleNamespace(
        n_layers=n_layers, d_model=16 * n_heads, n_heads=n_heads, d_head=16, d_mlp=64 * n_heads, d_vocab=20480, n_ctx=1024
    )


# What cannot be had here, and what to put in its place so that the cells that follow have what they need; a cell that holds it
# counts as failed, whatever it does then.
INSTEAD = {
    "refactor_factored_attn_matrices=True": "refactor_factored_attn_matrices=False",
    "tokenizer.bos_token_id": "tokenizer.encode('.')[0]",
}


def cells_of(notebook: Path) -> list[str]:
    """The code cells, without the lines that are the shell's (`%pip install`)."""
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
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
    sys.modules["tqdm.notebook"] = tqdm  # there is no browser to show a bar in
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "autoreload")
    shell.showtraceback = lambda *args, **kwargs: None
    outcomes = {}
    for number, cell in enumerate(cells):
        wanting = [was for was in INSTEAD if was in cell]
        for was in wanting:
            cell = cell.replace(was, INSTEAD[was])
        plotly.io.renderers.default = "json"
        done = shell.run_cell(cell)
        error = done.error_before_exec or done.error_in_exec
        said = "; ".join(wanting) if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        outcomes[f"demos/{notebook.name}::{number}"] = ["failed" if said else "passed", said]
    return outcomes


if __name__ == "__main__":
    done = run(Path(sys.argv[1]), "--text" not in sys.argv)
    Path(sys.argv[2]).write_text(json.dumps(done, indent=1))
