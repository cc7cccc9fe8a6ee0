"""Image files as nnU-Net's readers see them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 -- the name its own documentation uses
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from mshub.card_tables import AS_STORED, InputRules
from mshub.errors import CaseError, ChannelError, GeometryError
from mshub.geometry import Array, Grid, Volume, check_channels
from mshub.volume_io import read_volume, write_nifti


def read_channels(images: Sequence[Path], names: Sequence[str]) -> list[Volume]:
    """Read and check the channels of one case.

    Parameters
    ----------
    images : sequence of Path
        One file or DICOM folder per channel.
    names : sequence of str
        The channels the model needs, in order.

    Raises
    ------
    CaseError, GeometryError
        An image that cannot be segmented; channels on different grids.
    ChannelError
        Another number of channels.
    """
    if len(images) != len(names):
        raise ChannelError(
            f"{len(images)} image file(s) were given; this model needs {len(names)}, in this order: "
            f"{', '.join(names)}. In a datastore the files of one case are named case_0000, case_0001, ..."
        )
    volumes = [read_volume(path) for path in images]
    check_channels([volume.grid for volume in volumes], names)
    return volumes


def read_as_nnunet(
    images: Sequence[Path], volumes: Sequence[Volume], reader: Any, rules: InputRules = AS_STORED
) -> tuple[Array, dict[str, Any]]:
    """Read the channels of one case with the reader of a model's plans.

    The file itself goes to nnU-Net's reader where that can read it, so that rounding of the spacing is nnU-Net's own;
    other formats, and images that have to be turned, pass through a NIfTI file on the same grid. Whole numbers are the
    same whoever reads them: they are not read a second time by nnU-Net's default reader, which sees the header only.

    Parameters
    ----------
    images, volumes : sequence
        One file or DICOM folder per channel, and the same as `mshub.volume_io` read it.
    reader : nnunetv2 BaseReaderWriter
    rules : InputRules

    Returns
    -------
    data : ndarray, float32, axes (channel, z, y, x)
    properties : dict
        nnU-Net's properties of the case.

    Raises
    ------
    CaseError
        nnU-Net's reader cannot read it.
    """
    turned = [volume.turned(rules.orientation) for volume in volumes]
    with tempfile.TemporaryDirectory(prefix="mshub-reading-") as scratch:
        paths = [
            str(_readable_path(path, volume, reader, volume is not before, Path(scratch) / f"{index:04d}.nii"))
            for index, (path, volume, before) in enumerate(zip(images, turned, volumes, strict=True))
        ]
        try:
            data, properties = _with_headers_of(paths, turned, reader) or reader.read_images(paths)
        except Exception as error:
            raise CaseError(
                f"{images[0].name}: nnU-Net's reader {type(reader).__name__} cannot read it ({error}). Save it "
                "again as NIfTI with 3D Slicer or SimpleITK."
            ) from error
    if rules.clip is not None:
        np.clip(data, *rules.clip, out=data)
    return data, properties


def _with_headers_of(
    paths: Sequence[str], volumes: Sequence[Volume], reader: Any
) -> tuple[Array, dict[str, Any]] | None:
    """Return what `SimpleITKIO.read_images` does, with voxels that were read before; None if it has to read them."""
    if type(reader) is not SimpleITKIO or any(volume.array_xyz.dtype.kind not in "iu" for volume in volumes):
        return None
    geometries = [_sitk_geometry(path) for path in paths]
    spacing = geometries[0]["spacing"]
    if any(geometry["spacing"] != spacing for geometry in geometries):
        return None  # it says what it thinks of that
    x, y, z = volumes[0].array_xyz.shape
    data = np.empty((len(volumes), z, y, x), np.float32)
    for channel, volume in zip(data, volumes, strict=True):
        channel[:] = volume.array_xyz.transpose()
    return data, {"sitk_stuff": geometries[0], "spacing": [abs(edge) for edge in reversed(spacing)]}


def _sitk_geometry(path: str) -> dict[str, tuple[float, ...]]:
    header = sitk.ImageFileReader()
    header.SetFileName(path)
    header.ReadImageInformation()
    values = {"spacing": header.GetSpacing(), "origin": header.GetOrigin(), "direction": header.GetDirection()}
    return {name: tuple(value + 0.0 for value in numbers) for name, numbers in values.items()}  # no -0


def read_label_as_nnunet(label: Volume, reader: Any, orientation: str | None = None) -> Array:
    """Return a label map as the reader of a model's plans turns it, axes (1, z, y, x); see `InputRules.orientation`."""
    with tempfile.TemporaryDirectory(prefix="mshub-reading-") as scratch:
        path = Path(scratch) / "label.nii"
        turned = label.turned(orientation)
        write_nifti(path, turned.array_xyz, turned.grid)
        segmentation: Array = reader.read_seg(str(path))[0]
    return segmentation


def to_input_axes(
    array_zyx: Array, properties: dict[str, Any], reader: Any, grid: Grid, orientation: str | None = None
) -> Array:
    """Return a segmentation, or anything else on nnU-Net's grid, in the index order of the input file.

    Whatever reorientation the reader did when reading, its own writer undoes; the plain ones did none.

    Parameters
    ----------
    array_zyx : ndarray, axes (z, y, x)
        On the reader's grid.
    properties : dict
        nnU-Net's, of the case.
    reader : nnunetv2 BaseReaderWriter
    grid : Grid
        Of the input.
    orientation : str, optional
        What the image was turned to before.

    Returns
    -------
    ndarray, axes (x, y, z)
        Not of the image's shape if the reader is at fault.

    Raises
    ------
    GeometryError
        The reader is at fault and the image was turned.
    """
    if type(reader) in (SimpleITKIO, NibabelIO):
        array_xyz: Array = array_zyx.transpose()
    else:
        array_xyz = _turned_as_written(array_zyx, properties, reader)
    if orientation is None:
        return array_xyz
    turned = Volume(np.broadcast_to(np.uint8(0), grid.shape_xyz), grid).turned(orientation).grid
    return Volume(array_xyz, turned).turned(grid.orientation).array_xyz


def _turned_as_written(array: Array, properties: dict[str, Any], reader: Any) -> Array:
    """Turn an array as the reader's writer turns a segmentation in which one corner and its neighbours are marked."""
    marks = np.zeros(array.shape, np.uint8)
    marks[0, 0, 0] = 1
    for axis in range(3):
        marks[tuple(int(axis == other) for other in range(3))] = 2 + axis
    with tempfile.TemporaryDirectory(prefix="mshub-reading-") as scratch:
        path = Path(scratch) / "marks.nii"
        reader.write_seg(marks, str(path), properties)
        written = np.asarray(nib.load(path).dataobj)
    corner, *neighbours = (np.argwhere(written == mark)[0] for mark in (1, 2, 3, 4))
    steps = np.stack(neighbours) - corner  # axis of the array -> step in the file
    turned = array.transpose(np.abs(steps).argmax(0))
    turned = turned[tuple(slice(None, None, int(step)) for step in steps.sum(0))]
    if turned.shape != written.shape:
        raise GeometryError(
            f"nnU-Net's writer {type(reader).__name__} makes {written.shape} voxels of {array.shape}; nothing is "
            "returned rather than a shifted mask. Please report this image's header."
        )
    return turned


def _readable_path(path: Path, volume: Volume, reader: Any, is_turned: bool, scratch: Path) -> Path:
    if not is_turned and path.is_file() and path.name.lower().endswith(tuple(reader.supported_file_endings)):
        return path
    write_nifti(scratch, volume.array_xyz, volume.grid)
    return scratch
