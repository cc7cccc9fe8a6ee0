"""A small hospital: a real PACS, a server on it, and ways to ask them what clients ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
from dicomweb_client import DICOMwebClient

from dicom_series_factory import SeriesMaker
from live import LiveServer
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import NNUNetPredictor
from mshub.store import ModelStore
from orthanc import Orthanc

NAMES = {"liver": 1, "spleen": 2}
PIXELS = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "grid": "series"}


@dataclass
class Hospital:
    """A PACS, a server on it, and the folder of the series."""

    pacs: Orthanc
    server: LiveServer
    home: Path
    folder: Path

    def store(self, maker: SeriesMaker, change: Callable[[Any], Any] = list) -> Path:
        """Write a series and store it in the PACS; returns its folder."""
        folder = maker.write(self.folder / "series" / maker.name, change)
        self.pacs.upload(sorted(folder.iterdir()))
        return folder

    def infer(self, image: str, model: str = "tiny", **params: Any) -> httpx.Response:
        return self.server.infer(model, f"image={image}&output=image", {**PIXELS, **params})

    def submit(self, image: str, label: bytes, names: dict[str, int] = NAMES, client: str = "dr") -> httpx.Response:
        info = [{"name": name, "idx": value} for name, value in names.items()]
        return httpx.put(
            f"{self.server.url}/datastore/label?image={image}&tag=final",
            data={"params": json.dumps({"label_info": info, "model": "tiny", "client_id": client})},
            files={"label": ("label.nrrd", label)},
            timeout=120,
        )

    def get(self, path: str, **query: str) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", params=query, timeout=60)

    def segs(self, maker: SeriesMaker) -> list[pydicom.Dataset]:
        """Return the SEGs of a study, as the PACS gives them."""
        client = DICOMwebClient(self.pacs.dicomweb)
        series = client.search_for_series(maker.study_uid, search_filters={"Modality": "SEG"})
        uids = [item["0020000E"]["Value"][0] for item in series]
        return [seg for uid in uids for seg in client.retrieve_series(maker.study_uid, uid)]


def voxels(nrrd: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the voxels of an uncompressed NRRD as OHIF reads them: nothing of the header is looked at."""
    return np.frombuffer(nrrd[nrrd.index(b"\n\n") + 2 :], np.uint8).reshape(shape, order="F")


def predicted(hospital: Hospital, *folders: Path, model: str = "tiny") -> np.ndarray:
    """Return what the library itself says of the files of series, one per channel, [x, y, z]."""
    version = ModelStore(hospital.home).current(model)
    predictor = NNUNetPredictor(ModelFolder.open(version.model_path), NetworkCache(2**30))
    return predictor.predict(list(folders)).labels.array_xyz
