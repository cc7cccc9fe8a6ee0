"""The frames of a DICOM SEG: where each says it lies, which slice of its series that is, and the voxels it holds.

A frame covers one whole slice, for one segment. It is put on the slice it refers to, or else on the one at its
position, flipped or transposed where its rows and columns run another way. Its corners decide: where they are not the
corners of the slice, the frame is refused, whatever the reason (another size, spacing, tilt or place between slices).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.encaps import generate_pixel_data_frame
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from mshub.dicom_series import SeriesStack
from mshub.errors import GeometryError, LabelError
from mshub.geometry import Array

#: How far a frame may lie from the slice it is put on, in voxels of the series: rounded positions reach hundredths (and
#: what ITK makes of an uneven stack a tenth); half a voxel would be the neighbour.
PLACE_TOLERANCE = 0.15

_MACROS = {
    "SegmentIdentificationSequence": "ReferencedSegmentNumber",
    "PlanePositionSequence": "ImagePositionPatient",
    "PlaneOrientationSequence": "ImageOrientationPatient",
    "PixelMeasuresSequence": "PixelSpacing",
}

_Vector = npt.NDArray[np.float64]


def damaged(found: str) -> LabelError:
    """Return the error for an object that lacks what every segmentation has."""
    return LabelError(
        f"The DICOM SEG is damaged. Found: {found}. Expected: the attributes of a complete segmentation. How to fix: "
        "export it again."
    )


def refused_kind(found: str, fix: str) -> LabelError:
    """Return the error for an object that is whole, and of a kind that is not read."""
    return LabelError(
        f"The DICOM object is no segmentation that can be read. Found: {found}. Expected: a BINARY segmentation. "
        f"How to fix: {fix}."
    )


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: whose it is, and where it says it lies (LPS, mm); None or empty where it does not say."""

    segment: int
    sources: tuple[str, ...]
    position: _Vector | None
    orientation: _Vector | None
    spacing: _Vector | None


def read_frames(dataset: Dataset) -> list[Frame]:
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    items = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    declared = int(dataset.get("NumberOfFrames") or 0)
    if not items or len(items) != declared:
        raise damaged(f"descriptions of {len(items)} frames, NumberOfFrames {declared}")
    common = {name: _macro(shared, name) for name in _MACROS}
    return [_frame(item, common) for item in items]


def _macro(item: Dataset, sequence: str) -> Any:
    """Return the value of a functional group of one frame, or of all; None where it is not there."""
    items = item.get(sequence)
    return items[0].get(_MACROS[sequence]) if items else None


def _frame(item: Dataset, common: Mapping[str, Any]) -> Frame:
    own = {name: _macro(item, name) for name in _MACROS}
    number, position, orientation, spacing = (
        common[name] if own[name] in (None, "") else own[name] for name in _MACROS
    )
    sources = tuple(
        str(source.ReferencedSOPInstanceUID)
        for derivation in item.get("DerivationImageSequence") or []
        for source in derivation.get("SourceImageSequence") or []
    )
    return Frame(int(number), sources, _numbers(position, 3), _numbers(orientation, 6), _numbers(spacing, 2))


def _numbers(value: Any, count: int) -> _Vector | None:
    if value is None or len(value) == 0:
        return None
    numbers = np.array([float(part) for part in value])
    if numbers.size != count or not np.isfinite(numbers).all():
        raise damaged(f"{list(value)}, where {count} numbers tell where a frame lies")
    return numbers


@dataclass(frozen=True, eq=False)
class Slices:
    """The slices of a series: where their pixels lie in space (LPS, mm), and which is which.

    Attributes
    ----------
    axes : ndarray, shape (2, 3)
        Unit vectors along a row (columns ascend) and along a column (rows ascend).
    normal : ndarray, shape (3,)
        Unit vector along which slices ascend.
    spacing_xyz : ndarray, shape (3,)
        Between columns, rows and slices.
    positions : ndarray, shape (n, 3)
        Pixel (0, 0) of each slice.
    numbers : dict of str to int
        SOPInstanceUID -> slice.
    shape : (int, int, int)
        Columns, rows, slices.
    """

    axes: _Vector
    normal: _Vector
    spacing_xyz: _Vector
    positions: _Vector
    numbers: dict[str, int]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, stack: SeriesStack) -> Slices:
        orientation = np.array([float(part) for part in stack.headers[0].ImageOrientationPatient])
        axes = orientation.reshape(2, 3) / np.linalg.norm(orientation.reshape(2, 3), axis=1, keepdims=True)
        return cls(
            axes,
            np.cross(axes[0], axes[1]),
            np.array(stack.grid.spacing_xyz_mm),
            np.array([[float(part) for part in header.ImagePositionPatient] for header in stack.headers]),
            {str(header.get("SOPInstanceUID") or ""): k for k, header in enumerate(stack.headers)},
            stack.slices_shape,
        )

    def nearest(self, position: _Vector) -> int:
        """Return the slice whose plane is nearest to a point."""
        return int(np.abs((self.positions - position) @ self.normal).argmin())

    def indices(self, points: _Vector, k: int) -> _Vector:
        """Return points, shape (m, 3), in columns and rows of slice `k` and slices beside it."""
        frame = np.vstack([self.axes, self.normal])
        indices: _Vector = (points - self.positions[k]) @ frame.T / self.spacing_xyz
        return indices


def placed(frame: Frame, mask_xy: Array, slices: Slices) -> tuple[int, Array]:
    """Return the slice of a frame, and its mask as that slice's pixels lie."""
    named = [slices.numbers[uid] for uid in frame.sources if uid in slices.numbers]
    if frame.position is None or frame.orientation is None or frame.spacing is None:
        if len(set(named)) != 1:
            raise damaged("a frame that neither refers to one slice of the series nor says where it lies")
        if mask_xy.shape != slices.shape[:2]:
            raise damaged("frames that are turned against the slices and do not say so")
        return named[0], mask_xy
    near = slices.nearest(frame.position)
    k = near if near in named or not named else named[0]
    return k, _turned(frame, mask_xy, slices, k)


def _turned(frame: Frame, mask_xy: Array, slices: Slices, k: int) -> Array:
    """Return the mask with its axes along those of slice `k`: flipped or transposed, nothing else."""
    corners = slices.indices(_corners(frame, mask_xy.shape), k)
    whole = np.rint(corners).astype(int)
    along_x = whole[1] - whole[0]
    turned = mask_xy.T if along_x[0] == 0 else mask_xy
    steps = (whole[1] + whole[2] - 2 * whole[0])[:2]
    expected = np.array(turned.shape) - 1
    origin = np.where(steps < 0, expected, 0)
    fits = (np.abs(steps) == expected).all() and (whole[0] == [*origin, 0]).all() and turned.shape == slices.shape[:2]
    off = float(np.abs(corners - whole).max())
    straight = not whole[:, 2].any() and 0 in along_x[:2]
    if not (fits and straight and off <= PLACE_TOLERANCE):
        raise _elsewhere(corners, slices, k)
    flips = tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)
    return turned[flips]


def _corners(frame: Frame, shape_xy: tuple[int, ...]) -> _Vector:
    """Return three corner pixels of a frame, LPS, mm: the first, the last of its row, the last of its column."""
    position, orientation, spacing = frame.position, frame.orientation, frame.spacing
    if position is None or orientation is None or spacing is None:
        raise damaged("a frame that does not say where it lies")
    row = orientation[:3] * spacing[1] * (shape_xy[0] - 1)
    column = orientation[3:] * spacing[0] * (shape_xy[1] - 1)
    return np.stack([position, position + row, position + column])


def _elsewhere(corners: _Vector, slices: Slices, k: int) -> GeometryError:
    found = "; ".join(f"({x:.2f}, {y:.2f}, {z:+.2f})" for x, y, z in corners)
    columns, rows, _ = slices.shape
    return GeometryError(
        f"a frame of the DICOM SEG does not lie on a slice of its series: three of its corners are at {found} in "
        f"columns, rows and slices from slice {k}, expected corners at 0 or {columns - 1}, 0 or {rows - 1}, "
        f"and 0 (within {PLACE_TOLERANCE:g}); draw it on the series itself, or "
        "resample it to the series and export it again"
    )


def read_masks(dataset: Dataset, count: int, rows: int, columns: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield the frames one by one, ``[row, column]``."""
    if int(dataset.BitsAllocated) != 1:
        raise damaged(f"{dataset.BitsAllocated} bits per voxel, where a BINARY segmentation has 1")
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    pixels = dataset.get("PixelData")
    if not pixels:
        raise damaged("no PixelData")
    if syntax == RLELossless:
        return _run_length_masks(pixels, count, rows, columns)
    if syntax == ExplicitVRBigEndian or (syntax is not None and syntax.is_compressed and syntax.is_encapsulated):
        raise refused_kind(f"voxels stored as {syntax.name}", "export it uncompressed")
    return _packed_masks(pixels, count, rows, columns)


def _packed_masks(pixels: bytes, count: int, rows: int, columns: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield frames of one bit per voxel, lowest bit first; a frame begins where the last one ended, even in a byte."""
    size = rows * columns
    if len(pixels) < -(-count * size // 8):
        raise damaged(f"{len(pixels):,} bytes of voxels, where {count} frames need {-(-count * size // 8):,}")
    packed = np.frombuffer(pixels, dtype=np.uint8)
    for first in range(0, count * size, size):
        bits = np.unpackbits(packed[first // 8 : -(-(first + size) // 8)], bitorder="little")
        yield bits[first % 8 : first % 8 + size].reshape(rows, columns).view(bool)


def _run_length_masks(pixels: bytes, count: int, rows: int, columns: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield frames that are packed to bits one by one and then run-length encoded (PS3.5 8.2.2, one RLE segment)."""
    length = -(-rows * columns // 8)
    encoded = list(generate_pixel_data_frame(pixels, count))
    if len(encoded) != count:
        raise damaged(f"the voxels of {len(encoded)} frames, where {count} are described")
    for item in encoded:
        number, first = np.frombuffer(item, dtype="<u4", count=2).tolist()
        if number != 1:
            raise damaged(f"{number} run-length segments in a frame, where one bit per voxel makes 1")
        packed = np.frombuffer(_run_lengths(item[first:], length), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[: rows * columns]
        yield bits.reshape(rows, columns).view(bool)


def _run_lengths(encoded: bytes, length: int) -> bytes:
    """Decode `length` bytes of PackBits (PS3.5 annex G.3)."""
    decoded, at = bytearray(), 0
    while len(decoded) < length:
        if at >= len(encoded):
            raise damaged(f"{len(decoded):,} bytes of a run-length encoded frame, where {length:,} are needed")
        head = encoded[at]
        if head < 128:
            decoded += encoded[at + 1 : at + head + 2]
            at += head + 2
        elif head > 128:
            decoded += encoded[at + 1 : at + 2] * (257 - head)
            at += 2
        else:
            at += 1
    return bytes(decoded[:length])
