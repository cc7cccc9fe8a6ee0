"""What 3D Slicer and OHIF read and send, from their own requests (``recorded/``) and their own rules for ``/info/``."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from requests_toolbelt.multipart import decoder

from factories import make_image
from live import Site


@pytest.fixture(scope="module")
def info(site: Site) -> dict[str, Any]:
    return dict(httpx.get(f"{site.server.url}/info/").json())


def test_info_has_no_top_level_config_which_slicer_takes_for_an_old_server(info: dict[str, Any]) -> None:
    assert "config" not in info


def test_top_level_labels_are_a_list_of_names(info: dict[str, Any]) -> None:
    assert isinstance(info["labels"], list)
    assert {"liver", "spleen", "tumour"} <= set(info["labels"])


def test_labels_of_a_model_count_from_one_without_background(info: dict[str, Any]) -> None:
    for model in info["models"].values():
        assert list(model["labels"].values()) == list(range(1, len(model["labels"]) + 1))
        assert "background" not in model["labels"]


def test_models_have_what_slicer_and_mitk_require(info: dict[str, Any]) -> None:
    for model in info["models"].values():
        assert model["type"] == "segmentation"
        assert model["dimension"] == 3
        assert isinstance(model["description"], str)
        assert model["description"]


def test_config_values_are_what_slicers_widgets_can_hold(info: dict[str, Any]) -> None:
    for model in info["models"].values():
        for value in model["config"].values():
            assert isinstance(value, bool | list | int | float | str)
            assert not isinstance(value, list) or (value and all(isinstance(item, str) for item in value))


def test_the_random_strategy_ohif_always_asks_for_exists(info: dict[str, Any]) -> None:
    assert info["strategies"]["random"]["description"]


def test_slicer_shows_its_train_widgets_for_every_model(info: dict[str, Any]) -> None:
    assert set(info["trainers"]) == set(info["models"])
    for trainer in info["trainers"].values():
        assert trainer["description"]
        assert trainer["config"]
        for value in trainer["config"].values():
            assert isinstance(value, bool | list | int | float | str)
            assert not isinstance(value, list) or (value and all(isinstance(item, str) for item in value))


def test_the_statistics_of_models_never_trained_are_what_both_viewers_can_calculate_with(info: dict[str, Any]) -> None:
    first = next(iter(info["train_stats"].values()))
    assert first.get("best_metric", 0) * 100 == 0  # Slicer
    assert 100 * first.get("epoch", 1) / first.get("total_epochs", 1) == 100
    assert not first.get("total_time")  # OHIF: nothing was trained


def test_the_datastore_counts_images_and_labels(info: dict[str, Any]) -> None:
    assert info["datastore"]["total"] >= 4
    assert "completed" in info["datastore"]


def test_slicers_request_gets_a_uint8_nrrd_on_the_images_grid(site: Site, recorded: Any, tmp_path: Path) -> None:
    request = recorded("slicer_infer", image="case01")
    answer = site.server.infer("tiny", request["query"], request["params"])
    params, file = _parts(answer, tmp_path)
    label, image = sitk.ReadImage(str(file)), sitk.ReadImage(str(site.studies / "case01.nii.gz"))
    assert label.GetPixelIDTypeAsString() == "8-bit unsigned integer"
    assert label.GetSize() == image.GetSize()
    np.testing.assert_allclose(label.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(label.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(label.GetSpacing(), image.GetSpacing(), atol=1e-5)
    assert list(params["label_names"].items()) == [("liver", 1), ("spleen", 2)]
    assert {"latencies", "centroids"} <= set(params)


def test_empty_options_mean_the_servers_defaults(site: Site) -> None:
    options = {"device": "", "profile": "", "folds": "", "result_extension": "", "result_dtype": "", "label_prompt": ""}
    assert site.server.infer("tiny", "image=case02&output=json", {**options, "profile": "balanced"}).status_code == 200
    answer = site.server.infer("tiny", "image=case02&output=json", options)
    assert answer.json()["provenance"]["profile"] == "accurate"
    assert answer.json()["provenance"]["folds"] == ["0", "1"]


def test_ohif_gets_raw_bytes_in_the_images_voxel_order(site: Site, recorded: Any, tmp_path: Path) -> None:
    request = recorded("ohif_auto_segmentation", image="case01")
    answer = site.server.infer("tiny", request["query"], request["params"])
    assert answer.status_code == 200
    header, _, voxels = answer.content.partition(b"\n\n")
    assert b"encoding: raw" in header
    image = nib.load(site.studies / "case01.nii.gz")
    assert len(voxels) == np.prod(image.shape)
    (tmp_path / "label.nrrd").write_bytes(answer.content)
    array, _ = nrrd.read(str(tmp_path / "label.nrrd"))
    np.testing.assert_array_equal(np.frombuffer(voxels, np.uint8).reshape(image.shape, order="F"), array)
    # The same voxels as the label another client gets as NIfTI.
    other = site.server.infer("tiny", "image=case01&output=image", {"result_extension": ".nii.gz"})
    (tmp_path / "label.nii.gz").write_bytes(other.content)
    np.testing.assert_array_equal(array, np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj))


def test_ohifs_class_prompt_returns_only_the_ticked_structure_under_its_own_value(
    site: Site, recorded: Any, tmp_path: Path
) -> None:
    everything = recorded("ohif_auto_segmentation", image="case02")
    one = recorded("ohif_class_prompts", image="case02")
    arrays = []
    for request in (everything, one):
        answer = site.server.infer("tiny", request["query"], request["params"])
        (tmp_path / "label.nrrd").write_bytes(answer.content)
        arrays.append(nrrd.read(str(tmp_path / "label.nrrd"))[0])
    np.testing.assert_array_equal(arrays[1], np.where(arrays[0] == 2, 2, 0))
    assert (arrays[1] == 2).any()


def test_ohifs_next_sample_has_an_id_a_path_and_a_name(site: Site, recorded: Any, tmp_path: Path) -> None:
    """Its stock panel says nothing of who it is; a case that nobody has in work is there for it."""
    with make_image(tmp_path / "free.nii.gz", (17, 19, 16), seed=21).open("rb") as file:
        httpx.put(f"{site.server.url}/datastore/?image=free", files={"file": file}).raise_for_status()
    request = recorded("ohif_next_sample")
    sample = httpx.post(site.server.url + request["path"], json=request["params"]).json()
    assert {"id", "path", "name"} <= set(sample)


def test_slicers_saved_label_keeps_names_and_who(site: Site, recorded: Any) -> None:
    label = site.server.infer("tiny", "image=case02&output=image", {"profile": "balanced"}).content
    request = recorded("slicer_save_label")
    answer = httpx.put(
        f"{site.server.url}/datastore/label?image=case02",
        data={"params": json.dumps(request["params"])},
        files={"label": ("label.nii.gz", label)},
    )
    assert (answer.json()["image"], answer.json()["label"]) == ("case02", "case02"), answer.text
    assert (set(answer.json()["reviewed"]), answer.json()["doubts"]) == ({"liver", "spleen"}, [])
    stored = httpx.get(f"{site.server.url}/datastore/label/info?label=case02&tag=final").json()
    assert stored["label_info"] == request["params"]["label_info"]
    assert stored["client_id"] == "user-xyz"


def test_mitk_sends_the_image_as_a_file_and_reads_the_json_part_first(site: Site) -> None:
    image = (site.studies / "case01.nii.gz").read_bytes()
    answer = site.server.infer(
        "tiny", "", {"result_extension": ".nii.gz", "profile": "balanced"}, file=("x.nii.gz", image)
    )
    assert answer.headers["content-type"].startswith("multipart/form-data")
    assert answer.content.index(b'name="params"') < answer.content.index(b'name="image"')


def test_the_server_answers_others_while_a_prediction_runs(site: Site) -> None:
    over = threading.Event()

    def predict() -> None:
        while not over.is_set():
            site.server.infer("tiny", "image=case01&output=json")

    worker, until = threading.Thread(target=predict), time.monotonic() + 60
    worker.start()
    seen: list[dict[str, Any]] = []
    with httpx.Client(timeout=30) as client:
        while not any(run["tiles_done"] for run in seen) and time.monotonic() < until:
            seen += client.get(f"{site.server.url}/mshub/status").json()["running"]
    over.set()
    worker.join()
    assert seen, "no request saw the running prediction"
    assert seen[0]["model"] == "tiny"
    assert seen[0]["image"] == "case01"
    assert max(run["tiles_done"] for run in seen) > 0


def _parts(answer: httpx.Response, folder: Path) -> tuple[dict[str, Any], Path]:
    """Split a multipart answer as a browser does: the JSON params and the image file."""
    assert answer.status_code == 200, answer.text
    parts = decoder.MultipartDecoder(answer.content, answer.headers["content-type"]).parts
    by_name = {part.headers[b"Content-Disposition"].split(b'name="')[1].split(b'"')[0]: part for part in parts}
    file = folder / "answer.nrrd"
    file.write_bytes(by_name[b"image"].content)
    return json.loads(by_name[b"params"].text), file
