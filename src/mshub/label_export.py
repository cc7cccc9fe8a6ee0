"""A label as a DICOM object of the kind that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mshub.dicom_derived import Facts, WrittenObject
from mshub.dicom_rtstruct import write_rtstruct
from mshub.dicom_seg import write_seg
from mshub.dicom_series import SeriesStack
from mshub.errors import ConfigError
from mshub.geometry import Array

FORMATS = {"seg": write_seg, "rtstruct": write_rtstruct}


def export_labels(
    path: Path, format: str, labels_xyz: Array, names: Mapping[str, int], stack: SeriesStack, facts: Facts
) -> WrittenObject:
    """Write a label that lies on the grid of a DICOM series as a DICOM object.

    Parameters
    ----------
    path
        File to write.
    format
        ``seg`` or ``rtstruct``.
    labels_xyz
        Integers on the **grid** of the series, ``[x, y, z]``, as a prediction is.
    names, stack, facts
        As for `mshub.dicom_seg.write_seg`.

    Raises
    ------
    ConfigError
        Another format.
    LabelError, CaseError, GeometryError
        As for `mshub.dicom_seg.write_seg`.
    """
    if format not in FORMATS:
        raise ConfigError(f"found the format {format!r}, expected one of {', '.join(FORMATS)}; choose one of them")
    return FORMATS[format](path, stack.to_slices(labels_xyz), names, stack, facts)
