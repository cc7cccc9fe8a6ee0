"""A real server on a real Orthanc, asked as OHIF and 3D Slicer ask: images in, corrections out, whatever happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest

import waiting
from dicom_series_factory import AXES, SeriesMaker, jpeg_2000, oblique, run_length
from factories import make_model_folder
from hospital import NAMES, PIXELS, Hospital, predicted, voxels
from live import LiveServer
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import read_seg, write_seg
from mshub.dicom_series import read_stack
from mshub.geometry import same_grid
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.volume_io import read_volume
from orthanc import Orthanc, free_port


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory, orthanc: Callable[..., Orthanc]) -> Iterator[Hospital]:
    folder = tmp_path_factory.mktemp("hospital")
    home = folder / "home"
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "models" / "tiny"))
    pair = make_model_folder(
        folder / "models" / "pair", channels=("T1c", "FLAIR"), labels={"background": 0, "tumour": 1}
    )
    add_model(ModelStore(home), "pair", pair)
    pacs = orthanc(folder / "pacs")
    server = LiveServer(home, ["--studies", pacs.dicomweb], folder)
    yield Hospital(pacs, server, home, folder)
    server.stop()


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AXES, "oblique", "oblique, other way"])
def test_every_orientation_is_predicted_pixel_by_pixel(hospital: Hospital, name: str) -> None:
    axes = AXES.get(name) or (oblique() if name == "oblique" else oblique(-25, 160, -70))
    maker = SeriesMaker(f"turned {name}", axes=axes, seed=3)
    folder = hospital.store(maker)
    answer = hospital.infer(maker.uid)
    assert answer.status_code == 200, answer.text
    found = voxels(answer.content, maker.shape)
    np.testing.assert_array_equal(found, predicted(hospital, folder))
    assert len(np.unique(found)) == 3


eventually = partial(waiting.eventually, seconds=60, every_s=1)


def test_a_new_study_is_there_at_once_and_nothing_was_downloaded_before(hospital: Hospital) -> None:
    before = hospital.get("/datastore/").json()["total"]
    maker = SeriesMaker("just arrived")
    hospital.store(maker)
    assert eventually(lambda: hospital.get("/datastore/").json()["total"] > before)
    assert hospital.get("/datastore/").json()["total"] == before + 1
    assert not list(hospital.home.glob(f"pacs/*/{maker.uid}.nii"))


def test_a_series_that_grew_is_fetched_again(hospital: Hospital) -> None:
    maker = SeriesMaker("still arriving")
    hospital.store(maker, lambda slices: slices[:12])
    assert hospital.infer(maker.uid).status_code == 200
    hospital.store(maker)
    time.sleep(2.1)
    most = int(np.prod(maker.shape))
    assert eventually(lambda: len(hospital.infer(maker.uid).content.partition(b"\n\n")[2]) == most)


def test_a_tilted_gantry_comes_back_on_its_own_slices(hospital: Hospital) -> None:
    maker = SeriesMaker("tilted", tilt=(0.0, 0.9))
    folder = hospital.store(maker)
    answer = hospital.infer(maker.uid)
    assert answer.status_code == 200, answer.text
    stack = read_stack(folder)
    assert stack.tilted
    np.testing.assert_array_equal(voxels(answer.content, maker.shape), stack.to_slices(predicted(hospital, folder)))
    assert hospital.submit(maker.uid, answer.content).json()["pacs"]["stored"]
    (seg,) = hospital.segs(maker)
    labels = read_seg(seg, stack)
    submitted = voxels(answer.content, maker.shape)
    for name, value in NAMES.items():
        np.testing.assert_array_equal(labels.array_xyz == labels.names[name], submitted == value)


@pytest.mark.parametrize("compress", [run_length, jpeg_2000], ids=lambda change: change.__name__)
def test_compressed_series_are_decoded(hospital: Hospital, compress: Callable[[Any], Any]) -> None:
    plain = SeriesMaker(f"plain {compress.__name__}", seed=5)
    packed = SeriesMaker(f"packed {compress.__name__}", seed=5)
    hospital.store(plain)
    hospital.store(packed, compress)
    first, second = hospital.infer(plain.uid), hospital.infer(packed.uid)
    assert second.status_code == 200, second.text
    np.testing.assert_array_equal(voxels(first.content, plain.shape), voxels(second.content, packed.shape))


# -- corrections -----------------------------------------------------------------------------------------------------


def test_a_correction_is_a_seg_in_the_pacs_voxel_for_voxel(hospital: Hospital) -> None:
    maker = SeriesMaker("corrected", axes=oblique(), seed=7)
    folder = hospital.store(maker)
    answer = hospital.infer(maker.uid, save_label=True)
    label = voxels(answer.content, maker.shape).copy()
    label[5:9, 5:9, 4:6] = NAMES["spleen"]
    reply = hospital.submit(maker.uid, header_of(answer.content) + label.tobytes(order="F"))
    assert reply.status_code == 200, reply.text
    assert reply.json()["pacs"]["stored"], reply.json()
    (seg,) = hospital.segs(maker)
    assert seg.SegmentationType == "BINARY"
    assert seg.SOPInstanceUID == reply.json()["pacs"]["SOPInstanceUID"]
    assert [str(segment.SegmentLabel) for segment in seg.SegmentSequence] == ["liver", "spleen"]
    assert {str(segment.SegmentAlgorithmType) for segment in seg.SegmentSequence} == {"SEMIAUTOMATIC"}
    labels = read_seg(seg, read_stack(folder))
    for name, value in NAMES.items():
        np.testing.assert_array_equal(labels.array_xyz == labels.names[name], label == value)
    kept = hospital.get(f"/mshub/export/{maker.uid}", format="nrrd")
    np.testing.assert_array_equal(voxels(kept.content, maker.shape), label)


def test_corrections_stored_by_others_are_taken_the_newest_wins_and_none_is_lost(hospital: Hospital) -> None:
    maker = SeriesMaker("outlined elsewhere", seed=8)
    folder = hospital.store(maker)
    stack = read_stack(folder)
    older, newer = np.zeros(maker.shape, np.uint8), np.zeros(maker.shape, np.uint8)
    older[4:8, 4:8, 3:7], newer[10:15, 10:15, 8:10] = 1, 2
    for number, (label, hour) in enumerate(((newer, "110000"), (older, "090000"))):
        path = hospital.folder / f"elsewhere{number}.dcm"
        write_seg(path, label, NAMES, stack, Facts(None, "outlined elsewhere", "Dr Else"))
        seg = pydicom.dcmread(path)
        seg.ContentDate = seg.SeriesDate = "20260301"
        seg.ContentTime = seg.SeriesTime = hour
        seg.save_as(path)
        hospital.pacs.upload([path])
    tags = hospital.get(f"/mshub/labels/{maker.uid}").json()["tags"]
    assert set(tags) == {"final", "version_1"}
    for tag, label in (("final", newer), ("version_1", older)):
        kept = hospital.get(f"/mshub/export/{maker.uid}", format="nrrd", tag=tag)
        np.testing.assert_array_equal(voxels(kept.content, maker.shape) > 0, label > 0)
    assert maker.uid in {case["image"] for case in finals(hospital)}


def test_what_a_program_outlined_is_no_correction(hospital: Hospital) -> None:
    maker = SeriesMaker("outlined by a program")
    stack = read_stack(hospital.store(maker))
    label = np.zeros(maker.shape, np.uint8)
    label[4:8, 4:8, 3:7] = 1
    path = hospital.folder / "program.dcm"
    write_seg(path, label, NAMES, stack, Facts(Algorithm("other", "v1"), "by a program"))
    hospital.pacs.upload([path])
    assert hospital.get(f"/mshub/labels/{maker.uid}").json()["tags"] == {}


def test_a_seg_nobody_can_read_breaks_nothing_else(hospital: Hospital) -> None:
    good, odd = SeriesMaker("readable"), SeriesMaker("label map")
    label = np.zeros(good.shape, np.uint8)
    label[4:8, 4:8, 3:7] = 1
    for maker, kind in ((good, "BINARY"), (odd, "LABELMAP")):
        path = hospital.folder / f"{kind}.dcm"
        write_seg(path, label, NAMES, read_stack(hospital.store(maker)), Facts(None, "drawn"))
        seg = pydicom.dcmread(path)
        seg.SegmentationType = kind
        seg.save_as(path)
        hospital.pacs.upload([path])
    assert "final" in hospital.get(f"/mshub/labels/{good.uid}").json()["tags"]
    assert hospital.get(f"/mshub/labels/{odd.uid}").json()["tags"] == {}
    assert hospital.get("/datastore/", output="train").status_code == 200
    assert "LABELMAP" in hospital.server.log.read_text()


def test_rtstruct_and_seg_on_request(hospital: Hospital) -> None:
    maker = SeriesMaker("for planning", seed=9)
    hospital.store(maker)
    for output, kind in (("dicom_rtstruct", "RTSTRUCT"), ("dicom_seg", "SEG")):
        answer = hospital.server.infer("tiny", f"image={maker.uid}&output={output}")
        assert answer.status_code == 200, answer.text
        path = hospital.folder / f"{kind}.dcm"
        path.write_bytes(answer.content)
        dataset = pydicom.dcmread(path)
        assert dataset.Modality == kind
        assert dataset.StudyInstanceUID == maker.study_uid


def test_slicers_client_goes_the_same_way(hospital: Hospital, tmp_path: Path) -> None:
    maker = SeriesMaker("0 first of the list", axes=oblique(), tilt=(0.0, 0.9))
    folder = hospital.store(maker)
    client = hospital.server.client(tmp_path)
    sample = client.next_sample("random", {"model": "tiny"})
    assert sample["id"]
    assert sample["why"].startswith("drawn at random")
    assert maker.uid in client.datastore()["objects"]
    image = tmp_path / "image.nii"
    image.write_bytes(hospital.get("/datastore/image", image=maker.uid).content)
    label, params = client.infer("tiny", maker.uid, {"result_extension": ".nrrd", "result_dtype": "uint8"})
    assert params["series_used"]["CT"]["SeriesInstanceUID"] == maker.uid
    shown, answered = read_volume(image), read_volume(Path(label), allow_constant=True)
    assert same_grid(answered.grid, shown.grid)  # the straightened image it shows, not the slices
    np.testing.assert_array_equal(answered.array_xyz, predicted(hospital, folder))
    info = [{"name": name, "idx": value} for name, value in NAMES.items()]
    reply = client.save_label(maker.uid, label, "final", {"label_info": info})
    assert reply["pacs"]["stored"], reply
    (seg,) = hospital.segs(maker)
    stack = read_stack(folder)
    stored = read_seg(seg, stack)
    for name, value in NAMES.items():
        expected = stack.to_slices(answered.array_xyz) == value
        np.testing.assert_array_equal(stored.array_xyz == stored.names[name], expected)


# -- several series of a study -------------------------------------------------------------------------------------


def mr(name: str, description: str, **options: Any) -> SeriesMaker:
    attributes = {"SeriesDescription": description, "RescaleSlope": None, "RescaleIntercept": None}
    return SeriesMaker(name, modality="MR", attributes=attributes, **options)


def test_channels_are_found_by_sequence_and_resampled(hospital: Hospital) -> None:
    contrast = mr("mr contrast", "Ax T1 POST GD", study="brain", seed=11)
    flair = mr("mr flair", "Ax T2 FLAIR", study="brain", seed=12, shape=(30, 26, 14), spacing=(1.2, 1.3, 3.3))
    plain = mr("mr plain", "Ax T1 PRE", study="brain", seed=13)
    for maker in (contrast, flair, plain):
        hospital.store(maker)
    answer = hospital.server.infer("pair", f"image={contrast.uid}&output=all", PIXELS)
    assert answer.status_code == 200, answer.text
    told = json.loads(answer.text[answer.text.index("{") : answer.text.index("}\r\n--") + 1])
    used = told["series_used"]
    assert used["T1c"]["SeriesInstanceUID"] == contrast.uid
    assert used["FLAIR"]["SeriesInstanceUID"] == flair.uid
    assert (used["T1c"]["resampled"], used["FLAIR"]["resampled"]) == (False, True)
    described = hospital.get("/mshub/channels/pair", image=contrast.uid).json()["channels"]
    assert [row["series"] for row in described] == [contrast.uid, flair.uid]
    chosen = hospital.infer(contrast.uid, "pair", series={"FLAIR": plain.uid})
    assert chosen.status_code == 200, chosen.text
    matched = hospital.infer(contrast.uid, "pair")
    assert not np.array_equal(voxels(chosen.content, contrast.shape), voxels(matched.content, contrast.shape))


def test_a_missing_sequence_is_named_with_what_the_study_has(hospital: Hospital) -> None:
    alone = mr("mr alone", "Ax T1 POST GD", study="half a brain")
    hospital.store(alone)
    answer = hospital.infer(alone.uid, "pair")
    assert answer.status_code == 422
    assert "FLAIR" in answer.json()["detail"]
    assert "Ax T1 POST GD" in answer.json()["detail"]


# -- the way to the PACS ---------------------------------------------------------------------------------------------


def test_the_proxy_keeps_the_query_and_reaches_nothing_but_dicomweb(hospital: Hospital) -> None:
    maker = SeriesMaker("proxied")
    hospital.store(maker)
    found = hospital.get("/proxy/dicom/studies", PatientID=maker.name.upper()).json()
    assert [item["00100020"]["Value"] for item in found] == [[maker.name.upper()]]
    frames = f"/proxy/dicom/studies/{maker.study_uid}/series/{maker.uid}/metadata"
    assert len(hospital.get(frames).json()) == maker.shape[2]
    for path in ("system", "../instances", "studies/../../system", "studies/..%2f..%2fsystem", "http://127.0.0.1/"):
        assert hospital.get(f"/proxy/dicom/{path}").status_code == 404, path
    assert httpx.delete(f"{hospital.server.url}/proxy/dicom/studies/{maker.study_uid}").status_code == 405
    assert hospital.get("/proxy/dicom/studies", PatientID=maker.name.upper()).json()


def test_unknown_images_are_a_sentence(hospital: Hospital) -> None:
    for image, expected in (
        ("1.2.3.4.5", "no CT or MR series"),
        ("../../etc", "no image"),
        ("x" * 300, "expected a Series"),
    ):
        answer = hospital.infer(image)
        assert answer.status_code == 404, answer.text
        assert expected in answer.json()["detail"]


# -- the PACS is down ------------------------------------------------------------------------------------------------


def test_the_server_starts_without_its_pacs_and_finds_it_later(tmp_path: Path, orthanc: Callable[..., Orthanc]) -> None:
    add_model(ModelStore(tmp_path / "home"), "tiny", make_model_folder(tmp_path / "tiny"))
    port = free_port()
    server = LiveServer(tmp_path / "home", ["--studies", f"http://127.0.0.1:{port}/dicom-web"], tmp_path)
    maker = SeriesMaker("in a cellar")
    try:
        started = time.monotonic()
        info = httpx.get(f"{server.url}/info/", timeout=30).json()
        answer = server.infer("tiny", f"image={maker.uid}&output=image")
        assert time.monotonic() - started < 10
        assert not info["mshub"]["pacs"]["reachable"]
        assert answer.status_code == 503
        assert "does not answer" in answer.json()["detail"]
        with orthanc(tmp_path / "pacs", port=port) as pacs:
            pacs.upload(sorted(maker.write(tmp_path / "series").iterdir()))
            time.sleep(2.5)
            assert server.infer("tiny", f"image={maker.uid}&output=image").status_code == 200
            assert httpx.get(f"{server.url}/info/", timeout=30).json()["mshub"]["pacs"]["reachable"]
    finally:
        server.stop()


def test_a_correction_waits_for_a_pacs_that_is_down(hospital: Hospital) -> None:
    maker = SeriesMaker("submitted at night", seed=14)
    hospital.store(maker)
    label = hospital.infer(maker.uid).content
    hospital.pacs.stop()
    try:
        reply = hospital.submit(maker.uid, label)
        assert reply.status_code == 200, reply.text
        assert not reply.json()["pacs"]["stored"]
        assert "sent later" in reply.json()["pacs"]["message"]
    finally:
        hospital.pacs.start()

    def is_stored() -> bool:
        hospital.get("/info/")
        return bool(hospital.get(f"/mshub/labels/{maker.uid}").json()["tags"]["final"]["pacs"]["stored"])

    assert eventually(is_stored)
    assert len(hospital.segs(maker)) == 1


def test_credentials_are_used_and_wrong_ones_are_a_sentence(
    tmp_path: Path, orthanc: Callable[..., Orthanc], monkeypatch: pytest.MonkeyPatch
) -> None:
    pacs = orthanc(tmp_path / "pacs", users={"mshub": "secret"})
    add_model(ModelStore(tmp_path / "home"), "tiny", make_model_folder(tmp_path / "tiny"))
    maker = SeriesMaker("behind a password")
    pacs.upload(sorted(maker.write(tmp_path / "series").iterdir()))
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_USERNAME", "mshub")
    for password, status in (("secret", 200), ("wrong", 502)):
        monkeypatch.setenv("MONAI_LABEL_DICOMWEB_PASSWORD", password)
        server = LiveServer(tmp_path / "home", ["--studies", pacs.dicomweb], tmp_path)
        try:
            answer = server.infer("tiny", f"image={maker.uid}&output=image")
            assert answer.status_code == status, answer.text
            searched = httpx.get(f"{server.url}/proxy/dicom/studies", timeout=30)
            assert searched.status_code == (200 if status == 200 else 401)
            assert "secret" not in server.log.read_text()
        finally:
            server.stop()
        # nothing of the first server's copies may stand in for the answer of the second
        for path in (tmp_path / "home" / "pacs").rglob("*.nii"):
            path.unlink()
    assert "credentials" in answer.json()["detail"]


# -- small things ----------------------------------------------------------------------------------------------------


def header_of(nrrd: bytes) -> bytes:
    return nrrd[: nrrd.index(b"\n\n") + 2]


def finals(hospital: Hospital) -> list[dict[str, str]]:
    listed = hospital.get("/datastore/", output="train").json()
    return [{"image": Path(case["image"]).name.removesuffix(".nii")} for case in listed]
