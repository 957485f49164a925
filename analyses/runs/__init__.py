"""Runs over data sets that can be killed at any moment, shared between processes, and resumed."""

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
    run,
    seeded,
    settled,
    this_share,
    wait_for_all,
    work_on,
    write_rows,
)

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
    "settled",
    "this_share",
    "wait_for_all",
    "work_on",
    "write_rows",
]
