"""NIfTI files that nobody should segment: name -> (file name, bytes)."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

import nibabel as nib
import numpy as np

SHAPE = (19, 23, 17)
AFFINE = np.diag([1.5, 1.2, 3.0, 1.0])
Bad = tuple[str, str, bytes]


def image(shape: tuple[int, ...] = SHAPE, dtype: str = "int16", affine: np.ndarray = AFFINE) -> bytes:
    """Return a good NIfTI file, not compressed, of noise."""
    return encoded(np.random.default_rng(0).integers(-500, 500, shape).astype(dtype), affine)


def encoded(array: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image) -> bytes:
    """Return an array as a NIfTI file, not compressed."""
    return bytes(kind(array, affine, dtype=array.dtype).to_bytes())


def zipped(content: bytes) -> bytes:
    """Return bytes in gzip."""
    return gzip.compress(content, 6, mtime=0)


def changed(offset: int, form: str, *values: float, base: bytes | None = None) -> bytes:
    """Return a good file with some fields of its header replaced."""
    content = bytearray(base or image())
    struct.pack_into(f"<{form}", content, offset, *values)
    return bytes(content)


def bad_nifti(*, bombs: bool = True) -> Iterator[Bad]:
    """Yield every bad file; bombs take some seconds to make."""
    for name, content in _headers().items():
        yield name, "scan.nii.gz", zipped(content)
    for name, content in {**_streams(), **(_bombs() if bombs else {})}.items():
        yield name, "scan.nii.gz", content
    for name, content in _plain().items():
        yield name, "scan.nii", content


def _headers() -> dict[str, bytes]:
    """Return whole files whose header, or whose values, are wrong."""
    floats = np.random.default_rng(1).normal(size=SHAPE).astype("float32")
    return {
        **_sizes(),
        **_types(),
        **_values(floats),
        **_geometry(),
        **_offsets(),
    }


def _sizes() -> dict[str, bytes]:
    largest = 32767
    return {
        "header size 0": changed(0, "i", 0),
        "header size 347": changed(0, "i", 347),
        "header size negative": changed(0, "i", -348),
        "no dimensions": changed(40, "h", 0),
        "1-D": changed(40, "h", 1),
        "2-D": image((19, 23)),
        "2-D by its header only": changed(40, "h", 2),
        "a single slice": image((19, 23, 1)),
        "a single column": image((1, 23, 17)),
        "4-D": image((19, 23, 17, 3)),
        "5-D vectors": image((19, 23, 17, 1, 3)),
        "7-D": image((3, 3, 3, 2, 2, 2, 2)),
        "8 dimensions": changed(40, "h", 8),
        "negative dimensions": changed(40, "h", -3),
        "zero columns": changed(42, "h", 0),
        "negative rows": changed(44, "h", -23),
        "32767 slices": changed(46, "h", largest),
        "35 million million voxels": changed(42, "3h", largest, largest, largest),
        "one slice more than there is": changed(46, "h", SHAPE[2] + 1),
        "fewer slices than there are": changed(46, "h", SHAPE[2] - 8),
    }


def _types() -> dict[str, bytes]:
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with_alpha = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])
    colours["R"] = with_alpha["A"] = 1
    return {
        "RGB": encoded(colours),
        "RGBA": encoded(with_alpha),
        "complex64": image(dtype="complex64"),
        "complex128": image(dtype="complex128"),
        "128-bit floats": changed(70, "2h", 1536, 128, base=image() + bytes(14 * int(np.prod(SHAPE)))),
        "data type unknown": changed(70, "2h", 0, 0),
        "one bit per voxel": changed(70, "2h", 1, 1),
        "data type 9999": changed(70, "2h", 9999, 16),
        "data type float64, data int16": changed(70, "2h", 64, 64),
        "data type int32, data int16": changed(70, "2h", 8, 32),
        "data type int8, data int16": changed(70, "2h", 256, 8),
        "bits per voxel contradict the data type": changed(72, "h", 64),
        "big-endian header, little-endian sizes": _swapped_size(),
    }


def _swapped_size() -> bytes:
    content = bytearray(image())
    content[:4] = content[:4][::-1]
    return bytes(content)


def _values(floats: np.ndarray) -> dict[str, bytes]:
    def having(value: float, *index: slice | int) -> bytes:
        array = floats.copy()
        array[index or (3, 4, 5)] = value
        return encoded(array)

    return {
        "one NaN": having(np.nan),
        "one infinite voxel": having(np.inf),
        "one voxel of minus infinity": having(-np.inf),
        "a slice of NaN": having(np.nan, slice(None), slice(None), 4),
        "NaN everywhere": having(np.nan, slice(None)),
        "constant": encoded(np.full(SHAPE, -1000, "int16")),
        "zeros": encoded(np.zeros(SHAPE, "uint8")),
        "float64 beyond float32": encoded(np.where(floats > 1, 1e300, floats).astype("float64")),
        "slope infinite": changed(112, "f", np.inf),
        "slope makes values infinite": changed(112, "2f", 3e38, 0),
        "intercept NaN": changed(112, "2f", 1, np.nan),
        "intercept infinite": changed(112, "2f", 1, np.inf),
    }


def _geometry() -> dict[str, bytes]:
    def sform(*rows: list[float]) -> bytes:
        return changed(280, "12f", *[value for row in rows for value in row])

    def quaternion(*values: float) -> bytes:
        return changed(256, "3f", *values, base=changed(252, "2h", 1, 0))

    turned = np.array([[0, -1.2, 0, 9], [1.5, 0, 0, 5], [0, 0, 3.0, 2], [0, 0, 0, 1]])
    both = nib.Nifti1Image(np.random.default_rng(2).integers(0, 9, SHAPE).astype("int16"), AFFINE)
    both.set_sform(AFFINE, 1)
    both.set_qform(turned, 1)
    mirrored = nib.Nifti1Image(both.get_fdata().astype("int16"), AFFINE)
    mirrored.set_sform(AFFINE, 1)
    mirrored.set_qform(np.diag([-1.5, 1.2, 3.0, 1.0]), 1)
    shifted = nib.Nifti1Image(both.get_fdata().astype("int16"), AFFINE)
    shifted.set_sform(AFFINE, 1)
    shifted.set_qform(AFFINE + np.outer([0, 0, 7, 0], [0, 0, 0, 1]), 1)
    x, y, z = [1.5, 0, 0, 0], [0, 1.2, 0, 0], [0, 0, 3, 0]
    return {
        "sform of NaN": sform([np.nan, 0, 0, 0], y, z),
        "sform origin NaN": sform([1.5, 0, 0, np.nan], y, z),
        "sform origin infinite": sform([1.5, 0, 0, np.inf], y, z),
        "sform infinite": sform(x, [0, np.inf, 0, 0], z),
        "sform of zeros": sform([0] * 4, [0] * 4, [0] * 4),
        "sform with a zero column": sform(x, y, [0, 0, 0, 0]),
        "sform singular": sform([1.5, 1.5, 0, 0], y, [0, 0, 3, 0]),
        "sform with two equal columns": sform([1, 1, 0, 0], [1, 1, 0, 0], z),
        "sform sheared": sform([1.5, 0, 0.6, 0], y, z),
        "sform of kilometres": sform([1.5e6, 0, 0, 0], [0, 1.2e6, 0, 0], [0, 0, 3e6, 0]),
        "sform spacing differs from pixdim": sform([2.5, 0, 0, 0], y, z),
        "qform turned against the sform": bytes(both.to_bytes()),
        "qform mirrored against the sform": bytes(mirrored.to_bytes()),
        "qform shifted by two slices": bytes(shifted.to_bytes()),
        "quaternion longer than 1": quaternion(2, 2, 2),
        "quaternion NaN": quaternion(np.nan, 0, 0),
        "qform offset NaN": changed(268, "f", np.nan, base=changed(252, "2h", 1, 0)),
        "spacing zero": changed(84, "f", 0.0),
        "spacing negative": changed(84, "f", -1.5),
        "spacing NaN": changed(88, "f", np.nan),
        "spacing infinite": changed(88, "f", np.inf),
        "spacing of a micrometre": changed(80, "3f", 1e-6, 1e-6, 1e-6),
        "spacing of a metre": changed(80, "3f", 1000, 1000, 1000),
        "unit metre": changed(123, "B", 1),
        "unit micrometre": changed(123, "B", 3),
    }


def _offsets() -> dict[str, bytes]:
    second = encoded(np.ones((4, 5, 6), "int16"), kind=nib.Nifti2Image)
    return {
        "magic of a two-file image": changed(344, "4s", b"ni1\0"),
        "magic unknown": changed(344, "4s", b"abc\0"),
        "magic empty (Analyze)": changed(344, "4s", b"\0\0\0\0"),
        "voxels begin inside the header": changed(108, "f", 100),
        "voxels begin behind the end": changed(108, "f", 2**28),
        "voxels begin before the file": changed(108, "f", -352),
        "voxels begin at NaN": changed(108, "f", np.nan),
        "voxels begin at infinity": changed(108, "f", np.inf),
        "voxels begin at half a byte": changed(108, "f", 352.5),
        "NIfTI-2, negative size": changed(24, "q", -19, base=second),
        "NIfTI-2, 2**60 voxels": changed(24, "3q", 2**20, 2**20, 2**20, base=second),
    }


def _streams() -> dict[str, bytes]:
    """Return files that are damaged as files: cut, of another kind, or bombs."""
    good = zipped(image())
    cuts = {f"cut after {length} bytes": good[:length] for length in (1, 9, 17, 100, 348, 1000)}
    shares = {f"cut to {share} %": good[: len(good) * share // 100] for share in (25, 50, 75, 99)}
    ends = {f"without its last {count} byte(s)": good[:-count] for count in (1, 4, 8)}
    wrong_sum = good[:-8] + struct.pack("<I", zlib.crc32(image()) ^ 1) + good[-4:]
    return {
        **cuts,
        **shares,
        **ends,
        "header only": zipped(image()[:352]),
        "half the voxels, gzip whole": zipped(image()[: len(image()) // 2]),
        "wrong checksum": wrong_sum,
        "wrong length in the trailer": good[:-4] + struct.pack("<I", 5),
        "bytes behind the end": good + b"rubbish" * 9,
        "a second image behind the first": good + good,
        "gzipped twice": zipped(good),
        "gzip of nothing": zipped(b""),
        "gzip of text": zipped(b"hello " * 500),
        "not compressed in spite of its name": image(),
        **_other_kinds(),
    }


def _other_kinds() -> dict[str, bytes]:
    archive, tar, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("scan.nii", image())
    with tarfile.open(fileobj=tar, mode="w:gz") as out:
        member = tarfile.TarInfo("scan.nii")
        member.size = len(image())
        out.addfile(member, io.BytesIO(image()))
    np.save(array, np.zeros(SHAPE))
    return {
        "empty": b"",
        "one byte": b"\x1f",
        "HTML": b"<!doctype html><title>404</title>" * 20,
        "text": b"patient,scan\n1,2\n" * 30,
        "a zip": archive.getvalue(),
        "a tar.gz": tar.getvalue(),
        "an array of numpy": array.getvalue(),
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(500),
        "a pickle": b"\x80\x04\x95" + bytes(500),
        "zeros": bytes(5000),
        "noise": np.random.default_rng(3).bytes(5000),
        "an NRRD": b"NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n" + bytes(16),
    }


def _bombs() -> dict[str, bytes]:
    return {
        "bomb: 1 GB of one value": _streamed(_head((1000, 1000, 1000)), 10**9),
        "bomb: 27 GB announced": zipped(_head((3000, 3000, 3000)) + bytes(10**6)),
        "bomb: 1 GB behind the voxels": _streamed(image(), 10**9),
        "bomb: 1 GB before the voxels": _streamed(changed(108, "f", 2**30)[:352], 2**30),
    }


def _head(shape: tuple[int, int, int]) -> bytes:
    """Return the header of an image of this shape, uint8."""
    head = bytearray(image((4, 5, 6), "uint8")[:352])
    struct.pack_into("<3h", head, 42, *shape)
    return bytes(head)


def _streamed(head: bytes, zeros: int) -> bytes:
    """Return gzip of a header and so many zeros, without holding them."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(head)]
    block = bytes(10**6)
    parts += [packer.compress(block) for _ in range(zeros // len(block))]
    return b"".join([*parts, packer.flush()])


def _plain() -> dict[str, bytes]:
    """Return files that claim not to be compressed."""
    good = image()
    return {
        "plain, empty": b"",
        "plain, cut in the header": good[:200],
        "plain, header only": good[:352],
        "plain, cut in half": good[: len(good) // 2],
        "plain, without its last byte": good[:-1],
        "plain, gzip in spite of its name": zipped(good),
        "plain, 8 kB behind the end": good + bytes(8192),
        "plain, HTML": b"<html>" * 100,
    }
