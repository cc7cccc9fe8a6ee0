"""Image files as nnU-Net's readers see them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mshub.errors import CaseError, ChannelError
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
    images: Sequence[Path], volumes: Sequence[Volume], reader: Any, input_clip: tuple[float, float] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Read the channels of one case with the reader of a model's plans.

    The file itself goes to nnU-Net's reader where that can read it, so that rounding of the spacing is nnU-Net's own;
    other formats pass through a NIfTI file on the same grid.

    Parameters
    ----------
    images, volumes : sequence
        One file or DICOM folder per channel, and the same as `mshub.volume_io` read it.
    reader : nnunetv2 BaseReaderWriter
    input_clip : (float, float), optional
        Intensities are truncated to this range.

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
    with tempfile.TemporaryDirectory(prefix="mshub-") as scratch:
        paths = [
            str(_readable_path(path, volume, reader, Path(scratch) / f"{index:04d}.nii"))
            for index, (path, volume) in enumerate(zip(images, volumes, strict=True))
        ]
        try:
            data, properties = reader.read_images(paths)
        except Exception as error:
            raise CaseError(
                f"{images[0].name}: nnU-Net's reader {type(reader).__name__} cannot read it ({error}). Save it "
                "again as NIfTI with 3D Slicer or SimpleITK."
            ) from error
    if input_clip is not None:
        np.clip(data, *input_clip, out=data)
    return data, properties


def read_label_as_nnunet(label_xyz: Array, grid: Grid, reader: Any) -> Array:
    """Return a label map as the reader of a model's plans turns it, axes (1, z, y, x)."""
    with tempfile.TemporaryDirectory(prefix="mshub-") as scratch:
        path = Path(scratch) / "label.nii"
        write_nifti(path, label_xyz, grid)
        segmentation: Array = reader.read_seg(str(path))[0]
    return segmentation


def _readable_path(path: Path, volume: Volume, reader: Any, scratch: Path) -> Path:
    if path.is_file() and path.name.lower().endswith(tuple(reader.supported_file_endings)):
        return path
    write_nifti(scratch, volume.array_xyz, volume.grid)
    return scratch
