"""The series of a PACS as a datastore: complete or refused, and what becomes of labels whatever the PACS does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from fastapi import HTTPException

from dicom_series_factory import SeriesMaker
from fake_pacs import FakePacs
from lib import pacs as pacs_module
from lib import pacs_receiving, pacs_sending
from lib.activelearning import case_look as case_look_module
from lib.activelearning.case_look import CaseLook
from lib.activelearning.offers import unlabelled
from lib.exports import export_label
from lib.pacs import PacsStudies
from lib.pacs_errors import PacsError, PacsUnreachable
from mshub.card_tables import Channel
from mshub.dicom_derived import Algorithm, Facts
from mshub.dicom_seg import read_seg, write_seg
from mshub.dicom_series import read_series, read_stack
from mshub.volume_io import read_volume, write_volume

pytestmark = pytest.mark.usefixtures("monailabel_here")
NAMES = {"liver": 1, "spleen": 2}
MAKER = SeriesMaker("a series")
LABEL_INFO = {"label_info": [{"name": name, "idx": value} for name, value in NAMES.items()], "client_id": "dr"}


@pytest.fixture
def open_pacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PacsStudies]:
    """Return a function that opens a datastore on a PACS, which forgets nothing it has looked up for a while."""
    for name in ("LISTED_S", "SEEN_S"):
        monkeypatch.setattr(pacs_module, name, -1.0)
    monkeypatch.setattr(pacs_receiving, "SEEN_S", -1.0)
    monkeypatch.setattr(pacs_sending, "RETRY_S", -1.0)
    monkeypatch.setattr("lib.pacs_session.SLOW_S", float("inf"))

    def opened(client: FakePacs, **options: Any) -> PacsStudies:
        return PacsStudies(
            client,  # type: ignore[arg-type]
            str(tmp_path / "copies"),
            lambda: set(NAMES),
            dict,
            tmp_path / "refused",
            ("CT", "MR"),
            **options,
        )

    return opened


def sent_again(pacs: PacsStudies) -> dict[str, Any]:
    """Let labels be sent that wait; returns what is noted of that of `MAKER`."""
    pacs.list_images()
    pacs._sender._again.join(10)
    assert not pacs._sender._again.is_alive()
    return dict(pacs.get_label_info(MAKER.uid, "final")["pacs"])


def segs_in(remote: FakePacs) -> list[str]:
    return [str(item.SOPInstanceUID) for item in remote.objects if item.Modality == "SEG"]


@pytest.fixture
def label(tmp_path: Path) -> Path:
    """Return a label of `MAKER`, a liver and a spleen of a few voxels."""
    array = np.zeros(MAKER.shape, np.uint8)
    array[4:9, 5:9, 3:8], array[12:15, 5:9, 9:12] = 1, 2
    path = tmp_path / "label.nrrd"
    write_volume(path, array, read_series(MAKER.write(tmp_path / "series")).grid)
    return path


def seg(
    tmp_path: Path, maker: SeriesMaker = MAKER, facts: Facts | None = None, hour: str = "110000"
) -> pydicom.Dataset:
    """Return a SEG that somebody else made of a series."""
    array = np.zeros(maker.shape, np.uint8)
    array[2:5, 2:5, 2:4] = 1
    folder = tmp_path / f"source {maker.name}"
    if not folder.is_dir():
        maker.write(folder)
    write_seg(tmp_path / "seg.dcm", array, NAMES, read_stack(folder), facts or Facts(None, "drawn", "Dr Else"))
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    dataset.ContentDate, dataset.ContentTime = "20990101", hour
    return dataset


# -- images ---------------------------------------------------------------------------------------------------------


def test_requests_at_the_same_time_get_one_whole_series(open_pacs: Any) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    paths: list[str] = []
    threads = [threading.Thread(target=lambda: paths.append(pacs.get_image_uri(MAKER.uid))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert len(remote.downloads) == 1
    assert nib.load(paths[0]).shape == MAKER.shape


def test_nothing_is_asked_for_at_the_start_and_nothing_downloaded_to_list(open_pacs: Any) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    assert remote.questions == 0
    assert pacs.list_images() == [MAKER.uid]
    assert pacs.get_image_info(MAKER.uid)["PatientID"] == "A SERIES"
    assert pacs.get_unlabeled_images() == [MAKER.uid]
    assert remote.downloads == []


def test_what_the_pacs_lists_and_does_not_send_is_refused_and_not_kept(open_pacs: Any, tmp_path: Path) -> None:
    remote = FakePacs(MAKER.slices())
    remote.lost = {len(MAKER.slices()) - 1}  # the last slice: what arrives is a regular stack
    pacs = open_pacs(remote)
    with pytest.raises(HTTPException, match=r"lists 18 instances .* and sent 17") as caught:
        pacs.get_image_uri(MAKER.uid)
    assert caught.value.status_code == 502
    assert not list((tmp_path / "copies").rglob("*.dcm"))
    remote.lost = set()
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape == MAKER.shape


def test_a_series_with_a_gap_is_refused_and_one_that_grew_is_fetched_again(open_pacs: Any) -> None:
    slices = MAKER.slices()
    remote = FakePacs(slices[:8] + slices[9:])
    pacs = open_pacs(remote)
    with pytest.raises(HTTPException, match="1 missing") as caught:
        pacs.get_image_uri(MAKER.uid)
    assert caught.value.status_code == 422
    remote.objects = slices[:12]
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape[2] == 12
    remote.objects = slices
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape[2] == 18


@pytest.mark.parametrize("lost", [0, 5, 17])
@pytest.mark.parametrize("counts", [True, False], ids=["counted", "not counted"])
def test_the_copy_of_a_series_that_grew_is_used_no_more_even_if_the_rest_does_not_come(
    open_pacs: Any, counts: bool, lost: int
) -> None:
    slices = MAKER.slices()
    remote = FakePacs(slices[:12])
    remote.counts = counts
    pacs = open_pacs(remote)
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape[2] == 12
    remote.objects, remote.lost = slices, {lost}
    for _ in range(2):
        with pytest.raises(HTTPException, match=r"lists 18 instances .* sent 17"):
            pacs.get_image_uri(MAKER.uid)
    remote.lost = set()
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape[2] == 18


def test_while_the_pacs_is_down_a_copy_counts_only_if_it_has_all_that_was_listed_last(open_pacs: Any) -> None:
    slices = MAKER.slices()
    remote = FakePacs(slices[:12])
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)
    remote.objects = slices
    pacs.list_images()
    remote.down = True
    for opened in (pacs, open_pacs(remote)):
        with pytest.raises(HTTPException, match="does not answer"):
            opened.get_image_uri(MAKER.uid)
    remote.down = False
    pacs.get_image_uri(MAKER.uid)
    remote.down = True
    for opened in (pacs, open_pacs(remote)):
        assert nib.load(opened.get_image_uri(MAKER.uid)).shape[2] == 18


def test_a_pacs_that_counts_nothing_may_be_down_too_and_one_that_miscounts_sends_a_series_once(
    open_pacs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    remote.counts = False
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)
    remote.down = True
    assert nib.load(pacs.get_image_uri(MAKER.uid)).shape == MAKER.shape
    miscounting = FakePacs(MAKER.slices())
    listed = miscounting.series()
    listed[0].NumberOfSeriesRelatedInstances = 17
    monkeypatch.setattr(miscounting, "series", lambda **search: listed if search["Modality"] == "CT" else [])
    again = open_pacs(miscounting)
    paths = {again.get_image_uri(MAKER.uid) for _ in range(3)}
    assert [nib.load(path).shape for path in paths] == [MAKER.shape]
    assert len(miscounting.downloads) == 1


@pytest.mark.parametrize("series", ["1.2.3", "../x", "1.2/../../x", "", "a", "1" * 65, "1..2", "١.٢"])
def test_what_the_pacs_does_not_have_is_a_404(open_pacs: Any, series: str) -> None:
    with pytest.raises(HTTPException) as caught:
        open_pacs(FakePacs(MAKER.slices())).get_image_uri(series)
    assert caught.value.status_code == 404


def test_uploads_removals_and_tags_that_climb_are_refused(open_pacs: Any, label: Path, tmp_path: Path) -> None:
    pacs = open_pacs(FakePacs(MAKER.slices()))
    with pytest.raises(HTTPException, match="store the image there"):
        pacs.add_image("../../x", str(label), {})
    with pytest.raises(HTTPException, match="remove the series there"):
        pacs.remove_image(MAKER.uid)
    with pytest.raises(HTTPException, match=r"label tag.*refused"):
        pacs.save_label(MAKER.uid, str(label), "../../x", LABEL_INFO)
    assert not list(tmp_path.rglob("x"))


def test_the_index_outlives_the_copies(open_pacs: Any, label: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    Path(pacs.get_image_uri(MAKER.uid)).unlink()
    again = open_pacs(remote)
    assert again.get_labeled_images() == [MAKER.uid]
    assert again.reviewed_cases()[0].images[0].is_file()


# -- labels -----------------------------------------------------------------------------------------------------------


def test_a_final_label_is_a_seg_and_is_not_taken_for_somebody_elses(
    open_pacs: Any, label: Path, tmp_path: Path
) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    stored = [item for item in remote.objects if item.Modality == "SEG"]
    read = read_seg(stored[0], read_stack(tmp_path / "series"))
    np.testing.assert_array_equal(read.array_xyz, read_volume(label, allow_constant=True).array_xyz)
    pacs.take_in(MAKER.uid)
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["SOPInstanceUID"] == stored[0].SOPInstanceUID


def test_a_label_is_kept_while_the_pacs_is_down_and_sent_once_it_answers(open_pacs: Any, label: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)
    remote.down = True
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    note = pacs.get_label_info(MAKER.uid, "final")["pacs"]
    assert not note["stored"]
    assert "sent later" in note["message"]
    assert pacs.status()["completed"] == 1
    remote.down = False
    assert sent_again(pacs)["stored"]
    assert [item.Modality for item in remote.objects].count("SEG") == 1


def test_a_full_disk_after_a_label_was_stored_is_no_reason_to_say_it_was_not(
    open_pacs: Any, label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(pacs_sending, "write_seg", full)
    monkeypatch.setattr(pacs, "changing_label", full)
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    monkeypatch.undo()
    again = open_pacs(remote)
    assert again.get_label_info(MAKER.uid, "final")["pacs"]["waits"]
    assert sent_again(again)["stored"]


def test_a_label_that_the_pacs_kept_without_an_answer_is_not_sent_twice(open_pacs: Any, label: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    remote.hangs_up = True
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    assert not pacs.get_label_info(MAKER.uid, "final")["pacs"]["stored"]
    remote.hangs_up = False
    note = sent_again(open_pacs(remote))
    assert note["stored"]
    assert [note["SOPInstanceUID"]] == segs_in(remote)


def test_what_became_of_a_label_is_noted_with_that_one_though_another_was_submitted_meanwhile(
    open_pacs: Any, label: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    volume = read_volume(label, allow_constant=True)
    write_volume(tmp_path / "liver.nrrd", np.where(volume.array_xyz == 1, 1, 0).astype(np.uint8), volume.grid)
    arrived, go_on, store = threading.Event(), threading.Event(), remote.store

    def slowly(instance: Any) -> None:
        monkeypatch.setattr(remote, "store", store)
        arrived.set()
        assert go_on.wait(10)
        store(instance)

    monkeypatch.setattr(remote, "store", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pacs.save_label, MAKER.uid, str(label), "final", {**LABEL_INFO, "client_id": "first"})
        assert arrived.wait(10)
        second = pool.submit(pacs.save_label, MAKER.uid, str(tmp_path / "liver.nrrd"), "final", LABEL_INFO)
        until = time.monotonic() + 10
        while "version_1" not in pacs.get_labels_by_image_id(MAKER.uid) and time.monotonic() < until:
            time.sleep(0.01)
        assert "SOPInstanceUID" not in pacs.get_label_info(MAKER.uid, "final")["pacs"], "the first one's"
        go_on.set()
        first.result(), second.result()
    segs = {item.SOPInstanceUID: item for item in remote.objects if item.Modality == "SEG"}
    notes = {tag: pacs.get_label_info(MAKER.uid, tag)["pacs"] for tag in ("version_1", "final")}
    assert [note["stored"] for note in notes.values()] == [True, True]
    structures = {tag: len(segs[note["SOPInstanceUID"]].SegmentSequence) for tag, note in notes.items()}
    assert structures == {"version_1": 2, "final": 1}


def test_a_label_whose_series_was_never_here_is_kept_aside_while_the_pacs_is_down(
    open_pacs: Any, label: Path, tmp_path: Path
) -> None:
    remote = FakePacs(MAKER.slices())
    remote.down = True
    with pytest.raises(HTTPException, match="is kept on the server as") as caught:
        open_pacs(remote).save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    assert caught.value.status_code == 503
    assert [path.suffix for path in (tmp_path / "refused").iterdir() if path.suffix != ".json"] == [".nrrd"]


def test_what_the_pacs_will_never_take_is_said_and_not_sent_again(open_pacs: Any, label: Path, tmp_path: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    empty = tmp_path / "empty.nrrd"
    volume = read_volume(label, allow_constant=True)
    write_volume(empty, volume.array_xyz * 0, volume.grid)
    pacs.save_label(MAKER.uid, str(empty), "final", LABEL_INFO)
    note = pacs.get_label_info(MAKER.uid, "final")["pacs"]
    assert "empty" in note["message"]
    assert not note["waits"]
    assert sent_again(pacs) == note
    assert segs_in(remote) == []


def test_a_label_that_is_refused_holds_up_nobody_and_is_tried_less_and_less_often(
    open_pacs: Any, label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    remote.refuses_objects = True
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    asked = threading.Event()
    monkeypatch.setattr(pacs._sender, "_stored", lambda *_: (asked.wait(10), {"message": "refused"})[1])
    pacs._sender._again.join(10)
    pacs._sender._pauses.clear()
    pacs.list_images()
    assert pacs._sender._again.is_alive(), "asked for images, one waits for no label"
    asked.set()
    pacs._sender._again.join(10)
    monkeypatch.undo()
    pauses = []
    for _ in range(3):
        pacs._sender.send(MAKER.uid)
        pauses.append(pacs._sender._pauses[MAKER.uid][1])
    assert [pause / pauses[0] for pause in pauses] == [1, 2, 4]


def test_one_label_that_cannot_be_made_does_not_keep_back_the_others(
    open_pacs: Any, label: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = SeriesMaker("another one", seed=2)
    remote = FakePacs(MAKER.slices(), other.slices())
    pacs = open_pacs(remote)
    remote.refuses_objects = True
    for uid in (MAKER.uid, other.uid):
        pacs.save_label(uid, str(label), "final", LABEL_INFO)
    pacs._sender._again.join(10)
    remote.refuses_objects = False
    write = pacs_sending.write_seg

    def of_the_other(path: Path, labels: Any, names: Any, stack: Any, facts: Any) -> Any:
        if str(stack.headers[0].SeriesInstanceUID) == MAKER.uid:
            raise ValueError(f"{stack.headers[0].PatientName} is what the header says")
        return write(path, labels, names, stack, facts)

    monkeypatch.setattr(pacs_sending, "write_seg", of_the_other)
    note = sent_again(pacs)
    assert (note["stored"], note["waits"]) == (False, False)
    assert "ValueError" in note["message"]
    assert "of_the_other" in caplog.text
    assert str(MAKER.slices()[0].PatientName) not in caplog.text + note["message"]
    assert pacs.get_label_info(other.uid, "final")["pacs"]["stored"]


def test_an_odd_value_in_a_header_stays_behind(open_pacs: Any, label: Path) -> None:
    slices = MAKER.slices()
    for one in slices:
        one.PatientWeight = "70.5"
        one[0x00101020] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(0x00101020), "DS", 4, b"1,75", 0, False, True)
    remote = FakePacs(slices)
    pacs = open_pacs(remote)
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["stored"]
    (seg,) = [item for item in remote.objects if item.Modality == "SEG"]
    assert "PatientSize" not in seg
    assert seg.PatientWeight == 70.5


def test_a_series_whose_copy_was_removed_is_fetched_again_to_send_its_label(open_pacs: Any, label: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    remote.refuses_objects = True
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    pacs._files.drop(MAKER.uid, 0)
    remote.refuses_objects = False
    assert sent_again(pacs)["stored"]
    assert len(segs_in(remote)) == 1


def test_a_label_from_before_labels_had_marks_is_sent_once(open_pacs: Any, label: Path) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.save_prediction(MAKER.uid, label, "original", {"params": {}})
    remote.refuses_objects = True
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    pacs.update_label_info(MAKER.uid, "final", {"pacs": {"stored": False, "waits": True, "message": ""}})
    remote.refuses_objects = False
    assert sent_again(pacs)["stored"]
    assert "pacs" not in pacs.get_label_info(MAKER.uid, "original")


def test_a_process_of_the_server_neither_sends_labels_nor_takes_them_in(
    open_pacs: Any, label: Path, tmp_path: Path
) -> None:
    remote = FakePacs(MAKER.slices())
    server = open_pacs(remote)
    remote.refuses_objects = True
    server.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    remote.refuses_objects = False
    remote.objects.append(seg(tmp_path))
    task = open_pacs(remote, exchanges_labels=False)
    task.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    assert task.list_images() == task.get_labeled_images() == [MAKER.uid]
    assert task.take_in(MAKER.uid) == []
    assert task.get_label_info(MAKER.uid, "final")["client_id"] == "dr"
    assert len(segs_in(remote)) == 1
    assert sent_again(server)["stored"], "the server does"


def test_a_label_of_ours_is_not_taken_for_anothers_though_the_notes_are_lost(
    open_pacs: Any, label: Path, tmp_path: Path
) -> None:
    remote = FakePacs(MAKER.slices())
    open_pacs(remote).save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    (tmp_path / "copies" / "segs.json").write_text("{damaged")
    again = open_pacs(remote)
    again.take_in(MAKER.uid)
    assert set(again.get_labels_by_image_id(MAKER.uid)) == {"final"}
    assert again.get_label_info(MAKER.uid, "final")["client_id"] == "dr"


@pytest.mark.parametrize("made", ["never", "9999-01-01T00:00:00+00:00"])
def test_when_a_label_was_made_is_nobodys_to_say(open_pacs: Any, label: Path, tmp_path: Path, made: str) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.save_label(MAKER.uid, str(label), "final", {**LABEL_INFO, "made": made})
    later = seg(tmp_path)
    later.ContentDate = "20990101"
    remote.objects.append(later)
    pacs.take_in(MAKER.uid)
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["SOPInstanceUID"] == later.SOPInstanceUID


def test_one_odd_object_in_the_pacs_does_not_keep_back_the_others(
    open_pacs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    odd, fine = seg(tmp_path), seg(tmp_path)
    odd.ContentDate = "19990101"
    remote.objects += [odd, fine]
    pacs, read = open_pacs(remote), pacs_receiving.read_seg

    def reads(dataset: Any, stack: Any) -> Any:
        if dataset is odd:
            raise KeyError("of pydicom")
        return read(dataset, stack)

    monkeypatch.setattr(pacs_receiving, "read_seg", reads)
    assert [left["SOPInstanceUID"] for left in pacs.take_in(MAKER.uid)] == [odd.SOPInstanceUID]
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["SOPInstanceUID"] == fine.SOPInstanceUID


def test_who_asks_for_a_series_that_is_not_there_has_the_pacs_asked_for_that_one(
    open_pacs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_module, "LISTED_S", 60.0)
    remote, other = FakePacs(MAKER.slices()), SeriesMaker("just arrived")
    pacs, asked, listing = open_pacs(remote), list[dict[str, str]](), remote.series
    pacs.list_images()
    monkeypatch.setattr(remote, "series", lambda **search: (asked.append(search), listing())[1])  # heeds no filter
    for _ in range(2):
        with pytest.raises(HTTPException, match="has no CT"):
            pacs.get_image_info(other.uid)
    remote.objects += other.slices()
    assert pacs.get_image_info(other.uid)["SeriesInstanceUID"] == other.uid
    assert [search for search in asked if search] == [{"SeriesInstanceUID": other.uid}] * 3
    assert set(pacs.list_images()) == {MAKER.uid, other.uid}


def test_only_the_first_seconds_of_a_long_look_for_labels_are_waited_for(
    open_pacs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_receiving, "WAIT_S", 3.0)
    pacs, over = open_pacs(FakePacs(MAKER.slices())), threading.Event()
    monkeypatch.setattr(pacs._receiver, "look_now", over.wait)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        pacs.status()
        seconds.append(time.monotonic() - started)
    over.set()
    assert seconds[0] >= 3
    assert max(seconds[1:]) < 2.5


def test_segs_of_others_become_labels_the_newest_final_and_each_once(
    open_pacs: Any, label: Path, tmp_path: Path
) -> None:
    newer, older = seg(tmp_path, hour="110000"), seg(tmp_path, hour="090000")
    remote = FakePacs(MAKER.slices(), [newer])
    pacs = open_pacs(remote)
    pacs.take_in(MAKER.uid)
    remote.objects.append(older)
    pacs.take_in(MAKER.uid)
    pacs.take_in(MAKER.uid)
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final", "version_1"}
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["SOPInstanceUID"] == newer.SOPInstanceUID
    assert pacs.get_label_info(MAKER.uid, "final")["client_id"] == "Dr Else"
    assert pacs.get_label_info(MAKER.uid, "final")["reviewed"] == ["liver"]
    assert [case.case_id for case in pacs.reviewed_cases()] == [MAKER.uid]


@pytest.mark.parametrize("what", ["a program's", "other names", "another series"])
def test_segs_that_are_no_correction_are_left_alone(open_pacs: Any, tmp_path: Path, what: str) -> None:
    other = SeriesMaker("another series")
    found = {
        "a program's": lambda: seg(tmp_path, facts=Facts(Algorithm("model", "v1"), "automatic")),
        "other names": lambda: seg(tmp_path),
        "another series": lambda: seg(tmp_path, other),
    }[what]()
    if what == "other names":
        found.SegmentSequence[0].SegmentLabel = "something else"
    pacs = open_pacs(FakePacs(MAKER.slices(), [found]))
    pacs.take_in(MAKER.uid)
    assert pacs.get_labels_by_image_id(MAKER.uid) == {}


def test_a_seg_nobody_can_read_is_refused_once_and_stops_nothing(
    open_pacs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, good = seg(tmp_path), seg(tmp_path)
    broken.SegmentationType = "LABELMAP"
    remote = FakePacs(MAKER.slices(), [broken], [good])
    pacs = open_pacs(remote)
    pacs.take_in(MAKER.uid)
    pacs.take_in(MAKER.uid)
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}
    assert sum("LABELMAP" in record.getMessage() for record in caplog.records) == 1


def test_a_tilted_series_takes_and_gives_labels_pixel_by_pixel(open_pacs: Any, tmp_path: Path) -> None:
    maker = SeriesMaker("tilted", tilt=(0.0, 0.9))
    remote = FakePacs(maker.slices())
    pacs = open_pacs(remote)
    pixels = np.zeros(maker.shape, np.uint8)
    pixels[3:9, 2:18, 2:16] = 1
    stack = pacs.stack(maker.uid)
    assert stack.tilted
    path = tmp_path / "tilted.nrrd"
    write_volume(path, pixels, pacs.pixelwise(maker.uid, stack.from_slices(pixels))[1])
    pacs.save_label(maker.uid, str(path), "final", LABEL_INFO)
    exported, names = export_label(pacs, maker.uid, "final", "nrrd")
    np.testing.assert_array_equal(read_volume(exported, allow_constant=True).array_xyz, pixels)
    assert names == NAMES
    found = next(item for item in remote.objects if item.Modality == "SEG")
    np.testing.assert_array_equal(read_seg(found, stack).array_xyz, pixels)


# -- several channels -----------------------------------------------------------------------------------------------


def test_cases_of_a_model_with_two_channels_have_two_images(open_pacs: Any, label: Path, tmp_path: Path) -> None:
    kinds = {"T1c": "T1 post gd", "FLAIR": "t2 flair"}
    makers = [
        SeriesMaker(text, study="brain", modality="MR", attributes={"SeriesDescription": text}, seed=number)
        for number, text in enumerate(kinds.values())
    ]
    remote = FakePacs(*(maker.slices() for maker in makers))
    pacs = open_pacs(remote)
    pacs.save_label(makers[0].uid, str(label), "final", LABEL_INFO)
    two = pacs.reviewed_cases(tuple(Channel(name=name, modality="MR") for name in kinds))
    assert [len(case.images) for case in two] == [2]
    assert [len(case.images) for case in pacs.reviewed_cases()] == [1]
    three = (*kinds, "T2w")
    assert pacs.reviewed_cases(tuple(Channel(name=name, modality="MR") for name in three)) == []


def test_while_the_pacs_is_down_what_is_here_serves_and_the_rest_is_a_503(open_pacs: Any) -> None:
    other = SeriesMaker("never fetched")
    remote = FakePacs(MAKER.slices(), other.slices())
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)
    remote.down = True
    assert Path(pacs.get_image_uri(MAKER.uid)).is_file()
    with pytest.raises(HTTPException) as caught:
        pacs.get_image_uri(other.uid)
    assert caught.value.status_code == 503
    assert pacs.status()["total"] == 2
    assert not pacs.pacs()["reachable"]
    remote.down = False
    assert pacs.pacs()["reachable"]


def test_only_series_of_the_models_modality_are_offered(open_pacs: Any) -> None:
    others = [SeriesMaker("an mr", modality="MR"), SeriesMaker("one more ct")]
    pacs = open_pacs(FakePacs(MAKER.slices(), *(maker.slices() for maker in others)))
    ct = {MAKER.uid, others[1].uid}
    assert unlabelled({"modalities": ["CT"]}, pacs) == sorted(ct)
    assert unlabelled({"modalities": ["MR"]}, pacs) == [others[0].uid]
    assert unlabelled({"modalities": ["PT"]}, pacs) == []
    assert len(unlabelled({}, pacs)) == 3


def test_a_series_of_two_patients_is_nobodys(open_pacs: Any) -> None:
    copies = MAKER.slices()
    for copy in copies:
        copy.StudyInstanceUID, copy.PatientID = "1.2.3", "OTHER"
    pacs = open_pacs(FakePacs(MAKER.slices(), copies))
    assert pacs.list_images() == []
    with pytest.raises(HTTPException, match="several studies") as caught:
        pacs.get_image_uri(MAKER.uid)
    assert caught.value.status_code == 409


def test_a_server_that_ended_before_the_label_was_sent_sends_it_when_it_is_back(
    open_pacs: Any, label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    monkeypatch.setattr(pacs._sender, "send", lambda image: None)
    claimed = {**LABEL_INFO, "pacs": {"stored": True}}  # nobody's word is taken for it
    pacs.save_label(MAKER.uid, str(label), "final", claimed)
    assert not [item for item in remote.objects if item.Modality == "SEG"]
    again = open_pacs(remote)
    assert sent_again(again)["stored"]
    assert len([item for item in remote.objects if item.Modality == "SEG"]) == 1


def test_a_pacs_that_goes_away_while_it_sends_a_correction_loses_none(
    open_pacs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = FakePacs(MAKER.slices(), [seg(tmp_path)])
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)

    def away(*_: str) -> None:
        raise PacsUnreachable("It does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "instance", away)
        assert pacs.take_in(MAKER.uid) == []
        assert pacs.get_labels_by_image_id(MAKER.uid) == {}
    assert pacs.take_in(MAKER.uid) == []
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}


@pytest.mark.parametrize("asked", ["instance", "instances"])
def test_a_correction_the_pacs_does_not_give_holds_back_no_other(
    open_pacs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    older, newer = seg(tmp_path, hour="090000"), seg(tmp_path, hour="110000")
    remote = FakePacs(MAKER.slices(), [older], [newer])
    pacs, give = open_pacs(remote), getattr(remote, asked)

    def odd(*names: str) -> Any:
        if str(older.SeriesInstanceUID) in names:
            raise PacsError("500")
        return give(*names)

    with monkeypatch.context() as patch:
        patch.setattr(remote, asked, odd)
        assert pacs.take_in(MAKER.uid) == []
        assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}
    monkeypatch.setattr(pacs._receiver, "_not_before", {})  # ten minutes later
    assert pacs.take_in(MAKER.uid) == []
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final", "version_1"}
    assert pacs.get_label_info(MAKER.uid, "final")["pacs"]["SOPInstanceUID"] == newer.SOPInstanceUID


def test_corrections_that_were_refused_because_the_pacs_was_away_are_looked_at_again(
    open_pacs: Any, tmp_path: Path
) -> None:
    found = seg(tmp_path)
    notes = {"outcome": "refused", "image": MAKER.uid, "reason": "it cannot be read (PacsUnreachable)"}
    (tmp_path / "copies").mkdir()
    known = {str(found.SeriesInstanceUID): {"instances": {str(found.SOPInstanceUID): notes}}}
    (tmp_path / "copies" / "segs.json").write_text(json.dumps(known))
    pacs = open_pacs(FakePacs(MAKER.slices(), [found]))
    assert pacs.take_in(MAKER.uid) == []
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}


def test_a_label_submitted_while_an_older_one_is_read_stays_the_final_one(
    open_pacs: Any, label: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seg(tmp_path)
    found.ContentDate = "20200101"
    pacs = open_pacs(FakePacs(MAKER.slices(), [found]))
    look, asked = pacs._hints, []

    def submitted_meanwhile(*given: Any) -> list[str]:
        if not asked:
            asked.append(pacs._tag_for(MAKER.uid, datetime(2020, 1, 1, tzinfo=timezone.utc)))
            pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
        return look(*given)

    monkeypatch.setattr(pacs, "_hints", submitted_meanwhile)
    pacs.take_in(MAKER.uid)
    assert asked[0] == "final"
    assert pacs.get_label_info(MAKER.uid, "final")["client_id"] == "dr"
    assert pacs.get_label_info(MAKER.uid, "version_1")["client_id"] == "Dr Else"


def test_a_request_does_not_wait_for_all_corrections_a_pacs_ever_had(
    open_pacs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs_receiving, "WAIT_S", 0.05)
    pacs = open_pacs(FakePacs(MAKER.slices(), [seg(tmp_path)]))
    go_on = threading.Event()
    take = pacs._receiver._take
    monkeypatch.setattr(pacs._receiver, "_take", lambda finding: (go_on.wait(10), take(finding)))
    assert pacs.status()["completed"] == 0
    go_on.set()
    pacs._receiver._look.join(10)
    assert pacs.status()["completed"] == 1
    assert set(pacs.get_labels_by_image_id(MAKER.uid)) == {"final"}


def test_what_another_process_stores_is_seen_and_the_pacs_is_not_asked_for_it(
    open_pacs: Any, label: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MONAI Label's batch does; the watch over the index once looked for SEGs of the PACS instead."""
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote, auto_reload=True)
    pacs.get_image_uri(MAKER.uid)
    batch = open_pacs(FakePacs(MAKER.slices()), exchanges_labels=False)
    asked: list[Any] = []
    monkeypatch.setattr(pacs._receiver, "look", lambda: asked.append("look"))
    monkeypatch.setattr(remote, "series", lambda **search: asked.append(search) or [])
    batch.save_label(MAKER.uid, str(label), "other", LABEL_INFO)
    until = time.monotonic() + 10
    while not pacs.get_label_uri(MAKER.uid, "other") and time.monotonic() < until:
        time.sleep(0.05)
    pacs._observer.stop()
    pacs._observer.join()
    assert pacs.get_label_uri(MAKER.uid, "other")
    assert asked == []


def test_nobody_finds_a_new_series_listed_before_the_index_knows_it(
    open_pacs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request that asked for it at that moment failed."""
    first, second = SeriesMaker("arrived first"), SeriesMaker("arrived second")
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.list_images()
    note, listed = pacs._take_note, list[bool]()

    def take_note(entries: dict[str, Any], *more: Any) -> None:
        listed.extend(image in pacs._listed for image in entries)
        note(entries, *more)

    monkeypatch.setattr(pacs, "_take_note", take_note)
    remote.objects += first.slices()
    assert first.uid in pacs.list_images()
    monkeypatch.setattr(pacs, "_listed_until", float("inf"))
    remote.objects += second.slices()
    assert pacs.get_image_info(second.uid)["SeriesInstanceUID"] == second.uid
    assert listed == [False, False]


def test_many_may_ask_for_the_series_of_studies(open_pacs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of what was used last that threads share without a lock is spoiled for good after a while."""
    monkeypatch.setattr(pacs_module, "KEPT_HEADERS", 3)
    makers = [SeriesMaker(f"of study {number}", shape=(4, 4, 2), seed=number) for number in range(8)]
    pacs = open_pacs(FakePacs(*(maker.slices() for maker in makers)))
    before, until, asked = sys.getswitchinterval(), time.monotonic() + 1.5, list[int]()

    def ask(first: int) -> None:
        number = first
        while time.monotonic() < until:
            maker = makers[number % len(makers)]
            assert set(pacs.study_headers(maker.study_uid)) == {maker.uid}
            number += 1
        asked.append(number - first)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(ask, first) for first in range(4)]:
                done.result()
    finally:
        sys.setswitchinterval(before)
    assert min(asked) > 0


def test_the_index_names_what_has_just_arrived_and_nothing_that_is_gone(open_pacs: Any) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    assert set(pacs.json()["objects"]) == {MAKER.uid}
    other = SeriesMaker("just arrived")
    remote.objects = other.slices()
    assert set(pacs.json()["objects"]) == {other.uid}
    remote.down = True
    assert set(pacs.json()["objects"]) == {MAKER.uid, other.uid}


# -- copies for a look ------------------------------------------------------------------------------------------------


def test_a_copy_nobody_asked_for_lately_is_dropped_and_made_again(open_pacs: Any) -> None:
    remote = FakePacs(MAKER.slices())
    pacs = open_pacs(remote)
    pacs.get_image_uri(MAKER.uid)
    assert pacs.copies() == {MAKER.uid}
    assert not pacs.drop_copy(MAKER.uid, unused_s=60)
    assert pacs.drop_copy(MAKER.uid, unused_s=0)
    assert pacs.copies() == set()
    assert Path(pacs.get_image_uri(MAKER.uid)).is_file()


def test_a_copy_that_a_training_is_to_read_stays(open_pacs: Any) -> None:
    """A training may wait for others for hours, and reads its images after that."""
    other, needed = SeriesMaker("of another channel"), set[Path]()
    pacs = open_pacs(FakePacs(MAKER.slices(), other.slices()), needed=lambda: needed)
    needed.add(Path(pacs.get_image_uri(MAKER.uid)))
    pacs.get_image_uri(other.uid)
    pacs._files._asked_for.clear()
    assert not pacs.drop_copy(MAKER.uid, unused_s=0)
    assert pacs.trim_copies(0) == ""
    for series in (MAKER.uid, other.uid):
        os.utime(pacs._files.path(series), (0, 0))
    assert pacs.trim_copies(0) == "1 copies of series of the PACS"
    assert pacs.copies() == {MAKER.uid}
    needed.clear()
    needed.add(pacs._files.folder / "channels" / MAKER.uid / f"{other.uid}.nii")
    assert not pacs.drop_copy(MAKER.uid, unused_s=0)
    needed.clear()
    assert pacs.drop_copy(MAKER.uid, unused_s=0)


def test_a_copy_of_a_labelled_series_stays(open_pacs: Any, label: Path) -> None:
    pacs = open_pacs(FakePacs(MAKER.slices()))
    pacs.save_label(MAKER.uid, str(label), "final", LABEL_INFO)
    assert not pacs.drop_copy(MAKER.uid, unused_s=0)
    assert pacs.copies() == {MAKER.uid}


def test_what_a_look_fetched_is_dropped_some_time_later(open_pacs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SeriesMaker("looked at later")
    pacs = open_pacs(FakePacs(MAKER.slices(), other.slices()))
    pacs.get_image_uri(other.uid)  # a client has it
    look = CaseLook(None, None, lambda: pacs, None)  # type: ignore[arg-type]
    with look._borrowing(pacs):
        pacs.get_image_uri(MAKER.uid)
    with look._borrowing(pacs):
        assert pacs.copies() == {MAKER.uid, other.uid}, "not yet"
    monkeypatch.setattr(case_look_module, "UNUSED_S", 0.0)
    with look._borrowing(pacs):
        assert pacs.copies() == {other.uid}


def test_the_state_of_a_series_is_how_many_images_it_has(open_pacs: Any) -> None:
    pacs = open_pacs(FakePacs(MAKER.slices()))
    assert pacs.image_state(MAKER.uid) == f"{len(MAKER.slices())} images"
    assert pacs.copies() == set(), "nothing is downloaded for it"
