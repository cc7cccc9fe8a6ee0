"""Rebuild MSHub's sample data: small CT-like abdomen phantoms with reference labels.

    python sample-data/generate.py                                 # write images/, labels/, dicom/ and manifest.json
    python sample-data/generate.py --check                         # exit 1 unless the files here equal a regeneration
    python sample-data/generate.py --training 40 --out DIR         # an nnU-Net raw dataset made of other seeds

No patient is behind these files. A phantom is painted in patient coordinates (RAS+, millimetres) from warped ellipsoids
and then seen through a scanner grid with its own size, spacing and orientation: every file of a case agrees in space.

Only operations that IEEE 754 rounds exactly (+ - * / sqrt) touch the voxels, random numbers are scaled raw generator
output, and the compressed files carry neither a time nor a name: the same bytes come out on every machine. A zlib of
another make may pack the same content differently, which is why ``--check`` compares ``.gz`` files unpacked.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

GENERATOR_VERSION = "1.0"
BASE_SEED = 20260
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney_right": 3, "kidney_left": 4, "liver_lesion": 5}
DICOM_CASE = "phantom_01"
FIRST_TRAINING_SEED = 10_000
MIN_LABEL_VOXELS = 60

EDGE_MM = 4.0  # width of the ramp from outside to inside a structure: partial volume at the scanner's resolution
WARP_CELL_MM = 48.0
TEXTURE_CELL_MM = 22.0
LATTICE_POINTS = 24
SOFT_TISSUE_MAX_HU, STORED_OFFSET = 3071, 1024

FloatArray = npt.NDArray[np.float64]
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class CaseSpec:
    """How a phantom is drawn and scanned.

    Attributes
    ----------
    codes
        Direction in which each array axis runs, e.g. ``"LPS"``.
    spacing_mm
        Voxel size along the array axes.
    quaternion
        (w, x, y, z) of the rotation from the axes named by `codes` to the scanner's; need not be normalised.
    """

    name: str
    seed: int
    codes: str
    spacing_mm: Vector
    quaternion: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)


SAMPLES = (
    CaseSpec("phantom_01", 1, "LPS", (2.8, 2.8, 4.5)),
    CaseSpec("phantom_02", 2, "RAS", (3.0, 3.0, 5.0)),
    CaseSpec("phantom_03", 3, "LAS", (2.5, 2.5, 4.0)),
    CaseSpec("phantom_04", 4, "PIR", (2.9, 4.2, 2.9)),
    CaseSpec("phantom_05", 5, "LSA", (2.7, 2.7, 4.4)),
    CaseSpec("phantom_06", 6, "LPS", (3.2, 3.2, 4.8), (24.0, 1.0, -2.0, 2.0)),
)


@dataclass(frozen=True)
class Phantom:
    """One scanned phantom; both arrays are indexed along the axes named by ``spec.codes``."""

    spec: CaseSpec
    image_hu: npt.NDArray[np.int16]
    labels: npt.NDArray[np.uint8]
    affine_ras: FloatArray


@dataclass(frozen=True)
class Space:
    """Patient coordinates of every voxel (RAS+, mm, body centre at 0), straight and bent by the smooth warp."""

    straight: tuple[FloatArray, FloatArray, FloatArray]
    bent: tuple[FloatArray, FloatArray, FloatArray]


@dataclass(frozen=True)
class Body:
    """Half width (left-right) and half depth (anterior-posterior) of the trunk, in mm."""

    half_width: float
    half_depth: float


# --- exact arithmetic -------------------------------------------------------------------------------------------------


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number uniformly from [low, high)."""
    return low + (high - low) * float(rng.random())


def rotation(quaternion: tuple[float, float, float, float]) -> FloatArray:
    """Return the 3x3 rotation matrix of a quaternion (w, x, y, z)."""
    w, x, y, z = (value / float(np.sqrt(sum(v * v for v in quaternion))) for value in quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def value_noise(
    rng: np.random.Generator, points: tuple[FloatArray, FloatArray, FloatArray], cell_mm: float
) -> FloatArray:
    """Evaluate smooth random noise in [-1, 1] at `points` (mm): lattice values joined by a cubic ramp."""
    lattice = 2.0 * rng.random((LATTICE_POINTS,) * 3) - 1.0
    corners, ramps = [], []
    for axis in points:
        position = np.clip(axis / cell_mm + LATTICE_POINTS / 2, 0, LATTICE_POINTS - 1.001)
        corner = np.floor(position)
        step = position - corner
        corners.append(corner.astype(np.intp))
        ramps.append(step * step * (3.0 - 2.0 * step))
    return _join_corners(lattice, corners, ramps)


def _join_corners(lattice: FloatArray, corners: list[npt.NDArray[np.intp]], ramps: list[FloatArray]) -> FloatArray:
    """Interpolate `lattice` between the eight corners of each point's cell, last axis first."""
    i, j, k = corners
    along_k = [
        lattice[i + di, j + dj, k] * (1.0 - ramps[2]) + lattice[i + di, j + dj, k + 1] * ramps[2]
        for di in (0, 1)
        for dj in (0, 1)
    ]
    along_j = [along_k[2 * di] * (1.0 - ramps[1]) + along_k[2 * di + 1] * ramps[1] for di in (0, 1)]
    return along_j[0] * (1.0 - ramps[0]) + along_j[1] * ramps[0]


def blur(volume: FloatArray) -> FloatArray:
    """Smooth with the kernel (1, 6, 1) / 8 along every axis, edges repeated."""
    for axis in range(volume.ndim):
        padded = np.pad(volume, [(int(a == axis),) * 2 for a in range(volume.ndim)], mode="edge")
        before, after = (np.take(padded, range(s, s + volume.shape[axis]), axis) for s in (0, 2))
        volume = (before + 6.0 * volume + after) / 8.0
    return volume


def grain(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Return noise of unit variance, close to normal: the sum of six uniform numbers."""
    total = np.zeros(shape)
    for _ in range(6):
        total = total + rng.random(shape)
    return (total - 3.0) * float(np.sqrt(2.0))


# --- the scanner grid -------------------------------------------------------------------------------------------------


def scan_grid(spec: CaseSpec, body: Body, rng: np.random.Generator) -> tuple[tuple[int, ...], FloatArray, Vector]:
    """Choose the grid that covers a body.

    Returns
    -------
    shape, affine_ras, centre
        Array size along ``spec.codes``; voxel index to RAS+ mm; where the body's centre lies in RAS+ mm.
    """
    margin = between(rng, 8.0, 18.0)
    extent_mm = (2 * body.half_width + margin, 2 * body.half_depth + margin, between(rng, 172.0, 196.0))
    centre = (round(between(rng, -20, 20), 1), round(between(rng, -150, -90), 1), round(between(rng, -700, 200), 1))
    ornt = nib.orientations.axcodes2ornt(tuple(spec.codes)).astype(int)
    shape = tuple(round(extent_mm[axis] / mm) for (axis, _), mm in zip(ornt, spec.spacing_mm, strict=True))
    affine = np.eye(4)
    turn = rotation(spec.quaternion)
    for column, ((axis, sign), mm) in enumerate(zip(ornt, spec.spacing_mm, strict=True)):
        affine[:3, column] = turn[:, axis] * (sign * mm)
    for row in range(3):
        half = [affine[row, column] * ((shape[column] - 1) / 2) for column in range(3)]
        affine[row, 3] = round(centre[row] - (half[0] + half[1] + half[2]), 2)
    return shape, affine, centre


def patient_space(rng: np.random.Generator, shape: tuple[int, ...], affine: FloatArray, centre: Vector) -> Space:
    """Give every voxel its body coordinates (RAS+ mm from `centre`) and their smoothly bent version."""
    i, j, k = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij")
    straight = tuple(
        (affine[row, 0] * i + affine[row, 1] * j) + (affine[row, 2] * k + (affine[row, 3] - centre[row]))
        for row in range(3)
    )
    amplitude_mm = between(rng, 7.0, 11.0)
    bent = tuple(axis + amplitude_mm * value_noise(rng, straight, WARP_CELL_MM) for axis in straight)
    return Space(straight, bent)  # type: ignore[arg-type]


# --- anatomy ----------------------------------------------------------------------------------------------------------


def ellipsoid(
    points: tuple[FloatArray, FloatArray, FloatArray], centre: Vector, radii: Vector, tilt: float = 0.0
) -> FloatArray:
    """Return how much of each voxel lies in an ellipsoid, 0 to 1.

    Parameters
    ----------
    points
        Coordinates x (to the right), y (anterior), z (superior), in mm.
    centre, radii
        In mm along x, y, z.
    tilt
        Tangent of half the rotation about z.
    """
    cos, sin = (1 - tilt * tilt) / (1 + tilt * tilt), 2 * tilt / (1 + tilt * tilt)
    x, y, z = (axis - c for axis, c in zip(points, centre, strict=True))
    x, y = cos * x + sin * y, cos * y - sin * x
    level = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    distance = np.sqrt(x * x + y * y + z * z)
    inside_mm = distance / np.maximum(level, 1e-3) - distance
    return np.clip(0.5 + inside_mm / EDGE_MM, 0.0, 1.0)


class Painter:
    """Paints structures one over the other into an image (HU) and a label array of the same shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.image = np.full(shape, -1000.0)
        self.labels = np.zeros(shape, dtype=np.uint8)

    def paint(self, share: FloatArray, hu: float | FloatArray, label: str = "background") -> None:
        """Lay a structure over what is there: `share` of each voxel (0 to 1) takes the value `hu`."""
        self.image = self.image * (1.0 - share) + hu * share
        self.labels[share >= 0.5] = LABELS[label]


def paint_trunk(painter: Painter, space: Space, body: Body, rng: np.random.Generator) -> FloatArray:
    """Paint fat rim, muscle wall and abdominal cavity; return the share of each voxel inside the cavity."""
    width, depth = body.half_width, body.half_depth
    rim = between(rng, 0.88, 0.94)
    wall = rim - between(rng, 0.07, 0.11)
    layers = [ellipsoid(space.bent, (0, 0, 0), (s * width, s * depth, 500 * s)) for s in (1.0, rim, wall)]
    painter.paint(layers[0], between(rng, -112, -98))
    painter.paint(layers[1], between(rng, 50, 62))
    painter.paint(layers[2], -75.0 + 35.0 * value_noise(rng, space.straight, TEXTURE_CELL_MM))
    return layers[2]


def paint_bowel(painter: Painter, space: Space, body: Body, cavity: FloatArray, rng: np.random.Generator) -> None:
    """Paint what has no label: bowel loops in front and a stomach beside the spleen."""
    for _ in range(7):
        centre = (
            between(rng, -0.5, 0.5) * body.half_width,
            between(rng, 0.1, 0.6) * body.half_depth,
            between(rng, -90, -10),
        )
        radii = (between(rng, 11, 24), between(rng, 9, 15), between(rng, 10, 18))
        painter.paint(ellipsoid(space.bent, centre, radii) * cavity, between(rng, 15, 60))
    stomach = (-0.3 * body.half_width, 0.3 * body.half_depth, between(rng, 25, 45))
    painter.paint(ellipsoid(space.bent, stomach, (32.0, 24.0, 30.0), 0.2) * cavity, between(rng, 10, 40))


def paint_liver(painter: Painter, space: Space, body: Body, cavity: FloatArray, rng: np.random.Generator) -> None:
    """Paint the liver (two lobes joined) and one hypodense lesion well inside its right lobe."""
    grow, hu = between(rng, 0.9, 1.1), between(rng, 100, 122)
    x, y, z = 0.42 * body.half_width, between(rng, 0.04, 0.16) * body.half_depth, between(rng, 18, 32)
    right = ellipsoid(space.bent, (x, y, z), (56 * grow, 50 * grow, 58 * grow), between(rng, -0.1, 0.1))
    left = ellipsoid(space.bent, (x - 50, y + 22, z + 12), (56 * grow, 26 * grow, 30 * grow), between(rng, -0.1, 0.15))
    liver = np.maximum(right, left) * cavity
    painter.paint(liver, hu, "liver")
    centre = (x + between(rng, -20, 16), y + between(rng, -12, 16), z + between(rng, -8, 26))
    size = between(rng, 16, 24)
    radii = (size * between(rng, 0.85, 1.15), size * between(rng, 0.85, 1.15), size * between(rng, 0.85, 1.15))
    painter.paint(ellipsoid(space.bent, centre, radii) * liver, hu - between(rng, 55, 75), "liver_lesion")


def paint_spleen(painter: Painter, space: Space, body: Body, cavity: FloatArray, rng: np.random.Generator) -> None:
    """Paint the spleen, at the back of the left side."""
    grow = between(rng, 0.88, 1.12)
    centre = (
        between(rng, -0.66, -0.58) * body.half_width,
        between(rng, -0.36, -0.22) * body.half_depth,
        between(rng, 26, 42),
    )
    spleen = ellipsoid(space.bent, centre, (25 * grow, 36 * grow, 42 * grow), between(rng, -0.2, 0.0))
    painter.paint(spleen * cavity, between(rng, 118, 140), "spleen")


def paint_kidneys(painter: Painter, space: Space, body: Body, cavity: FloatArray, rng: np.random.Generator) -> None:
    """Paint both kidneys, each with the hilum's dent on its inner side; the right one lies lower."""
    hu = between(rng, 160, 195)
    for side, label, z in ((1, "kidney_right", -36.0), (-1, "kidney_left", -28.0)):
        grow = between(rng, 0.9, 1.1)
        x = side * between(rng, 0.4, 0.46) * body.half_width
        centre = (x, between(rng, -0.46, -0.38) * body.half_depth, z + between(rng, -8, 8))
        kidney = ellipsoid(space.bent, centre, (24 * grow, 21 * grow, 42 * grow), side * between(rng, 0.0, 0.2))
        hilum = ellipsoid(space.bent, (x - side * 24 * grow, centre[1] + 4, centre[2]), (13.0, 9.0, 14.0))
        painter.paint(kidney * (1.0 - hilum) * cavity, hu, label)


def paint_midline(painter: Painter, space: Space, body: Body, rng: np.random.Generator) -> None:
    """Paint spine, spinal canal and aorta over whatever reached them."""
    y = -0.52 * body.half_depth
    painter.paint(ellipsoid(space.bent, (0, y, 0), (20.0, 16.0, 600.0)), between(rng, 220, 320))
    painter.paint(ellipsoid(space.bent, (0, y - 22, 0), (15.0, 12.0, 600.0)), between(rng, 350, 500))
    painter.paint(ellipsoid(space.bent, (0, y - 20, 0), (7.0, 6.0, 600.0)), 30.0)
    painter.paint(ellipsoid(space.bent, (-10.0, y + 26, 0), (9.5, 9.5, 600.0)), between(rng, 140, 185))


def scan_noise(image: FloatArray, space: Space, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Blur, add parenchymal texture and grain, and round to whole HU; air keeps little of either."""
    blurred = blur(image)
    tissue = np.clip((blurred + 1000.0) / 900.0, 0.05, 1.0)
    texture = between(rng, 5.0, 8.0) * value_noise(rng, space.straight, TEXTURE_CELL_MM)
    noise = between(rng, 10.0, 15.0) * blur(grain(rng, image.shape))
    return np.clip(np.rint(blurred + tissue * (texture + noise)), -STORED_OFFSET, SOFT_TISSUE_MAX_HU).astype(np.int16)


def make_phantom(spec: CaseSpec) -> Phantom:
    """Draw and scan one phantom.

    Raises
    ------
    RuntimeError
        When a structure came out smaller than `MIN_LABEL_VOXELS`.
    """
    rng = np.random.default_rng([BASE_SEED, spec.seed])
    body = Body(between(rng, 108, 128), between(rng, 80, 94))
    shape, affine, centre = scan_grid(spec, body, rng)
    space = patient_space(rng, shape, affine, centre)
    painter = Painter(shape)
    cavity = paint_trunk(painter, space, body, rng)
    for paint in (paint_bowel, paint_liver, paint_spleen, paint_kidneys):
        paint(painter, space, body, cavity, rng)
    paint_midline(painter, space, body, rng)
    counts = np.bincount(painter.labels.ravel(), minlength=len(LABELS))
    if counts.min() < MIN_LABEL_VOXELS:
        raise RuntimeError(f"{spec.name}: expected {MIN_LABEL_VOXELS} voxels or more of each label, found {counts}")
    return Phantom(spec, scan_noise(painter.image, space, rng), painter.labels, affine)


# --- files ------------------------------------------------------------------------------------------------------------


def gzip_bytes(data: bytes, level: int = 9) -> bytes:
    """Compress to gzip with no time, no name and a fixed header."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(data) + packer.flush()
    tail = zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + body + tail


def nifti_bytes(array: npt.NDArray[np.generic], affine_ras: FloatArray, level: int = 9) -> bytes:
    """Serialise an array (axes as in `affine_ras`) to the bytes of a ``.nii.gz`` with equal qform and sform."""
    image = nib.Nifti1Image(array, affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine_ras, code=1)
    image.set_qform(affine_ras, code=1)
    parts = np.array([image.header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    # The eigen-solver behind the quaternion may leave rounding dust, and either sign when the rotation is half a turn.
    parts = np.round(parts, 7)
    if np.isclose(np.sqrt((parts**2).sum()), 1.0) and parts[np.nonzero(parts)[0][0]] < 0:
        parts = -parts
    for axis, value in zip("bcd", parts + 0.0, strict=True):
        image.header[f"quatern_{axis}"] = value
    return gzip_bytes(image.to_bytes(), level)


def uid(*names: object) -> str:
    """Return a UID under the 2.25 (UUID) root that depends on `names` only."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, 'mshub-sample-data:' + '/'.join(map(str, names))).int}"


def file_meta(sop_uid: str) -> FileMetaDataset:
    """Return the DICOM file meta information of one CT instance."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = sop_uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("implementation")
    meta.ImplementationVersionName = f"MSHUB_{GENERATOR_VERSION}"
    return meta


def describe_series(ds: Dataset, case: str) -> None:
    """Fill the patient, study, series and equipment modules, the same in every slice."""
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = f"MSHub^{case}", case.upper(), "", "O"
    ds.StudyInstanceUID, ds.StudyID, ds.AccessionNumber = uid(case, "study"), "1", ""
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.StudyDescription, ds.SeriesDescription = "MSHub synthetic abdomen phantom", "Synthetic abdomen CT"
    ds.ReferringPhysicianName = ""
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.Modality = uid(case, "series"), "1", "CT"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = uid(case, "frame"), ""
    ds.Manufacturer, ds.ManufacturerModelName, ds.SoftwareVersions = "MSHub", "sample-data", GENERATOR_VERSION
    ds.BodyPartExamined, ds.PatientPosition = "ABDOMEN", "HFS"


def describe_pixels(ds: Dataset, stored_yx: npt.NDArray[np.uint16]) -> None:
    """Fill the CT image and pixel modules; stored values are HU + 1024 in 12 of 16 bits."""
    ds.ImageType, ds.AcquisitionNumber, ds.KVP = ["DERIVED", "SECONDARY", "AXIAL"], "1", "120"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored_yx.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(-STORED_OFFSET), "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "50", "400"
    ds.PixelData = stored_yx.astype("<u2").tobytes()


def describe_plane(ds: Dataset, affine_ras: FloatArray, spacing_mm: Vector, index: int) -> None:
    """Fill the image plane module of slice `index`: DICOM counts millimetres in LPS+."""
    lps = np.diag([-1.0, -1.0, 1.0])
    cosines = lps @ affine_ras[:3, :3] / np.array(spacing_mm)
    position = lps @ (affine_ras[:3, 3] + affine_ras[:3, 2] * index)
    ds.ImageOrientationPatient = [_decimal(v) for v in (*cosines[:, 0], *cosines[:, 1])]
    ds.ImagePositionPatient = [_decimal(v) for v in position]
    ds.PixelSpacing = [_decimal(spacing_mm[1]), _decimal(spacing_mm[0])]
    ds.SliceThickness, ds.SliceLocation = _decimal(spacing_mm[2]), _decimal(position[2])


def _decimal(value: float) -> str:
    """Write a DICOM decimal string: at most 16 characters, no negative zero."""
    return format(round(float(value), 6) + 0.0, ".10g")


def dicom_slices(phantom: Phantom, folder: Path) -> Iterator[Path]:
    """Write a phantom as a CT series, one file per step of the third array axis, and yield the paths."""
    case = phantom.spec.name
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(phantom.image_hu.shape[2]):
        sop_uid, path = uid(case, "slice", index), folder / f"slice_{index + 1:03d}.dcm"
        ds = FileDataset(str(path), {}, file_meta=file_meta(sop_uid), preamble=b"\0" * 128)
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = CTImageStorage, sop_uid, str(index + 1)
        describe_series(ds, case)
        describe_plane(ds, phantom.affine_ras, phantom.spec.spacing_mm, index)
        describe_pixels(ds, (phantom.image_hu[:, :, index].T.astype(np.int32) + STORED_OFFSET).astype(np.uint16))
        ds.save_as(path, write_like_original=False)
        yield path


def write_case(spec: CaseSpec, folder: Path) -> list[Path]:
    """Write one sample's image, labels and, for `DICOM_CASE`, its DICOM series; return the paths."""
    phantom = make_phantom(spec)
    paths = []
    for kind, array in (("images", phantom.image_hu), ("labels", phantom.labels)):
        path = folder / kind / f"{spec.name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti_bytes(array, phantom.affine_ras))
        paths.append(path)
    if spec.name == DICOM_CASE:
        paths += dicom_slices(phantom, folder / "dicom" / spec.name)
    return paths


def write_samples(folder: Path) -> None:
    """Write every sample case and ``manifest.json`` below `folder`."""
    files: dict[str, str] = {}
    for spec in SAMPLES:
        for path in write_case(spec, folder):
            files[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {
        "generator_version": GENERATOR_VERSION,
        "base_seed": BASE_SEED,
        "labels": LABELS,
        "cases": {s.name: {"seed": s.seed, "codes": s.codes, "spacing_mm": list(s.spacing_mm)} for s in SAMPLES},
        "files": dict(sorted(files.items())),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


# --- checking ---------------------------------------------------------------------------------------------------------


def contents(path: Path) -> bytes:
    """Return a file's bytes, those of a ``.gz`` unpacked."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def differences(folder: Path) -> list[str]:
    """Compare the samples in `folder` with a regeneration and with their manifest; return one line per difference."""
    with tempfile.TemporaryDirectory() as scratch:
        write_samples(Path(scratch))
        expected = _tree(Path(scratch))
        found = _tree(folder)
        lines = [f"missing: {name}" for name in sorted(expected - found)]
        lines += [f"not generated: {name}" for name in sorted(found - expected)]
        same = (n for n in sorted(expected & found) if contents(folder / n) != contents(Path(scratch) / n))
        lines += [f"differs from its regeneration: {name}" for name in same]
    return lines + _manifest_differences(folder)


def _tree(folder: Path) -> set[str]:
    """Name the generated files below `folder`, relative and with forward slashes."""
    return {
        path.relative_to(folder).as_posix()
        for kind in ("images", "labels", "dicom")
        for path in (folder / kind).rglob("*")
        if path.is_file()
    }


def _manifest_differences(folder: Path) -> list[str]:
    """Name the files whose sha256 is not the one in the manifest."""
    listed: dict[str, str] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    wrong = (n for n in sorted(listed) if (folder / n).is_file() and _sha256(folder / n) != listed[n])
    unlisted = sorted(_tree(folder) - set(listed))
    return [f"sha256 differs from the manifest: {n}" for n in wrong] + [f"not in the manifest: {n}" for n in unlisted]


def _sha256(path: Path) -> str:
    """Return a file's sha256 as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- training phantoms ------------------------------------------------------------------------------------------------


def training_spec(index: int) -> CaseSpec:
    """Describe training phantom `index` (from 0): its seed is never a sample's, its scan is drawn at random."""
    seed = FIRST_TRAINING_SEED + index
    rng = np.random.default_rng([BASE_SEED, seed, 1])
    in_plane, slices = round(between(rng, 2.5, 3.2), 2), round(between(rng, 4.0, 5.0), 2)
    codes = ("LPS", "RAS", "LAS", "LPI", "RAI", "PIR", "LSA", "PIL")[int(rng.integers(8))]
    # The scan is axial two times in three; otherwise the third array axis is the thick one, whatever its direction.
    thick = next(i for i, c in enumerate(codes) if c in "SI") if rng.random() < 0.67 else 2
    spacing = tuple(slices if axis == thick else in_plane for axis in range(3))
    lean = [between(rng, -0.13, 0.13) if rng.random() < 0.4 else 0.0 for _ in range(3)]
    return CaseSpec(f"train_{index:03d}", seed, codes, spacing, (1.0, lean[0], lean[1], lean[2]))  # type: ignore[arg-type]


def write_training_dataset(folder: Path, count: int, first: int = 0) -> list[str]:
    """Write an nnU-Net raw dataset of `count` training phantoms into `folder`; return the case names.

    ``dataset.json`` asks for nnU-Net's reorienting reader, so that a model trained on it takes any storage order.
    """
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    specs = [training_spec(index) for index in range(first, first + count)]
    for spec in specs:
        phantom = make_phantom(spec)
        image, labels = (nifti_bytes(a, phantom.affine_ras, level=1) for a in (phantom.image_hu, phantom.labels))
        (folder / "imagesTr" / f"{spec.name}_0000.nii.gz").write_bytes(image)
        (folder / "labelsTr" / f"{spec.name}.nii.gz").write_bytes(labels)
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": count,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "description": "MSHub synthetic abdomen phantoms; no patient data",
        "licence": "Apache-2.0",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n", encoding="utf-8")
    return [spec.name for spec in specs]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Rebuild or check MSHub's sample phantoms.")
    parser.add_argument("--check", action="store_true", help="compare with a regeneration, write nothing")
    parser.add_argument("--training", type=int, metavar="N", help="write N training phantoms into --out instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write or check")
    parser.add_argument(
        "--dicom", type=Path, metavar="DIR", help="write every phantom as a CT series below DIR instead"
    )
    arguments = parser.parse_args(argv)
    if arguments.check:
        lines = differences(arguments.out)
        print("\n".join(lines) or "sample data equal their regeneration")
        return int(bool(lines))
    if arguments.dicom:
        for spec in SAMPLES:
            list(dicom_slices(make_phantom(spec), arguments.dicom / spec.name))
    elif arguments.training:
        write_training_dataset(arguments.out, arguments.training)
    else:
        write_samples(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
