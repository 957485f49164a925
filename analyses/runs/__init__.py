"""Runs over data sets that can be killed at any moment, resumed, and shared between processes."""

from hooked_qwen2vl.moved import moved_names

from .engine import (
    Failure,
    Run,
    Shard,
    describe_model,
    prepare,
    read_composition,
    read_failures,
    read_results,
    read_shard,
    refreshed,
    run,
    seeded,
    this_rank,
    wait_for_all,
    work_on,
    write_rows,
)

__getattr__ = moved_names(__name__)

__all__ = [
    "Failure",
    "Shard",
    "Run",
    "describe_model",
    "prepare",
    "read_composition",
    "read_failures",
    "read_shard",
    "read_results",
    "run",
    "seeded",
    "refreshed",
    "this_rank",
    "wait_for_all",
    "work_on",
    "write_rows",
]
