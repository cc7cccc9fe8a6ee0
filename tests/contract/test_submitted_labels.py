"""Corrections as the clients send them: read by name, every version kept, refused ones kept aside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest

from live import Site


def save(site: Site, image: str, content: bytes, params: Any, tag: str = "") -> httpx.Response:
    text = params if isinstance(params, str) else json.dumps(params)
    return httpx.put(
        f"{site.server.url}/datastore/label?image={image}" + (f"&tag={tag}" if tag else ""),
        data={"params": text},
        files={"label": ("label.nii.gz", content)},
    )


def tags(site: Site, image: str) -> dict[str, Any]:
    return dict(httpx.get(f"{site.server.url}/datastore/?output=all").json()["objects"][image]["labels"])


@pytest.fixture(scope="module")
def prediction(site: Site) -> bytes:
    """The pre-label of ``pair``, which also stays on the server as ``original``."""
    options = {"profile": "balanced", "save_label": True, "label_tag": "original", "result_extension": ".nii.gz"}
    answer = site.server.infer("two-channels", "image=pair&output=image", options)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_a_scene_with_the_labels_of_every_model_is_read_by_name(site: Site, prediction: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scene.nii.gz"
    path.write_bytes(prediction)
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[array == 1] = 3  # Slicer numbers the segments of its scene: liver, spleen, tumour
    nib.save(nib.Nifti1Image(array, image.affine), path)
    segments = [{"name": name, "idx": number} for number, name in enumerate(("liver", "spleen", "tumour"), 1)]
    answer = save(site, "pair", path.read_bytes(), {"label_info": segments, "model": "tiny", "client_id": "ann"})
    assert answer.status_code == 200, answer.text
    stored = tags(site, "pair")["final"]["info"]
    assert stored["voxels"] == {"liver": 0, "spleen": 0, "tumour": int((array == 3).sum())}
    assert stored["reviewed"] == ["tumour"]
    assert stored["started_from"] == {"model": "two-channels", "version": "v1"}
    assert stored["client_id"] == "ann"


def test_every_submitted_label_survives_and_the_reviewer_tool_can_mark_it(site: Site, prediction: bytes) -> None:
    before = {tag for tag in tags(site, "pair") if tag.startswith("version_")}
    for _ in range(3):
        params = {"label_info": [{"name": "tumour", "idx": 1}]}
        assert save(site, "pair", prediction, params).status_code == 200
    added = sorted({tag for tag in tags(site, "pair") if tag.startswith("version_")} - before)
    assert len(added) >= 2
    meta = {
        "segmentationMeta": {"status": "approved", "level": "easy", "approvedBy": "dr", "comment": "", "editTime": 1}
    }
    url = f"{site.server.url}/datastore/label/info?label=pair&tag={added[0]}"
    assert httpx.put(url, data={"info": json.dumps(meta)}).status_code == 200
    assert tags(site, "pair")[added[0]]["info"]["segmentationMeta"]["approvedBy"] == "dr"
    content = httpx.get(f"{site.server.url}/datastore/label?label=pair&tag={added[0]}").content
    assert len(content) > 100


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "without the names of its segments"),
        ({"label_info": [{"name": "Segment_1", "idx": 1}]}, "Segment_1.*Known: liver, spleen, tumour"),
        ({"label_info": [{"name": "liver", "idx": 7}]}, "value 1, which no segment has"),
    ],
)
def test_a_label_nobody_can_read_is_refused_and_kept(
    site: Site, prediction: bytes, params: dict[str, Any], words: str
) -> None:
    answer = save(site, "half", prediction, params)
    assert answer.status_code == 422
    assert re.search(words, answer.json()["detail"]), answer.text
    kept = answer.json()["detail"].split("kept on the server as ")[1].rstrip(".")
    assert (site.home / kept).read_bytes() == prediction
    assert "final" not in tags(site, "half")


def test_a_label_of_another_image_is_refused(site: Site, prediction: bytes) -> None:
    answer = save(site, "case01", prediction, {"label_info": [{"name": "liver", "idx": 1}]})
    assert answer.status_code == 422
    assert "the label" in answer.json()["detail"]
    assert "the image" in answer.json()["detail"]
