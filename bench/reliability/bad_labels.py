"""Labels nobody should learn from: what is sent with ``PUT /datastore/label`` for one image."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bad_nifti import _streamed, changed, encoded, zipped

NAMES = {"liver": 1, "spleen": 2}
_NRRD = b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 9 9 9\nencoding: raw\n"


@dataclass(frozen=True)
class BadLabel:
    """One request.

    Attributes
    ----------
    name : str
        What is wrong with it.
    content : bytes
        The file.
    filename : str
    query : dict
        Beside ``image``, or instead of it.
    params : str
        The form's ``params``.
    """

    name: str
    content: bytes
    filename: str = "label.nii.gz"
    query: dict[str, str] = field(default_factory=dict)
    params: str = json.dumps({"label_info": [{"name": name, "idx": value} for name, value in NAMES.items()]})


def good_label(shape: tuple[int, int, int], affine: np.ndarray, values: tuple[int, ...] = (1, 2)) -> np.ndarray:
    """Return a label with some voxels of each value."""
    array = np.zeros(shape, np.uint8)
    for value in values:
        array[2 + value, 3:9, 4:8] = value
    return array


def bad_labels(shape: tuple[int, int, int], affine: np.ndarray) -> Iterator[BadLabel]:
    """Yield every bad label of an image of this shape and affine."""
    good = good_label(shape, affine)
    for name, content in {**_grids(good, affine), **_voxels(good, affine), **_files(encoded(good, affine))}.items():
        yield BadLabel(name, content)
    whole = zipped(encoded(good, affine))
    for name, filename, content in _kinds(whole):
        yield BadLabel(name, content, filename)
    for name, segments in _segments().items():
        yield BadLabel(name, whole, params=json.dumps({"label_info": segments}))
    for name, params in {"params no JSON": "{oops", "params a list": "[1]", "no names at all": "{}"}.items():
        yield BadLabel(name, whole, params=params)
    for name, query in _queries().items():
        yield BadLabel(name, whole, query=query)


def _grids(good: np.ndarray, affine: np.ndarray) -> dict[str, bytes]:
    def moved(change: Callable[[np.ndarray], Any]) -> bytes:
        other = affine.copy()
        change(other)
        return zipped(encoded(good, other))

    x, y, z = good.shape
    return {
        "a slice less": zipped(encoded(good[:, :, :-1], affine)),
        "a row more": zipped(encoded(np.zeros((x, y + 1, z), np.uint8), affine)),
        "axes swapped": zipped(encoded(good.transpose(1, 0, 2), affine)),
        "half the resolution": zipped(encoded(good[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1]))),
        "shifted by a voxel": moved(lambda other: other.__setitem__((0, 3), other[0, 3] + other[0, 0])),
        "shifted by a millimetre": moved(lambda other: other.__setitem__((2, 3), other[2, 3] + 1)),
        "mirrored": moved(lambda other: other.__imul__(np.diag([-1, 1, 1, 1]) + (1 - np.eye(4)))),
        "spacing of 1 mm": zipped(encoded(good, np.eye(4))),
        "turned by a degree": zipped(encoded(good, _turn(1.0) @ affine)),
        "the identity for an affine": zipped(encoded(good, np.diag([-1.0, -1.0, 1.0, 1.0]))),
        "2-D": zipped(encoded(good[:, :, 5], affine)),
        "4-D": zipped(encoded(good[..., None].repeat(2, 3), affine)),
    }


def _turn(degrees: float) -> np.ndarray:
    angle, turn = np.radians(degrees), np.eye(4)
    turn[0, 0] = turn[1, 1] = np.cos(angle)
    turn[0, 1], turn[1, 0] = -np.sin(angle), np.sin(angle)
    return turn


def _voxels(good: np.ndarray, affine: np.ndarray) -> dict[str, bytes]:
    def having(dtype: str, value: float) -> bytes:
        array = good.astype(dtype)
        array[8, 8, 8] = value
        return zipped(encoded(array, affine))

    return {
        "a value without a name": having("uint8", 3),
        "the value 999": having("int16", 999),
        "a negative value": having("int16", -1),
        "a value of 2**31": having("uint32", 2**31),
        "whole numbers as floats": having("float32", 1),
        "fractions": having("float32", 0.5),
        "float64": having("float64", 2),
        "NaN": having("float32", np.nan),
        "infinite": having("float32", np.inf),
        "complex": having("complex64", 1),
        "halves by a slope": zipped(changed(112, "2f", 0.5, 0, base=encoded(good, affine))),
    }


def _files(plain: bytes) -> dict[str, bytes]:
    whole = zipped(plain)
    head = bytearray(plain[:352])
    head[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
    return {
        "empty": b"",
        "cut in half": whole[: len(whole) // 2],
        "without its checksum": whole[:-8],
        "a wrong checksum": whole[:-8] + bytes(4) + whole[-4:],
        "HTML": b"<html>" * 50,
        "bomb: 1 GB of zeros": _streamed(bytes(head), 10**9),
    }


def _kinds(whole: bytes) -> Iterator[tuple[str, str, bytes]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w"):
        pass
    yield "an archive without files", "label.zip", archive.getvalue()
    yield "an archive named as an image", "label.nii.gz", archive.getvalue()
    yield "a program", "label.py", b"print('hello')\n"
    yield "a name without an ending", "label", whole
    yield "a DICOM file", "label.dcm", bytes(128) + b"DICM" + bytes(400)
    yield (
        "an NRRD cut short",
        "label.nrrd",
        _NRRD + b"\n" + bytes(9),
    )
    yield (
        "an NRRD with its voxels in another file",
        "label.nrrd",
        _NRRD + b"data file: /etc/passwd\n\n",
    )
    yield (
        "a MetaImage with its voxels in another file",
        "label.mha",
        b"ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n",
    )
    yield "a header without its voxels", "label.mhd", b"ObjectType = Image\nNDims = 3\n"


def _segments() -> dict[str, Any]:
    liver, spleen = {"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}
    return {
        "no segments": [],
        "segments that are a text": "liver",
        "segments that are a number": 3,
        "a segment that is a text": ["liver", "spleen"],
        "a name nobody knows": [liver, {"name": "unicorn", "idx": 2}],
        "a name left out": [liver],
        "a name twice": [liver, {"name": "liver", "idx": 2}],
        "a number twice": [liver, {"name": "spleen", "idx": 1}],
        "a number as text": [{"name": "liver", "idx": "1"}, spleen],
        "a number as a fraction": [{"name": "liver", "idx": 1.0}, spleen],
        "a number that is true": [{"name": "liver", "idx": True}, spleen],
        "a number below zero": [{"name": "liver", "idx": -1}, spleen],
        "background as liver": [{"name": "liver", "idx": 0}, spleen],
        "a segment without a name": [{"idx": 1}, spleen],
        "a name that is a list": [{"name": ["liver"], "idx": 1}, spleen],
    }


def _queries() -> dict[str, dict[str, str]]:
    return {
        "an image nobody knows": {"image": "nobody"},
        "an empty image": {"image": ""},
        "a tag that is a path": {"tag": "../../evil"},
        "an absolute tag": {"tag": "/etc"},
        "a tag of dots": {"tag": ".."},
        "a tag with a NUL": {"tag": "a\0b"},
        "a tag of 5000 letters": {"tag": "a" * 5000},
    }
