"""What counting firings costs: the median, over rounds, of its time over the mean of the plain forwards before and after it.

    python tests/benchmarks/bench_neurons.py [--model scenes] [--rounds 40] [--batch 16]

Both run tower and decoder on one batch of pictures of the embedded world; both stop before the unembedding, which
makes the plain forward as cheap as it gets. Aim: at most 1.1.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from analyses.domain_neurons import FiringCounter
from hooked_qwen2vl import HookedQwen2VL
from hooked_qwen2vl.scenes import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model = HookedQwen2VL.from_pretrained(options.model)
    items = sample(options.batch, split="train")  # all domains in every batch: the most groups to count apart
    inputs = model.to_inputs([item.question for item in items], images=[[item.image] for item in items])
    domains, counter = [item.domain for item in items], FiringCounter(model)
    runs = {"plain": lambda: model(inputs, return_type=None), "counting": lambda: counter.add(model, inputs, domains)}
    order = ["plain", "counting", "plain"]
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    ratios: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(options.rounds + 3):
        spent = {name: [] for name in clocks}
        for run in order:
            began = {name: clock() for name, clock in clocks.items()}
            runs[run]()
            for name, clock in clocks.items():
                spent[name].append(clock() - began[name])
        if number >= 3:
            for name, (before, counting, after) in spent.items():
                ratios[name].append(2 * counting / (before + after))
    for name, found in ratios.items():
        low, median, high = statistics.quantiles(found, n=4)
        print(f"{name:9} time: counting / plain, median {median:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
