"""Uploads as clients send them: looked at on entry, under ids of their own, and an answer in words with a code."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from monailabel.utils.sessions import SessionInfo

from factories import make_image
from lib.app import MSHubApp


@pytest.fixture
def server(
    clinic: MSHubApp, serve: Callable[[object], TestClient], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> TestClient:
    monkeypatch.setattr(clinic, "_sessions", clinic._load_sessions(load=True))
    return serve(clinic)


@pytest.fixture
def scan(tmp_path: Path) -> bytes:
    return make_image(tmp_path / "scan.nii.gz", (7, 6, 5)).read_bytes()


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.headers.get("X-MSHub-Error")) == (status, code), answer.text
    return str(answer.json()["detail"])


def put(server: TestClient, name: str, content: bytes, query: str = "") -> httpx.Response:
    return server.put(f"/datastore/image{query}", files={"file": (name, content)})


def test_a_dicom_answer_is_of_a_series_and_of_nothing_that_was_sent(server: TestClient, scan: bytes) -> None:
    session = server.put("/session/", files={"files": ("a.nii.gz", scan)}).json()["session_id"]
    for asked, files in (({"session_id": session}, {}), ({}, {"file": ("a.nii.gz", scan)})):
        answer = server.post("/infer/tiny", params={"image": "a", "output": "dicom_seg", **asked}, files=files)
        assert "ask with ?image=ID alone" in refused(answer, 400, "bad-request")


def test_ids_are_whole_names_and_do_not_collapse_at_a_dot(server: TestClient, clinic: MSHubApp, scan: bytes) -> None:
    for name in ("1.2.840.1.nii.gz", "1.2.840.2.nii.gz"):
        assert put(server, name, scan).json() == {"image": name.removesuffix(".nii.gz")}
    assert {"1.2.840.1", "1.2.840.2"} <= set(clinic.datastore().list_images())
    assert put(server, "x.nii.gz", scan, "?image=7").json() == {"image": "7"}
    assert "already" in refused(put(server, "x.nii.gz", scan, "?image=7"), 409, "conflict")


def test_a_bad_image_is_refused_on_every_way_in_and_leaves_nothing(
    server: TestClient, clinic: MSHubApp, tmp_path: Path, scan: bytes
) -> None:
    before, bad = set(clinic.datastore().list_images()), scan[:-9]
    assert "scan" not in before
    for path, field in (("/datastore/image", "file"), ("/datastore/", "file"), ("/session/", "files")):
        assert "truncated" in refused(server.put(path, files={field: ("scan.nii.gz", bad)}), 422, "case")
    assert set(clinic.datastore().list_images()) == before
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []
    assert not list(tmp_path.glob("sessions/*"))


def test_a_session_keeps_what_was_sent(server: TestClient, clinic: MSHubApp, scan: bytes, tmp_path: Path) -> None:
    made = server.put("/session/", files={"files": ("../../scan.nii.gz", scan)}).json()
    image = Path(made["session_info"]["image"])
    assert image.read_bytes() == scan
    assert image.parent.parent == tmp_path / "sessions"
    two = [("files", (name, scan)) for name in ("a_0000.nii.gz", "a_0001.nii.gz")]
    made = server.put("/session/", files=two).json()
    assert sorted(path.name for path in Path(made["session_info"]["image"]).iterdir()) == [
        "a_0000.nii.gz",
        "a_0001.nii.gz",
    ]
    again = [("files", ("a/IM1.nii.gz", scan)), ("files", ("b/IM1.nii.gz", scan))]
    assert "more than once" in refused(server.put("/session/", files=again), 400, "bad-request")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["scan.py", "scan", "x" * 300, "scan.dcm", "a\0.exe", "..", "scan.nii.gz/"])
def test_what_is_no_volume_is_refused_by_its_name(server: TestClient, scan: bytes, name: str) -> None:
    assert ".nii.gz" in refused(put(server, name, scan, "?image=n"), 415, "unsupported-media-type")
    label = server.put("/datastore/label?image=a", files={"label": (name, scan)})
    assert ".nii.gz" in refused(label, 415, "unsupported-media-type")
    assert ".nii.gz" in refused(server.post("/infer/tiny", files={"file": (name, scan)}), 415, "unsupported-media-type")


@pytest.mark.parametrize("query", ["?image=../x", "?image=a/b", "?image=.x", f"?image={'a' * 300}"])
def test_ids_are_names(server: TestClient, scan: bytes, query: str) -> None:
    assert "up to 200 letters" in refused(put(server, "x.nii.gz", scan, query), 400, "bad-request")


def test_missing_fields_are_told_in_a_sentence(server: TestClient) -> None:
    said = refused(server.put("/datastore/image?image=x"), 422, "unprocessable-entity")
    assert "body.file: Field required" in said


def test_an_odd_checksum_is_refused(server: TestClient) -> None:
    for text in ("ROT13:12", "SHA256:xyz", "../x"):
        answer = server.head("/datastore/image", params={"image": "a", "check_sum": text})
        assert answer.status_code == 400


@pytest.mark.parametrize("algorithm", ["SHA256", "SHA512", "MD5"])
def test_a_checksum_says_whether_it_is_this_image(server: TestClient, scan: bytes, algorithm: str) -> None:
    put(server, "n.nii.gz", scan)
    digits = hashlib.new(algorithm, scan).hexdigest()
    right = [f"{algorithm}:{digits}", f"{algorithm}:{digits.upper()}", *([digits] if algorithm == "SHA256" else [])]
    wrong = [f"{algorithm}:00", f"{algorithm}:{digits[:-1]}", f"MD5:{digits}0", "00"]
    for status, texts in ((200, right), (404, wrong)):
        for text in texts:
            answer = server.head("/datastore/image", params={"image": "n", "check_sum": text})
            assert answer.status_code == status, text
    assert server.head("/datastore/image?image=n").status_code == 200
    assert server.head("/datastore/image?image=none").status_code == 404
    assert server.head(f"/datastore/image?image=none&check_sum={right[0]}").status_code == 404


def test_a_session_of_several_files_is_no_file(server: TestClient, scan: bytes) -> None:
    sent = [("files", (f"a_000{number}.nii.gz", scan)) for number in range(2)]
    one, two = (server.put("/session/", files=files).json()["session_id"] for files in (sent[:1], sent))
    assert server.get(f"/session/{one}?image=true").content == scan
    assert "several files" in refused(server.get(f"/session/{two}?image=true"), 400, "bad-request")
    for known in (one, two):
        assert "image" in server.get(f"/session/{known}").json()
    for unknown in ("0" * 32, "...", "a b"):
        for query in ("", "?image=true"):
            assert server.get(f"/session/{unknown}{query}").status_code == 404


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_507_wherever_it_is_met(
    server: TestClient, scan: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr("lib.datastore.replace_by_copy", full)
    assert "Free some space" in refused(put(server, "n.nii.gz", scan), 507, "insufficient-storage")


def test_a_session_that_somebody_else_removes_is_a_404(
    server: TestClient, clinic: MSHubApp, scan: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = clinic.sessions()
    note = sessions._write_meta_info

    def removed_and_noted(session_id: str, found: SessionInfo) -> None:
        shutil.rmtree(found.path)
        note(session_id, found)

    for method, query in (("GET", "?update_ts=true"), ("GET", "?image=true"), ("DELETE", "")):
        number = server.put("/session/", files={"files": ("a.nii.gz", scan)}).json()["session_id"]
        with monkeypatch.context() as patch:
            patch.setattr(sessions, "_write_meta_info", removed_and_noted)
            assert server.request(method, f"/session/{number}{query}").status_code == 404


def test_a_clean_up_that_fails_is_told_and_does_not_end_the_thread(
    clinic: MSHubApp, server: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(clinic.sessions(), "remove_expired", fail)
    clinic.cleanup_sessions()
    assert "disk on fire" in caplog.text


@pytest.mark.parametrize(("path", "field"), [("/datastore/image", "file"), ("/session/", "files")])
def test_an_upload_there_is_no_room_for_is_answered_before_it_lies_on_the_disk(
    server: TestClient, clinic: MSHubApp, monkeypatch: pytest.MonkeyPatch, path: str, field: str
) -> None:
    monkeypatch.setattr("lib.free_space.free_bytes", lambda _: 2**28)
    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", lambda **_: pytest.fail("it is being written"))
    large = {field: ("n.nii.gz", bytes(2**21))}
    assert "free some space" in refused(server.put(path, files=large), 507, "storage-full")
    clinic.config = replace(clinic.config, upload_gb=2**20 / 2**30)
    assert "1 MB at most" in refused(server.put(path, files=large), 413, "request-entity-too-large")


def test_another_error_of_the_system_is_the_servers_fault(
    server: TestClient, scan: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("lib.datastore.replace_by_copy", broken)
    assert "server's log" in refused(put(server, "n.nii.gz", scan), 500, "internal-server-error")
