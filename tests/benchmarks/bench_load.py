"""from_pretrained of the published geometry (4.4 GB, bfloat16, random weights): time and memory of its own.

Every load is a fresh interpreter with its imports done; cold means that the files' pages were dropped before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import geometries
import numpy as np
import timing
from timing import Row, report

LOAD = """
import sys, time, torch, transformers, hooked_qwen2vl
from hooked_qwen2vl import HookedQwen2VL
from transformers import Qwen2VLForConditionalGeneration
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
before, start = anonymous(), time.perf_counter()
if sys.argv[2] == "ours":
    model = HookedQwen2VL.from_pretrained(sys.argv[1])
else:
    model = Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
loaded = time.perf_counter() - start
own = anonymous() - before
for weight in model.parameters():
    weight.data.view(-1).view(torch.uint8)[::4096].max()
print(loaded, time.perf_counter() - start, own)
"""


def rows(name: str, n: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        geometries.reference(name).save_pretrained(folder)
        size = f"{name}, {sum(file.stat().st_size for file in Path(folder).glob('*.safetensors')) / 1e9:.1f} GB"
        warm, cold = measure(folder, n, cold=False), measure(folder, n, cold=True)
    ours, theirs = warm["ours"], warm["theirs"]
    yield Row(3, "from_pretrained: anonymous memory", size, float(np.median(ours[:, 2])), "MiB", goal="≤ 95.4",
              note=f"100 MB; transformers {np.median(theirs[:, 2]):.0f} MiB")  # fmt: skip
    for what, figures, goals in (("cold", cold, ("≤ 1.2", "")), ("warm", warm, ("≤ 1.0", ""))):
        for column, (part, goal) in enumerate(zip(("", ", and a byte of every page read"), goals)):
            pair = timing.Pair(figures["ours"][:, column].tolist(), figures["theirs"][:, column].tolist())
            yield pair.row(3, f"from_pretrained {what}{part} / transformers", size, goal)


def measure(folder: str, n: int, cold: bool) -> dict[str, np.ndarray]:
    """[run, (seconds to load, and to have read, MiB)] of either side, in turn."""
    found: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    if not cold:
        load(folder, "theirs")
    for number in range(n):
        for whose in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            if cold:
                drop_pages(folder)
            found[whose].append(load(folder, whose))
    return {whose: np.array(values) for whose, values in found.items()}


def load(folder: str, whose: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", LOAD, folder, whose], capture_output=True, text=True, check=True)
    return [float(value) for value in run.stdout.split("\n")[-2].split()]


def drop_pages(folder: str) -> None:
    """Asks the system to forget the files' pages."""
    for path in Path(folder).glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def commands() -> Iterator[Row]:
    """Wall time of starting up, in fresh interpreters."""
    yield started(8, "import hooked_qwen2vl", [sys.executable, "-c", "import hooked_qwen2vl"])
    yield started(8, "from hooked_qwen2vl import HookedQwen2VL", [sys.executable, "-c", "from hooked_qwen2vl import HookedQwen2VL"])
    yield started(8, "import torch, transformer_lens, alone", [sys.executable, "-c", "import torch, transformer_lens"])
    yield started(8, "hooked-qwen2vl --help", [str(Path(sys.executable).with_name("hooked-qwen2vl")), "--help"], "≤ 1")


def started(mark: int, what: str, command: list[str], goal: str = "") -> Row:
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        taken.append(time.perf_counter() - start)
    value, low, high = timing.median_interval(taken[1:])
    return Row(mark, what, "", value, "s", low, high, goal, "wall, warm")


if __name__ == "__main__":
    report("load", commands, partial(rows, "small" if timing.QUICK else "2b", 5))
