"""What bench/speed.py measures with: images, models and network outputs, the same on every machine."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mshub.geometry import Array
from mshub.install import add_model
from mshub.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from factories import make_model_folder  # noqa: E402
from speed_phantoms import REGION_SIZES, Geometry, Triple, synthetic_ct, write_logits  # noqa: E402
from uncertainty_cost import SPACING_MM, favour_background, write_model  # noqa: E402

Json = dict[str, Any]

ORGAN_FEATURES, DEFAULT_FEATURES, ORGAN_PATCH = 16, 32, (96, 128, 128)
ORGANS = 43
FOREGROUND = 0.15
"""Share of the voxels that structures of the organ model have."""
MODEL_ID = "measured"
"""What the model is called in a store."""


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes
    ----------
    part : str
        ``export``, ``preprocessing`` or ``request``.
    name : str
        What the report calls it.
    geometry : Geometry
    heads : int
        Values the network has per voxel: classes with the background, or regions.
    regions : bool
    curves : tuple of str
        Of which growth curves it is a point: ``slices``, ``classes``.
    in_table : bool
        Whether it has rows of its own, besides.
    features : int
        Of the first stage of an organ model.
    """

    part: str
    name: str
    geometry: Geometry
    heads: int = 2
    regions: bool = False
    curves: tuple[str, ...] = ()
    in_table: bool = True
    features: int = ORGAN_FEATURES

    def facts(self) -> Json:
        """Return what a report needs to know."""
        return {
            **asdict(self),
            "network_shape": self.geometry.network_shape,
            "separate_z": self.geometry.separate_z,
        }


def logits_bytes(case: Case) -> int:
    """Return the size of the network's output."""
    return 2 * case.heads * int(np.prod(case.geometry.network_shape))


def nnunet_export_bytes(case: Case) -> int:
    """Return the memory nnU-Net's export needs, the network's output included, without the process's own.

    Half-precision values go through a copy in double precision into half-precision values on the image's grid, all
    classes at once; between planes, coordinates of all voxels are made as well. Regions become single precision twice.
    """
    source, image = (float(np.prod(shape)) for shape in (case.geometry.network_shape, case.geometry.shape))
    between_planes = case.geometry.separate_z and case.geometry.shape[0] != case.geometry.network_shape[0]
    resampling = case.heads * 8 * source + image * 8 * (11 if between_planes else 2)
    deciding = image * (8 * case.heads if case.regions else 8)
    return logits_bytes(case) + int(case.heads * 2 * image + max(resampling, deciding))


# -- the cases --------------------------------------------------------------------------------------------------------

IN_PLANE_MM = 0.977
IN_3D = ((2.5, IN_PLANE_MM, IN_PLANE_MM), (3.0, 1.0, 1.0))
BY_PLANE = ((3.0, IN_PLANE_MM, IN_PLANE_MM), (5.0, 1.0, 1.0))
SLICES, CLASSES, SLICES_OF_CLASSES = (20, 50, 100, 200, 400), (2, 8, 24, 44, 104), 40
QUICK_EDGE, QUICK_SLICES, QUICK_CLASSES = 96, (12, 24), (2, 6)


def export_cases(quick: bool) -> list[Case]:
    """Return the cases of the part ``export``."""
    edge, slices = (QUICK_EDGE, QUICK_SLICES[-1]) if quick else (512, 120)
    in_3d, by_plane = (Geometry((slices, edge, edge), *spacings) for spacings in (IN_3D, BY_PLANE))
    regions = Case("export", "3 regions", in_3d, heads=len(REGION_SIZES), regions=True)
    if quick:
        return [regions, *_growth(edge, QUICK_SLICES, QUICK_CLASSES, QUICK_SLICES[0])]
    organs = ORGANS + 1
    return [
        Case("export", f"{organs} classes", in_3d, heads=organs),
        Case("export", f"{organs} classes, separate z", by_plane, heads=organs),
        regions,
        Case("export", "2 classes", in_3d),
        *_growth(edge, SLICES, CLASSES, SLICES_OF_CLASSES),
    ]


def _growth(edge: int, slices: tuple[int, ...], classes: tuple[int, ...], thin: int) -> list[Case]:
    """Return the points of both growth curves, a point that both share once."""
    most = ORGANS + 1 if ORGANS + 1 in classes else classes[-1]
    points = {(count, most): ("slices",) for count in slices}
    for heads in classes:
        points[thin, heads] = (*points.get((thin, heads), ()), "classes")
    return [
        Case(
            "export",
            f"{count} slices, {heads} classes",
            Geometry((count, edge, edge), *IN_3D),
            heads,
            False,
            curves,
            False,
        )
        for (count, heads), curves in points.items()
    ]


def preprocessing_cases(quick: bool) -> list[Case]:
    """Return the cases of the part ``preprocessing``."""
    if quick:
        return [Case("preprocessing", "in-plane and through-plane", Geometry((24, 96, 96), *IN_3D))]
    thick, fine = (5.0, IN_PLANE_MM, IN_PLANE_MM), (1.5, 1.5, 1.5)
    return [
        Case("preprocessing", "to 3 x 1 x 1 mm", Geometry((134, 512, 512), *IN_3D)),
        Case("preprocessing", "to 1.5 mm", Geometry((134, 512, 512), IN_3D[0], fine)),
        Case("preprocessing", "thick slices, separate z", Geometry((67, 512, 512), thick, IN_3D[1])),
    ]


STARTER, REAL = "starter model, phantom", "organ model, CT"
ORGAN_MODEL, COARSE = "organ model at 1.5 mm, synthetic CT", "organ model at 3 mm, synthetic CT"


def request_cases(quick: bool, real: Path | None) -> list[Case]:
    """Return the cases of the part ``request``; `real` is a CT."""
    cases = [Case("request", STARTER, _geometry_of(_starter_image(), _starter_spacing()), heads=6)]
    fine = (SPACING_MM,) * 3
    if not quick:
        cases.append(Case("request", ORGAN_MODEL, Geometry((100, 256, 256), (2.25, 1.17, 1.17), fine), ORGANS + 1))
        cases.append(Case("request", COARSE, Geometry((120, 512, 512), (2.5, 0.8, 0.8), (3.0, 3.0, 3.0)), ORGANS + 1))
    if real is not None:
        cases.append(Case("request", REAL, _geometry_of(real, fine), heads=ORGANS + 1))
    return cases


def gpu_cases(quick: bool) -> list[Case]:
    """Return the cases of the part ``gpu``: a small network, and one of nnU-Net's default size."""
    small, *organs = request_cases(quick, None)
    return [small, *[replace(case, features=DEFAULT_FEATURES) for case in organs if case.name == ORGAN_MODEL]]


def _geometry_of(image: Path, network_spacing: Triple) -> Geometry:
    header = nib.load(image).header
    x, y, z = header.get_data_shape()
    across, along, through = (float(edge) for edge in header.get_zooms())
    return Geometry((z, y, x), (through, along, across), network_spacing)


def _starter_image() -> Path:
    return ROOT / "sample-data" / "images" / "phantom_03.nii.gz"


def _starter_spacing() -> Triple:
    plans = json.loads((ROOT / "sample-data" / "starter-model" / "plans.json").read_text(encoding="utf-8"))
    z, y, x = plans["configurations"]["3d_fullres"]["spacing"]
    return z, y, x


# -- making them ------------------------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path, real: Path | None = None) -> Json:
    """Write the files of a case into `folder`, an empty one.

    Returns
    -------
    dict
        What a worker needs, besides the arm: paths and nnU-Net's properties. ``border``, for an export, is the share
        of the network's voxels that differ from a neighbour.
    """
    if case.part == "export":
        model = _tiny_model(folder, case)
        border = write_logits(folder / "logits.npy", case.geometry, case.heads, case.regions)
        return {"model": model, "logits": str(folder / "logits.npy"), "properties": _properties(case), "border": border}
    if case.part == "preprocessing":
        np.save(folder / "image.npy", synthetic_ct(case.geometry)[None])
        return {
            "model": _tiny_model(folder, case),
            "image": str(folder / "image.npy"),
            "properties": {"spacing": case.geometry.spacing},
        }
    return _prepare_request(case, folder, real)


def _tiny_model(folder: Path, case: Case) -> str:
    """Write a model folder whose network nobody runs."""
    if case.regions:
        nested = {f"region_{number}": list(range(number, case.heads + 1)) for number in range(1, case.heads + 1)}
        labels, extra = {"background": 0, **nested}, {"regions_class_order": list(range(1, case.heads + 1))}
    else:
        labels = {"background": 0, **{f"structure_{value}": value for value in range(1, case.heads)}}
        extra = {}
    spacing = case.geometry.network_spacing
    return str(make_model_folder(folder / "model", labels=labels, spacing_zyx_mm=spacing, dataset_extra=extra))


def _properties(case: Case) -> Json:
    """Return what nnU-Net's preprocessing tells its export; nothing was cropped."""
    return {
        "spacing": case.geometry.spacing,
        "shape_before_cropping": case.geometry.shape,
        "shape_after_cropping_and_before_resampling": case.geometry.shape,
        "bbox_used_for_cropping": [[0, edge] for edge in case.geometry.shape],
    }


def _prepare_request(case: Case, folder: Path, real: Path | None) -> Json:
    """Write the model, the image as nnU-Net wants to find it, a smaller one to warm up with, and a store."""
    image, tiny = folder / "images" / "case_0000.nii.gz", folder / "tiny.nii.gz"
    model = ROOT / "sample-data" / "starter-model"
    image.parent.mkdir()
    small = Geometry((12, 24, 24), case.geometry.spacing, case.geometry.network_spacing)
    _write_image(tiny, synthetic_ct(small), small.spacing)
    if case.name == STARTER:
        shutil.copyfile(_starter_image(), image)
    else:
        model = write_model(folder / "model", case.heads, ORGAN_PATCH, case.features)
        _set_spacing(model, case.geometry.network_spacing)
        synthetic = Geometry(ORGAN_PATCH, case.geometry.network_spacing, case.geometry.network_spacing)
        _write_image(folder / "bias.nii.gz", synthetic_ct(synthetic), synthetic.spacing)
        favour_background(model, folder / "bias.nii.gz", "cpu", FOREGROUND)
        if case.name == REAL and real is not None:
            shutil.copyfile(real, image)
        else:
            _write_image(image, synthetic_ct(case.geometry), case.geometry.spacing)
    home = folder / "home"
    add_model(ModelStore(home), MODEL_ID, model)
    files = {"model": str(model), "image": str(image), "tiny": str(tiny), "home": str(home)}
    return {**files, "model_id": MODEL_ID, "network_shape": case.geometry.network_shape}


def _set_spacing(model: Path, spacing: Triple) -> None:
    file = model / "plans.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    for configuration in plans["configurations"].values():
        configuration["spacing"] = list(spacing)
    file.write_text(json.dumps(plans), encoding="utf-8")


def _write_image(path: Path, voxels: Array, spacing: Triple) -> None:
    z, y, x = spacing
    nib.save(nib.Nifti1Image(voxels.T.astype(np.int16), np.diag([x, y, z, 1.0])), path)
