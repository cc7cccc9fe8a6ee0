"""DICOM series that nobody should segment: name -> files, as they lie in a folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from dicom_series_factory import SEG_CLASS, SeriesMaker

Files = list[tuple[str, bytes]]
Change = Callable[[list[FileDataset]], Iterable[FileDataset]]
STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"


def _maker(name: str = "bench", **options: Any) -> SeriesMaker:
    return SeriesMaker(name, shape=(24, 20, 8), **options)


def good_series() -> Files:
    """Return the files of a series that can be segmented."""
    return _files(_maker().slices())


def _files(slices: Iterable[FileDataset]) -> Files:
    found = []
    for number, dataset in enumerate(slices):
        stream = io.BytesIO()
        dataset.save_as(stream, write_like_original=False)
        found.append((f"IM{number:04d}.dcm", stream.getvalue()))
    return found


def bad_dicom() -> Iterator[tuple[str, Files]]:
    """Yield every bad series."""
    for name, change in {**_stacks(), **_attributes(), **_pixels()}.items():
        yield name, _files(change(_maker().slices()))
    for name, damage in _bytes().items():
        yield name, damage(good_series())
    yield "two series", _files([*_maker().slices(), *_maker("other").slices()])
    yield "a gantry tilted by 60 degrees", _files(_maker(tilt=(0.0, 4.4)).slices())
    yield "turned half-way", _files([*_maker().slices()[:4], *_turned(_maker().slices()[4:])])
    yield "one file name twice", [("IM.dcm", content) for _, content in good_series()]


def _each(**attributes: Any) -> Change:
    """Return a change that sets attributes of every slice; None removes one."""

    def change(slices: list[FileDataset]) -> list[FileDataset]:
        for dataset in slices:
            _set(dataset, attributes)
        return slices

    return change


def _one(number: int = 3, **attributes: Any) -> Change:
    """Return a change that sets attributes of one slice."""

    def change(slices: list[FileDataset]) -> list[FileDataset]:
        _set(slices[number], attributes)
        return slices

    return change


def _set(dataset: FileDataset, attributes: dict[str, Any]) -> None:
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)


def _turned(slices: list[FileDataset]) -> list[FileDataset]:
    for dataset in slices:
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    return slices


def _moved(millimetres: Sequence[float]) -> Change:
    def change(slices: list[FileDataset]) -> list[FileDataset]:
        for number, dataset in enumerate(slices):
            shift = millimetres[number % len(millimetres)]
            dataset.ImagePositionPatient = [
                *(float(value) for value in dataset.ImagePositionPatient[:2]),
                float(dataset.ImagePositionPatient[2]) + shift,
            ]
        return slices

    return change


def _aside(slices: list[FileDataset]) -> list[FileDataset]:
    x, y, z = (float(value) for value in slices[4].ImagePositionPatient)
    slices[4].ImagePositionPatient = [x + 9, y - 5, z]
    return slices


def _stacks() -> dict[str, Change]:
    return {
        "a slice missing": lambda slices: [*slices[:3], *slices[4:]],
        "two slices missing": lambda slices: [*slices[:3], *slices[5:]],
        "a slice twice": lambda slices: [*slices, slices[3]],
        "every slice twice": lambda slices: [*slices, *slices],
        "a single slice": lambda slices: slices[:1],
        "slice spacing that changes": _moved([0, 0.2, 0.9, 0.1, 1.6]),
        "a slice aside": _aside,
        "all slices in one place": _each(ImagePositionPatient=[0, 0, 0]),
        "two patients under one series": _one(PatientID="SOMEBODY ELSE", StudyInstanceUID=generate_uid()),
        "two frames of reference": _one(FrameOfReferenceUID=generate_uid()),
    }


def _attributes() -> dict[str, Change]:
    return {
        "no position": _each(ImagePositionPatient=None),
        "no position in one slice": _one(ImagePositionPatient=None),
        "a position of two numbers": _one(ImagePositionPatient=[1, 2]),
        "no orientation": _each(ImageOrientationPatient=None),
        "orientation of zeros": _each(ImageOrientationPatient=[0] * 6),
        "orientation not perpendicular": _each(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]),
        "orientation too long": _each(ImageOrientationPatient=[2, 0, 0, 0, 2, 0]),
        "no pixel spacing": _each(PixelSpacing=None),
        "pixel spacing zero": _each(PixelSpacing=[0, 0]),
        "pixel spacing negative": _each(PixelSpacing=[-1.5, 1.7]),
        "pixel spacing of a metre": _each(PixelSpacing=[1000, 1000]),
        "another pixel spacing in one slice": _one(PixelSpacing=[0.5, 0.5]),
        "fewer rows in one slice": _one(Rows=10),
        "no rows": _each(Rows=None),
        "zero columns": _each(Columns=0),
        "colour": _each(SamplesPerPixel=3, PhotometricInterpretation="RGB"),
        "a palette": _each(PhotometricInterpretation="PALETTE COLOR"),
        "many frames in a file": _each(NumberOfFrames=8),
        "segmentations only": _each(SOPClassUID=SEG_CLASS),
        "structure sets only": _each(SOPClassUID=STRUCTURES),
        "slope zero": _each(RescaleSlope=0),
        "slope that makes values infinite": _each(RescaleSlope="1e300"),
    }


def _pixels() -> dict[str, Change]:
    constant = np.full((20, 24), 7, np.uint16).tobytes()
    return {
        "no pixels": _each(PixelData=None),
        "no pixels in one slice": _one(PixelData=None),
        "half the pixels": _one(PixelData=bytes(480)),
        "more rows than pixels": _each(Rows=200),
        "constant": _each(PixelData=constant),
        "RLE that is none": _stored_as(RLELossless),
        "JPEG 2000 that is none": _stored_as(JPEG2000Lossless),
        "JPEG-LS that is none": _stored_as(JPEGLSLossless),
    }


def _stored_as(syntax: str) -> Change:
    def change(slices: list[FileDataset]) -> list[FileDataset]:
        for dataset in slices:
            dataset.PixelData = encapsulate([b"\x00\x01rubbish" * 20])
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = syntax
        return slices

    return change


def _bytes() -> dict[str, Callable[[Files], Files]]:
    def with_third(content: Callable[[bytes], bytes]) -> Callable[[Files], Files]:
        return lambda files: [(name, content(old) if n == 3 else old) for n, (name, old) in enumerate(files)]

    def every(content: Callable[[bytes], bytes]) -> Callable[[Files], Files]:
        return lambda files: [(name, content(old)) for name, old in files]

    explicit = b"1.2.840.10008.1.2.1\0"
    return {
        "a file cut in half": with_third(lambda old: old[: len(old) // 2]),
        "a file without its last bytes": with_third(lambda old: old[:-20]),
        "a file cut in its header": with_third(lambda old: old[:200]),
        "an empty file": with_third(lambda _: b""),
        "HTML for a file": with_third(lambda _: b"<html>not found</html>" * 30),
        "a text for every file": every(lambda _: b"hello " * 100),
        "noise for every file": every(lambda _: np.random.default_rng(4).bytes(3000)),
        "every file cut in half": every(lambda old: old[: len(old) // 2]),
        "without preamble and prefix": every(lambda old: old[140:]),
        "implicit in name, explicit in bytes": every(
            lambda old: old.replace(explicit, str(ImplicitVRLittleEndian).encode() + b"\0\0\0")
        ),
        "big endian in name, little in bytes": every(
            lambda old: old.replace(explicit, str(ExplicitVRBigEndian).encode() + b"\0")
        ),
        "a transfer syntax nobody knows": every(lambda old: old.replace(explicit, b"1.2.840.99999.1.2.1\0")),
        "a file of zeros": with_third(lambda old: bytes(len(old))),
        "files under names of text": lambda files: [(f"{n}.txt", b"x" * 99) for n, _ in files],
    }
