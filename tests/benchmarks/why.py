"""The measurements of docs/why.md: one patching sweep in bare hooks, in nnsight and here.

    python tests/benchmarks/why.py [--nnsight PYTHON] [--rounds 5]

1. Two images of one grid, a question whose answer differs: what transformers' processor gives for them is written once, and
   all tools read that. float32, one thread.
2. Each round runs every tool once, in a process of its own, in turn. Seconds are processor seconds of one thread, of the
   sweep alone (no loading): on a machine shared with other work the clock on the wall says little.
3. All sweeps are compared cell by cell. Lines are those of the function `sweep` that hold code, imports aside.
4. Then each mistake is made in each tool: does it raise, and if not, how far is the number from the right one?
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import CHECKPOINT, counterfactual_pairs, sample
from hooked_qwen2vl.selfcheck import reference_batch

HERE = Path(__file__).parent
SCRIPTS = {"hf_hooks": "why_hf_hooks.py", "nnsight": "why_nnsight.py", "ours": "why_ours.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnsight", help="a Python that has nnsight, torch and transformers; without it nnsight is left out")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pythons = {"hf_hooks": sys.executable, "nnsight": options.nnsight, "ours": sys.executable}
    tools = [tool for tool, python in pythons.items() if python]
    with tempfile.TemporaryDirectory() as folder:
        n_cells = prepare(Path(folder))
        seconds: dict[str, list[float]] = {}
        for number in range(options.rounds):
            for tool in tools[number % len(tools) :] + tools[: number % len(tools)]:
                run(pythons[tool], tool, folder, mistakes=number == 0)
                for name, result in parts(tool, folder).items():
                    seconds.setdefault(name, []).append(result["seconds"])
            if number == 0:
                first = {name: result for tool in tools for name, result in parts(tool, folder).items()}
                found = {tool: torch.load(Path(folder) / f"{tool}.pt")["mistakes"] for tool in tools}
    report(first, seconds, found, n_cells)


def prepare(folder: Path) -> int:
    """Writes prompts.pt; returns the number of cells."""
    model = HookedQwen2VL.from_pretrained("scenes")
    item, partner = counterfactual_pairs(1, seed=1, domain="shapes", category="attribute", grid=(4, 4))[0]
    clean, corrupted = (model.to_inputs(item.question, images=[scene.image]) for scene in (item, partner))
    larger = sample(1, seed=2, domain="shapes", category="attribute", grid=(6, 8))[0]
    torch.save(
        {
            "model": str(CHECKPOINT),
            "clean": reference_batch(clean),
            "corrupted": reference_batch(corrupted),
            "other": reference_batch(model.to_inputs(larger.question, images=[larger.image])),
            "right": model.to_single_token(item.answer),
            "wrong": model.to_single_token(partner.answer),
        },
        folder / "prompts.pt",
    )
    print(f"{item.question} {item.answer} / {partner.answer}; {clean.shape[1]} positions, {model.cfg.n_layers} layers")
    return clean.shape[1] * model.cfg.n_layers


def run(python: str, tool: str, folder: str, mistakes: bool) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [python, str(HERE / SCRIPTS[tool]), folder] + ["--mistakes"] * mistakes
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SCRIPTS[tool]} failed:\n{done.stderr}")


def parts(tool: str, folder: str) -> dict[str, dict]:
    """Each sweep of a tool's file."""
    stored = torch.load(Path(folder) / f"{tool}.pt")
    return {tool: stored} if tool != "ours" else {name: stored[name] for name in ("ours", "transformer_lens")}


def lines(tool: str) -> int:
    """Lines of the tool's sweep that hold code, its docstring left out."""
    name = "sweep_of_transformer_lens" if tool == "transformer_lens" else "sweep"
    source = (HERE / SCRIPTS.get(tool, SCRIPTS["ours"])).read_text(encoding="utf-8")
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    body = source.splitlines()[function.body[1].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in body)


def report(first: dict, seconds: dict, found: dict, n_cells: int) -> None:
    with open("/proc/loadavg") as load:
        busy = load.read().split()[0]
    print(f"{n_cells} cells; {platform.machine()}, {os.cpu_count()} cores, load {busy}; torch {torch.__version__}\n")
    reference = first["hf_hooks"]["effect"]
    print(f"{'sweep':<18}{'lines':>6}{'median s':>10}{'min':>8}{'max':>8}{'rounds':>8}   largest difference from bare hooks")
    for name, taken in seconds.items():
        median = float(torch.tensor(taken).median())
        difference = float((first[name]["effect"] - reference).abs().max())
        print(f"{name:<18}{lines(name):>6}{median:>10.2f}{min(taken):>8.2f}{max(taken):>8.2f}{len(taken):>8}   {difference:.1e}")
    print(f"\nlogit differences of the sweep: {float(reference.min()):.2f} to {float(reference.max()):.2f}\n")
    for mistake in found["hf_hooks"]:
        print(f"{mistake}: {found['hf_hooks'][mistake][2]}")
        for tool, cases in found.items():
            if mistake in cases:
                right, wrong, _ = cases[mistake]
                print(f"  {tool:<10} right {right:.4f}   {wrong if isinstance(wrong, str) else format(wrong, '.4f')}")


if __name__ == "__main__":
    main()
