"""A server with users, as those who have to log in see it: MONAI Label's client, a browser's requests, a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import httpx
import pytest
from monailabel.client.client import MONAILabelClientException

from factories import make_image, make_model_folder
from lib import audit
from live import LiveServer, Site
from mshub.install import add_model
from mshub.store import ModelStore
from mshub.users import user_file

PASSWORD = "a password for tests"
SENSITIVE = "mueller_hans_1950"


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ward")
    studies, home = folder / "studies", folder / "home"
    make_image(studies / f"{SENSITIVE}.nii.gz", (21, 25, 18), seed=1)
    make_image(studies / "large.nii.gz", (150, 150, 90), seed=2)
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "models" / "tiny"))
    users = user_file(home)
    for role in ("admin", "annotator", "viewer"):
        users.add(role, PASSWORD, role)
    server = LiveServer(home, ["--studies", str(studies)], folder, probe="/health/live")
    yield Site(server, studies, home)
    server.stop()


def test_slicers_client_logs_in_and_works(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    assert client.auth_enabled()
    with pytest.raises(MONAILabelClientException, match="401"):
        client.info()
    assert not client.auth_valid_token()
    with pytest.raises(MONAILabelClientException, match="401"):
        client.auth_token("annotator", "wrong")
    client.update_auth(client.auth_token("annotator", PASSWORD))
    assert client.auth_valid_token()
    assert "tiny" in client.info()["models"]
    label, params = client.infer("tiny", SENSITIVE, {"profile": "balanced"})
    info = [{"name": name, "idx": value} for name, value in params["label_names"].items()]
    client.save_label(SENSITIVE, label, params={"label_info": info})
    with pytest.raises(MONAILabelClientException, match="403"):
        client.train_start("tiny", {})


def test_what_is_stored_says_who_logged_in_whatever_the_client_says(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    client.update_auth(client.auth_token("annotator", PASSWORD))
    client.upload_image(make_image(tmp_path / "sent.nii.gz", (21, 25, 18), seed=3), "sent", {"user": "admin"})
    label, params = client.infer("tiny", "sent", {"client_id": "admin"})
    info = [{"name": name, "idx": value} for name, value in params["label_names"].items()]
    client.save_label("sent", label, params={"label_info": info, "client_id": "admin", "user": "admin"})
    headers = {"Authorization": f"Bearer {user_file(ward.home).create_token('admin', 'a look', 1)}"}
    with httpx.Client(base_url=ward.server.url, headers=headers, timeout=60) as admin:
        image = admin.get("/datastore/image/info", params={"image": "sent"}).json()
        final = admin.get("/datastore/label/info", params={"label": "sent", "tag": "final"}).json()
        assert (image["user"], final["user"], final["client_id"]) == ("annotator", "annotator", "annotator")
        admin.put("/datastore/image/info", params={"image": "sent"}, data={"info": '{"note": "seen"}'})
        assert admin.get("/datastore/image/info", params={"image": "sent"}).json()["user"] == "admin"
        offered = client.next_sample("random", {"client_id": "admin"})
        assert offered["strategy"]["random"]["client_id"] == "annotator"
        gone = {"id": "sent", "tag": "no-such"}
        assert admin.delete("/datastore/label", params=gone).status_code == 404
        assert admin.delete("/datastore/label", params={**gone, "tag": "final"}).status_code == 200
        assert admin.delete("/datastore/label", params={**gone, "tag": "final"}).status_code == 404
        assert admin.delete("/datastore/image", params={"id": "sent"}).status_code == 200


def test_the_audit_log_tells_of_sessions_offers_and_who_is_guessed_at(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    client.update_auth(client.auth_token("annotator", PASSWORD))
    offered = client.next_sample("random", {})["id"]
    headers = {"Authorization": f"Bearer {user_file(ward.home).create_token('annotator', 'a session', 1)}"}
    with httpx.Client(base_url=ward.server.url, headers=headers, timeout=60) as script:
        image = make_image(tmp_path / "mine.nii.gz", (21, 25, 18), seed=4)
        session = script.put("/session/", files={"files": (image.name, image.read_bytes())}).json()["session_id"]
        asked = {"session_id": session, "image": SENSITIVE}
        assert script.post("/infer/tiny", params=asked, data={"params": "{}"}).status_code == 200
        assert script.get(f"/session/{session}", params={"image": True}).content == image.read_bytes()
        assert script.delete(f"/session/{session}").status_code == 200
    for name in ("ada.guessed", "grace.guessed"):
        httpx.post(f"{ward.server.url}/auth/token", data={"username": name, "password": "wrong"})
    hashed, until = audit.AuditLog(ward.home).hashed, time.monotonic() + 10
    log = (ward.home / "logs" / "audit.jsonl").read_text()
    while hashed("grace.guessed") not in log and time.monotonic() < until:  # a line is written after the answer
        time.sleep(0.05)
        log = (ward.home / "logs" / "audit.jsonl").read_text()
    assert not [name for name in (session, "ada.guessed") if name in log]
    lines = [json.loads(line) for line in log.splitlines()]
    offers = [line["image"] for line in lines if line["action"] == "POST /activelearning/{strategy}"]
    assert offers[-1] == hashed(offered)
    told = [(line["action"].split()[0], line.get("image")) for line in lines if line.get("session") == hashed(session)]
    assert told == [("PUT", None), ("POST", None), ("GET", None), ("DELETE", None)]
    assert [line["tried"] for line in lines if "tried" in line][-2:] == [hashed("ada.guessed"), hashed("grace.guessed")]


def test_a_damaged_file_of_users_is_told_by_the_probe_for_it(ward: Site) -> None:
    users = ward.home / "users.json"
    kept = users.read_bytes()
    try:
        users.write_text("{damaged")
        assert httpx.get(f"{ward.server.url}/health/live").status_code == 200
        ready = httpx.get(f"{ward.server.url}/health/ready")
        assert ready.status_code == 503
        assert "file of users is damaged or gone" in ready.json()["reasons"][0]
        assert "damaged (" in httpx.get(f"{ward.server.url}/info/").json()["detail"]
    finally:
        users.write_bytes(kept)
    assert httpx.get(f"{ward.server.url}/health/ready").json() == {"ready": True, "reasons": []}


def test_slicer_fetches_the_next_case_as_its_plug_in_does(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    client.update_auth(client.auth_token("annotator", PASSWORD))
    image = client.next_sample("random", {})["id"]
    address = f"{ward.server.url}/datastore/image?image={quote_plus(image)}"
    with urllib.request.urlopen(address) as answer:  # Slicer's download has no token
        assert answer.read() == (ward.studies / f"{image}.nii.gz").read_bytes()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(address)


def asking(home: Path) -> dict[str, str]:
    return {"Authorization": f"Bearer {user_file(home).create_token('annotator', 'a proxy', 1)}"}


def fetched(server: LiveServer, headers: dict[str, str], next_headers: dict[str, str]) -> int:
    """Ask for the next case, then for its image as 3D Slicer does; returns the status of that."""
    me = {"client_id": "tester"}  # as `LiveServer.client`: whose case is not offered to anybody else
    answer = httpx.post(f"{server.url}/activelearning/random", json=me, headers=headers)
    image = answer.json()["id"]
    return httpx.get(f"{server.url}/datastore/image?image={quote_plus(image)}", headers=next_headers).status_code


def test_a_proxy_that_is_trusted_says_whom_it_speaks_for(ward: Site) -> None:
    ada, ben = {"X-Forwarded-For": "10.1.1.1"}, {"X-Forwarded-For": "10.1.1.2"}
    token = asking(ward.home)
    assert fetched(ward.server, token | ada, ben) == 401
    assert fetched(ward.server, token | ada, ada) == 200
    (*_, line) = (ward.home / "logs" / "audit.jsonl").read_text().splitlines()
    assert json.loads(line)["from"] == "10.1.1.1"


def test_through_a_proxy_that_keeps_back_whom_it_speaks_for_nobody_is_offered_an_image(ward: Site) -> None:
    name = {"Host": "mshub.hospital"}
    assert fetched(ward.server, asking(ward.home) | name, name) == 401
    assert "the proxy sends no X-Forwarded-For" in ward.server.log.read_text()


def test_what_a_stranger_says_of_whom_he_speaks_for_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    make_image(tmp_path / "studies" / "case.nii.gz", (21, 25, 18))
    add_model(ModelStore(home), "tiny", make_model_folder(tmp_path / "models" / "tiny"))
    user_file(home).add("annotator", PASSWORD, "admin")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.9.9.9")
    server = LiveServer(home, ["--studies", str(tmp_path / "studies")], tmp_path, probe="/health/live")
    try:
        assert fetched(server, asking(home) | {"X-Forwarded-For": "10.1.1.1"}, {"X-Forwarded-For": "10.1.1.2"}) == 200
        told = [json.loads(line) for line in (home / "logs" / "audit.jsonl").read_text().splitlines()]
        assert {line["from"] for line in told if "status" in line} == {"127.0.0.1"}
    finally:
        server.stop()


def test_a_viewer_looks_and_changes_nothing(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    client.update_auth(client.auth_token("viewer", PASSWORD))
    assert client.datastore()["objects"].keys() == {SENSITIVE, "large"}
    with pytest.raises(MONAILabelClientException, match="403"):
        client.infer("tiny", SENSITIVE, {})
    with pytest.raises(MONAILabelClientException, match="403"):
        client.next_sample("random", {})


def test_a_browser_logs_in_by_the_page(ward: Site) -> None:
    url = ward.server.url
    with httpx.Client(base_url=url, headers={"Accept": "text/html"}) as browser:
        led = browser.get("/mshub/status")
        assert led.status_code == 303
        page = browser.get(led.headers["location"])
        assert "<form" in page.text
        form = {"username": "annotator", "password": PASSWORD, "next": "/mshub/status"}
        answer = browser.post("/login", data=form, headers={"Origin": url})
        assert (answer.status_code, answer.headers["location"]) == (303, "/mshub/status")
        assert browser.get("/mshub/status").json()["models"] == {"tiny": "v1"}
        assert browser.post("/activelearning/random", headers={"Origin": "http://elsewhere.example"}).status_code == 403
        assert browser.post("/activelearning/random", headers={"Origin": url}).status_code == 200


def test_the_audit_log_and_the_servers_log_name_no_image(ward: Site, tmp_path: Path) -> None:
    client = ward.server.client(tmp_path)
    client.update_auth(client.auth_token("annotator", PASSWORD))
    client.infer("tiny", SENSITIVE, {"profile": "balanced"})
    lines = [json.loads(line) for line in (ward.home / "logs" / "audit.jsonl").read_text().splitlines()]
    (infer, *_) = [
        line for line in reversed(lines) if line["action"] == "POST /infer/{model}" and line["status"] == 200
    ]
    assert (infer["user"], infer["model"], infer["version"]) == ("annotator", "tiny", "v1")
    assert len(infer["image"]) == 16
    (label, *_) = [line for line in lines if line["action"] == "PUT /datastore/label"]
    assert label["started_from"] is None
    httpx.get(f"{ward.server.url}/datastore/image?image={SENSITIVE}")
    for log in (ward.home / "logs" / "audit.jsonl", ward.home / "logs" / "server.log", ward.server.log):
        assert SENSITIVE not in log.read_text().replace(f"{ward.studies}", "")


def test_the_servers_log_says_that_it_is_protected(ward: Site) -> None:
    assert "without MSHub's layer" not in ward.server.log.read_text()


def test_who_hangs_up_is_not_computed_for_any_more(ward: Site) -> None:
    token = user_file(ward.home).create_token("annotator", "impatient", 1)
    headers = {"Authorization": f"Bearer {token}"}

    def status() -> Any:
        return httpx.get(f"{ward.server.url}/mshub/status", headers=headers).json()

    failed, url = status()["failed"], f"{ward.server.url}/infer/tiny?image=large"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, data={"params": "{}"}, headers=headers, timeout=httpx.Timeout(30, read=2))
    deadline = time.monotonic() + 5
    while status()["running"]:
        assert time.monotonic() < deadline, "it is still computed for nobody"
        time.sleep(0.05)
    assert status()["failed"] == failed + 1


def test_a_script_watches_the_server(ward: Site) -> None:
    token = user_file(ward.home).create_token("viewer", "prometheus", 1)
    metrics = httpx.get(f"{ward.server.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    assert metrics.status_code == 200
    assert 'mshub_requests_total{method="POST",route="/auth/token",status="200"}' in metrics.text
    assert httpx.get(f"{ward.server.url}/metrics").status_code == 401
    assert httpx.get(f"{ward.server.url}/health/ready").json()["ready"] is True


def test_a_second_server_on_the_folder_says_why_it_does_not_start(ward: Site, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mshub", "serve", "--studies", str(ward.studies), "--port", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MSHUB_HOME": str(tmp_path)})
    assert done.returncode != 0
    assert "Another server works on" in done.stdout + done.stderr
