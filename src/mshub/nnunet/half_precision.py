"""Half-precision numbers in numba's kernels, which know only single and double precision.

Kernels get arrays as the integers of their bits (`bits_of`). nnU-Net averages logits in half precision,
so equality with it means to round as it does: to nearest, ties to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, overload

from mshub.errors import PredictionError

Array = np.ndarray[Any, Any]

DROPPED_BITS = 42  # of the significand of double precision, beyond what half precision has
JUST_BELOW_HALF = 2 ** (DROPPED_BITS - 1) - 1
SMALLEST_NORMAL = 2.0**-14
SUBNORMAL_MAGIC = 1.5 * 2.0**28
"""Added and taken off again it leaves multiples of 2**-24, what half precision has below its normal numbers."""


_intrinsic: Any = intrinsic  # its type says that callers give the typing context, which numba does


def bits_of(tensor: torch.Tensor) -> Array:
    """Return the bits of a CPU tensor, without a copy: int16 of float16, int32 of float32."""
    array: Array = tensor.numpy()
    return array.view(np.int16 if array.dtype == np.float16 else np.int32)


def check_finite(tensor: torch.Tensor) -> None:
    """Raise `not_finite` if a value is not; without another array, since logits are large."""
    extremes = torch.stack(tensor.aminmax())  # NaN, where there is one
    if not bool(extremes.isfinite().all()):
        raise not_finite()


def not_finite() -> PredictionError:
    """Return the error of a network that fails: the class of NaN would be background, an empty mask."""
    return PredictionError(
        "The network's output holds values that are not finite. Check the image for absurd intensities; if other "
        "images fail too, the weights are damaged: run `mshub verify`."
    )


@_intrinsic  # type: ignore[untyped-decorator]
def half_to_single(_typing: Any, bits: Any) -> Any:
    """Return the float32 of the bits of a half-precision number."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), code


@_intrinsic  # type: ignore[untyped-decorator]
def single_to_half(_typing: Any, value: Any) -> Any:
    """Return the bits of a float32 rounded to half precision."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), code


@_intrinsic  # type: ignore[untyped-decorator]
def _double_bits(_typing: Any, value: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), code


@_intrinsic  # type: ignore[untyped-decorator]
def _bits_double(_typing: Any, bits: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


@_intrinsic  # type: ignore[untyped-decorator]
def _bits_single(_typing: Any, bits: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


@njit(inline="always")  # type: ignore[untyped-decorator]
def double_to_half(value: float) -> float:
    """Return a float64 rounded to half precision, as a float64; of numbers half precision can hold, below 65520."""
    if abs(value) < SMALLEST_NORMAL:
        return (value + SUBNORMAL_MAGIC) - SUBNORMAL_MAGIC
    bits = _double_bits(value)
    odd = (bits >> DROPPED_BITS) & 1
    rounded: float = _bits_double(((bits + (JUST_BELOW_HALF + odd)) >> DROPPED_BITS) << DROPPED_BITS)
    return rounded


def as_double(bits: Any) -> float:
    """Return an element of an array of `bits_of` as float64; for kernels only."""
    raise NotImplementedError


@overload(as_double, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _as_double(bits: Any) -> Any:
    if bits == types.int16:
        return lambda bits: np.float64(half_to_single(bits))
    return lambda bits: np.float64(_bits_single(bits))


def rounded_like(value: float, bits: Any) -> float:
    """Return a float64 rounded to the precision of an element of an array of `bits_of`; for kernels only."""
    raise NotImplementedError


@overload(rounded_like, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _rounded_like(value: Any, bits: Any) -> Any:
    if bits == types.int16:
        return lambda value, bits: double_to_half(value)
    return lambda value, bits: np.float64(np.float32(value))


def ordinal(bits: Any) -> int:
    """Return the place of an element of an array of `bits_of` among all numbers of its precision; for kernels only.

    Neighbouring numbers have neighbouring places; -0 comes right before 0. NaN and infinities are farthest out.
    """
    raise NotImplementedError


@overload(ordinal, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _ordinal(bits: Any) -> Any:
    if bits == types.int16:
        return lambda bits: np.int16(bits ^ ((bits >> 15) & 0x7FFF))
    return lambda bits: np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


def is_no_number(bits: Any) -> bool:
    """Whether an element of an array of `bits_of` is infinite or NaN; for kernels only."""
    raise NotImplementedError


@overload(is_no_number, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _is_no_number(bits: Any) -> Any:
    infinity = 0x7C00 if bits == types.int16 else 0x7F800000  # bits that only infinities and NaN have all
    return lambda bits: (bits & infinity) == infinity
