"""Comparing two runs of the same data: with the same number of threads to the bit, from separate commands to rounding.

The last bits of a float depend on the number of threads, the batch's shape and the processor, so that a test may ask for
equal bits only where both runs are one process's, or of processes with one thread each.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from threadpoolctl import threadpool_limits

ROUNDING = 1e-5  # measured between one thread and two, log-probabilities about -3: 1.2e-6
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def one_thread():
    """What runs inside has one thread, in torch, numpy and scikit-learn; afterwards as many as before. Also a decorator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def one_thread_environment() -> dict[str, str]:
    """The environment of a command with one thread."""
    return os.environ | ONE_THREAD


def same_rows(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """The same rows in the same order: everything but floats exactly, floats within ROUNDING."""
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=0, atol=ROUNDING)


def same_csv(ours: Path, theirs: Path) -> None:
    """`same_rows` of two files; a table without rows is the same header."""
    same_rows(pd.read_csv(ours), pd.read_csv(theirs))
