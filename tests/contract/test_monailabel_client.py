"""The loop as MONAI Label's own Python client drives it; Slicer uses the same class."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from factories import make_image, make_model_folder
from live import Site
from mshub.install import add_model
from mshub.store import ModelStore
from waiting import eventually

BALANCED = {"profile": "balanced"}


@pytest.fixture
def client(site: Site, tmp_path: Path) -> MONAILabelClient:
    return site.server.client(tmp_path)


def test_info_names_every_installed_model(client: MONAILabelClient) -> None:
    info = client.info()
    assert set(info["models"]) == {"tiny", "two-channels"}
    assert info["models"]["tiny"]["labels"] == {"liver": 1, "spleen": 2}


def test_a_segmentation_comes_back_on_the_grid_of_the_image(client: MONAILabelClient, site: Site) -> None:
    label, params = client.infer("tiny", "case01", BALANCED)
    image, result = nib.load(site.studies / "case01.nii.gz"), nib.load(label)
    np.testing.assert_allclose(result.affine, image.affine, atol=1e-5)
    assert result.shape == image.shape
    assert result.get_data_dtype() == np.uint8
    assert params["label_names"] == {"liver": 1, "spleen": 2}
    counts = {name: int((np.asarray(result.dataobj) == value).sum()) for name, value in params["label_names"].items()}
    assert params["voxel_counts"] == counts
    assert params["model_version"] == "v1"


def test_two_files_of_one_case_are_the_channels_of_one_image(client: MONAILabelClient) -> None:
    assert "pair" in client.datastore()["objects"]
    assert "pair_0001" not in client.datastore()["objects"]
    _, params = client.infer("two-channels", "pair", BALANCED)
    assert params["label_names"] == {"tumour": 1}


def test_a_missing_channel_is_named(client: MONAILabelClient) -> None:
    with pytest.raises(MONAILabelClientException, match=r"1 image file.*T1, T2"):
        client.infer("two-channels", "half", BALANCED)


def test_a_session_is_created_used_and_removed(client: MONAILabelClient, tmp_path: Path) -> None:
    path = make_image(tmp_path / "own scan.nii.gz", (19, 23, 16), seed=9)
    session = client.create_session(str(path))["session_id"]
    label, _ = client.infer("tiny", "", BALANCED, session_id=session)
    assert nib.load(label).shape == (19, 23, 16)
    client.remove_session(session)
    with pytest.raises(MONAILabelClientException, match="does not exist or has expired"):
        client.infer("tiny", "", BALANCED, session_id=session)


def test_a_file_sent_with_the_request_is_segmented_and_not_kept(
    client: MONAILabelClient, site: Site, tmp_path: Path
) -> None:
    path = make_image(tmp_path / "upload.nii.gz", (18, 17, 19), seed=10)
    label, _ = client.infer("tiny", "", BALANCED, file=str(path))
    assert nib.load(label).shape == (18, 17, 19)
    assert not list(site.studies.rglob("*upload*"))


def test_an_uploaded_image_gets_the_id_it_was_given(client: MONAILabelClient, tmp_path: Path) -> None:
    path = make_image(tmp_path / "1.2.840.77.nii.gz", (17, 21, 16), seed=11)
    assert client.upload_image(str(path), "1.2.840.77")["image"] == "1.2.840.77"
    label, _ = client.infer("tiny", "1.2.840.77", BALANCED)
    assert nib.load(label).shape == (17, 21, 16)


def test_the_next_sample_is_an_image_without_label(client: MONAILabelClient) -> None:
    sample = client.next_sample("random", {})
    assert sample["id"] in client.datastore()["objects"]
    assert sample["path"].endswith(sample["name"])
    assert "." in sample["name"]


def test_a_saved_label_is_stored_counted_and_read_back(client: MONAILabelClient, tmp_path: Path) -> None:
    label, _ = client.infer("tiny", "case02", BALANCED)
    before = np.asarray(nib.load(label).dataobj)
    params = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
    client.save_label("case02", label, params=params)
    stored = client.download_label("case02", "final")
    np.testing.assert_array_equal(np.asarray(nib.load(stored).dataobj), before)
    info = client.info()["datastore"]
    assert info["completed"] >= 1
    assert client.datastore()["objects"]["case02"]["labels"]["final"]["info"]["label_info"] == params["label_info"]


def test_a_prelabel_is_kept_with_the_version_that_made_it(client: MONAILabelClient) -> None:
    client.infer("tiny", "case01", {**BALANCED, "save_label": True, "label_tag": "original"})
    label = client.datastore()["objects"]["case01"]["labels"]["original"]["info"]
    assert label["params"]["model_version"] == "v1"
    assert label["params"]["label_names"] == {"liver": 1, "spleen": 2}


def test_batch_inference_prelabels_the_unlabelled(client: MONAILabelClient, site: Site) -> None:
    before = _prelabelled(client)
    # The body MONAI Label itself proposes, with a limit.
    params = {"profile": "balanced", "device": "cuda", "multi_gpu": True, "gpus": "all", "max_workers": 1}
    params.update(save_label=True, label_tag="original", max_batch_size=1)
    started = httpx.post(f"{site.server.url}/batch/infer/tiny?images=unlabeled", json=params)
    assert started.status_code == 200, started.text
    deadline = time.monotonic() + 240
    status = {}
    while time.monotonic() < deadline and status.get("status") not in ("DONE", "ERROR"):
        time.sleep(1)
        status = httpx.get(f"{site.server.url}/batch/infer").json()
    assert status["status"] == "DONE", status
    eventually(lambda: _prelabelled(client) != before, 60)  # through the server's watch over the folder
    assert len(_prelabelled(client) - before) == 1


def _prelabelled(client: MONAILabelClient) -> set[str]:
    return {name for name, image in client.datastore()["objects"].items() if "original" in image["labels"]}


def test_no_training_is_running(client: MONAILabelClient) -> None:
    assert client.train_status(check_if_running=True) is False


def test_a_promoted_version_serves_the_next_request(client: MONAILabelClient, site: Site, tmp_path: Path) -> None:
    store = ModelStore(site.home)
    newer = add_model(store, "tiny", make_model_folder(tmp_path / "newer", seed=77))
    assert client.infer("tiny", "case01", BALANCED)[1]["model_version"] == "v1"
    store.promote("tiny", newer.version, "test")
    try:
        label, params = client.infer("tiny", "case01", BALANCED)
        assert params["model_version"] == newer.version
    finally:
        store.rollback("tiny")
    old, params = client.infer("tiny", "case01", BALANCED)
    assert params["model_version"] == "v1"
    assert not np.array_equal(np.asarray(nib.load(label).dataobj), np.asarray(nib.load(old).dataobj))
