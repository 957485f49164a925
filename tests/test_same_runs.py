"""The comparison of runs that the runs' tests stand on: what rounding may do passes, anything else does not."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from same_runs import ROUNDING, one_thread, same_csv, same_rows

TABLE = pd.DataFrame({"id": ["a", "b"], "token": [150_000, 7], "p": [-3.5, float("nan")], "flips": [[1, 2], []], "spread": [[0.5], [0.25]]})


@pytest.mark.parametrize("column, value", [("p", -3.5 + ROUNDING / 5), ("spread", [0.5 - ROUNDING / 5])])
def test_rounding_passes(column, value):
    other = TABLE.copy()
    other.at[0, column] = value
    same_rows(TABLE, other)


@pytest.mark.parametrize(
    "column, value",
    [("id", "c"), ("token", 150_001), ("p", -3.5 + 2 * ROUNDING), ("p", float("nan")), ("flips", [1, 3]), ("flips", [1]),
     ("spread", [0.5 + 2 * ROUNDING])],
)  # fmt: skip
def test_anything_else_does_not(column, value):
    other = TABLE.copy()
    other.at[0, column] = value
    with pytest.raises(AssertionError):
        same_rows(TABLE, other)


@pytest.mark.parametrize(
    "other", [TABLE[::-1], TABLE[:1], TABLE.rename(columns={"p": "q"}), TABLE[["token", "id", "p", "flips", "spread"]]]
)
def test_rows_columns_and_their_order_count(other):
    with pytest.raises(AssertionError):
        same_rows(TABLE, other)


def test_files(tmp_path):
    for name, shift in (("a", 0), ("b", ROUNDING / 5), ("c", 2 * ROUNDING)):
        TABLE.assign(p=TABLE["p"] + shift).to_csv(tmp_path / name, index=False)
    TABLE[:0].to_csv(tmp_path / "empty", index=False)
    same_csv(tmp_path / "a", tmp_path / "b")
    same_csv(tmp_path / "empty", tmp_path / "empty")
    for other in ("c", "empty"):
        with pytest.raises(AssertionError):
            same_csv(tmp_path / "a", tmp_path / other)


def test_one_thread_inside_and_as_many_as_before_outside():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
