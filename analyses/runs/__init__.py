"""Runs over data sets that can be killed at any moment, shared between processes, and resumed."""

from hooked_qwen2vl.moved import moved_names

from .engine import (
    Failure,
    Part,
    Run,
    describe_model,
    prepare,
    read_composition,
    read_failures,
    read_part,
    read_results,
    refreshed,
    run,
    seeded,
    this_share,
    wait_for_all,
    work_on,
    write_rows,
)

__getattr__ = moved_names(__name__)

__all__ = [
    "Failure",
    "Part",
    "Run",
    "describe_model",
    "prepare",
    "read_composition",
    "read_failures",
    "read_part",
    "read_results",
    "run",
    "seeded",
    "refreshed",
    "this_share",
    "wait_for_all",
    "work_on",
    "write_rows",
]
