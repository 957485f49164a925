"""How everything here is measured: pairs side by side in one process, one thread if not told otherwise, medians with an interval.

1. The two sides of a pair are called in turn, the order swapped each time, after a warm-up of both. On the CPU the
   clock is the process's own CPU time, which other processes' turns do not enter; with several threads
   (OMP_NUM_THREADS), where files are read, and on CUDA, it is the wall's.
2. Each pair gives one ratio; the figure is the median ratio, its interval the 2.5 and 97.5 percentiles of the
   medians of 2,000 bootstrap samples of the pairs. What slows the machine slows both sides of a pair.
3. Memory is the process's peak of anonymous pages (or CUDA's allocator's) during a call, less what was held before,
   with an allocator that gives back at once what is freed.
4. Each model size, and each part that measures memory, has a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch

QUICK = "--quick" in sys.argv  # smaller prompts, five pairs
BUDGET = float(os.environ.get("BENCH_BUDGET", "45"))  # seconds a pair, five times at least
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' random models and prompts
THREADS = int(os.environ["OMP_NUM_THREADS"])
torch.set_num_threads(THREADS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        mark: the number of the goal it answers, 0 for what is only stated.
        what: what was measured, `ours / theirs` where it is a ratio.
        size: of the model and of the prompt.
        value, low, high: the figure and its interval, in `unit`.
        goal: what it should be, "≤ 1.15" or "≥ 1"; "" where it is only stated.
        note: the two sides' own medians, floors, remarks.
    """

    mark: int
    what: str
    size: str
    value: float
    unit: str = "×"
    low: float | None = None
    high: float | None = None
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> str:
        """ "yes", "no", "within noise" when the goal lies inside the interval, or "" without a goal."""
        if not self.goal:
            return ""
        sign, bound = self.goal.split()[0], float(self.goal.split()[1])
        good = (lambda x: x <= bound) if sign == "≤" else (lambda x: x >= bound)
        if good(self.value):
            return "yes"
        return "within noise" if any(x is not None and good(x) for x in (self.low, self.high)) else "no"


@dataclass
class Pair:
    """Seconds of every call of either side, and the other's figures from them."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def row(self, mark: int, what: str, size: str, goal: str = "", note: str = "", invert: bool = False) -> Row:
        """Time ratio ours / theirs; inverted it is the ratio of the speeds."""
        ratios = np.array(self.ours) / np.array(self.theirs)
        value, low, high = median_interval(1 / ratios if invert else ratios)
        seconds = f"ours {_seconds(np.median(self.ours))}, theirs {_seconds(np.median(self.theirs))}, {len(ratios)} pairs"
        return Row(mark, what, size, value, "×", low, high, goal, f"{seconds}{'; ' + note if note else ''}")


def interleaved(ours: Callable[[], Any], theirs: Callable[[], Any], n: int = 30, warm: int = 1, budget: float = BUDGET) -> Pair:
    """Times both in turn, n times or until the budget (seconds on the clock) is spent, but at least five times."""
    for _ in range(warm):
        ours(), theirs()
    pair = Pair()
    for number in range(5 if QUICK else n):
        sides = [(ours, pair.ours), (theirs, pair.theirs)]
        for call, times in sides if number % 2 else sides[::-1]:
            times.append(seconds(call))
        if number >= 4 and sum(pair.ours) + sum(pair.theirs) > budget:
            break
    return pair


def seconds(call: Callable[[], Any]) -> float:
    """Time of one call, the accelerator's work included."""
    gc.collect()
    start = now()
    kept = call()
    taken = now() - start
    del kept
    return taken


def now() -> float:
    """Seconds, by the clock that counts here (see above), once the accelerator has done what it was asked."""
    synchronise()
    return time.perf_counter() if DEVICE == "cuda" or THREADS > 1 else time.process_time()


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_interval(values: Any, samples: int = 2000) -> tuple[float, float, float]:
    """Median, and the 95 % bootstrap interval of it."""
    values = np.asarray(values)
    generator = np.random.default_rng(0)
    medians = np.median(values[generator.integers(0, len(values), (samples, len(values)))], axis=1)
    return float(np.median(values)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


# ---- memory ---------------------------------------------------------------------------------


def extra_memory(call: Callable[[], Any]) -> float:
    """Peak MiB above what was held before, what the call returns included; call it once before to warm up."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        synchronise()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / MIB
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()
    done.set()
    watcher.join()
    peak[0] = max(peak[0], anonymous())
    del kept
    return peak[0] - before


def anonymous() -> float:
    """MiB of anonymous pages of this process: what is its own, not mapped from files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def give_back_at_once() -> None:
    """From now on glibc maps every block above 64 kB by itself and unmaps it when freed: what is held is what is used.

    By default it keeps freed blocks up to 32 MB, more or fewer from run to run. Too slow for a process that is timed;
    for memory, the first thing a part does.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


# ---- what is written ------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where it ran, and with what."""
    names = ("torch", "transformers", "transformer_lens", "accelerate", "safetensors", "nnsight")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _cpu(),
        "threads": THREADS,
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: found for name in names if (found := _version(name))},
    }


def report(name: str, *parts: Callable[[], Iterable[Row]]) -> None:
    """Runs each part in a process of its own, prints its rows, and writes them for `run_all` to join: to the folder
    $BENCH_OUT, if it is set."""
    written = []
    for part in parts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows = process.submit(all_rows, part).result()
        written += [asdict(row) | {"met": row.met} for row in rows]
        print(*map(line, written[-len(rows) :]), sep="\n", flush=True)
        if "BENCH_OUT" in os.environ:
            content = json.dumps({"machine": machine(), "rows": written}, indent=1, ensure_ascii=False)
            (Path(os.environ["BENCH_OUT"]) / f"{name}.json").write_text(content)


def all_rows(part: Callable[[], Iterable[Row]]) -> list[Row]:
    return list(part())


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    digits = 3 if row["unit"] == "×" else 1
    interval = "" if row["low"] is None else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
    goal = f"{row['goal']} {row['unit']}" if row["goal"] else ""
    figure = f"{row['value']:.{digits}f} {row['unit']}{interval}"
    cells = (row["mark"] or "", row["what"], row["size"], figure, goal, row["met"], row["note"])
    return "| " + " | ".join(map(str, cells)) + " |"


def _cpu() -> str:
    with open("/proc/cpuinfo") as info:
        model = next((row.split(":")[1].strip() for row in info if row.startswith("model name")), platform.machine())
    widest = next((kind for kind in ("AMX", "AVX512", "AVX2") if kind in torch.backends.cpu.get_cpu_capability()), "")
    return f"{model}, {os.cpu_count()} cores, {widest or torch.backends.cpu.get_cpu_capability()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
