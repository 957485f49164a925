"""Sums over a data set by domain, source, module and layer: of counts or other arrays.

A term is {domain, source, module, layer, n, values}: `values` is an array, and `n` is added up to divide its sum by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

KEYS = ("domain", "source", "module", "layer")
Sums = dict[tuple, tuple[int, np.ndarray]]


def add_up(terms: Iterable[Mapping[str, Any]]) -> Sums:
    """(domain, source, module, layer) -> (sum of n, sum of values), in the order of first appearance."""
    sums: Sums = {}
    for term in terms:
        key, values = tuple(term[name] for name in KEYS), np.asarray(term["values"])
        n, total = sums.get(key, (0, np.zeros_like(values)))
        sums[key] = n + term["n"], total + values
    return sums
