"""Loops that several threads share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mshub.nnunet.kernels import in_parts, value_counts


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100])
def test_parts_cover_a_range_once_and_in_order(count: int) -> None:
    parts = in_parts(lambda begin, end: list(range(begin, end)), count)
    assert [place for part in parts for place in part] == list(range(count))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("step", [1, 2], ids=["whole", "every second"])
def test_values_are_counted_as_numpy_counts_them(dtype: Any, axes: tuple[int, ...], step: int) -> None:
    array = np.random.default_rng(3).integers(0, np.iinfo(dtype).max, (7, 9, 11), dtype, endpoint=True)
    array = array.transpose(axes)[:, ::step]
    assert value_counts(array).tolist() == np.bincount(array.ravel(), minlength=np.iinfo(dtype).max + 1).tolist()


def test_an_empty_array_has_no_values() -> None:
    assert not value_counts(np.zeros((0, 4), np.uint8)).any()
