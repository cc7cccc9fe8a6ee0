"""The viewer's way to the PACS: the query is kept, credentials are added, and nothing but DICOMweb is reached."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

pytestmark = pytest.mark.usefixtures("monailabel_here")
ROOT = "http://pacs:8042/dicom-web"


@pytest.fixture
def seen() -> list[httpx.Request]:
    return []


@pytest.fixture
def viewer(
    monkeypatch: pytest.MonkeyPatch, seen: list[httpx.Request], monailabel_here: None
) -> Iterator[Callable[..., TestClient]]:
    """Return a function that gives a browser on a server whose PACS answers as told."""
    from monailabel.config import settings

    from lib.server import proxy

    clients: list[TestClient] = []

    def started(answer: Callable[[httpx.Request], httpx.Response], studies: str = ROOT) -> TestClient:
        def handle(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            return answer(request)

        monkeypatch.setattr(settings, "MONAI_LABEL_STUDIES", studies)
        pacs = httpx.AsyncClient(transport=httpx.MockTransport(handle), auth=("mshub", "secret"))
        monkeypatch.setattr(proxy, "_client", lambda: pacs)
        app = FastAPI()
        app.add_api_route("/proxy/dicom/{path:path}", proxy.pass_on, methods=["GET", "POST"], response_model=None)
        clients.append(TestClient(app, base_url="http://viewer:8000"))
        return clients[-1]

    yield started
    for client in clients:
        client.close()


def fine(request: httpx.Request) -> httpx.Response:
    return httpx.Response(
        200,
        stream=httpx.ByteStream(b"pixels"),
        headers={"content-type": "multipart/related; boundary=x", "server": "y"},
    )


@pytest.mark.parametrize(
    ("asked", "passed_on"),
    [("gzip, deflate, br, zstd", "gzip, deflate"), ("br;q=1.0, gzip;q=0.8", "gzip;q=0.8"), ("zstd", "identity")],
)
def test_only_what_is_read_here_may_be_compressed(
    viewer: Callable[..., TestClient], seen: list[httpx.Request], asked: str, passed_on: str
) -> None:
    viewer(fine).get("/proxy/dicom/studies", headers={"Accept-Encoding": asked})
    assert seen[-1].headers["accept-encoding"] == passed_on


@pytest.mark.parametrize("service", ["", "qido/", "wado/"])
def test_a_search_arrives_with_its_query_and_our_credentials(
    viewer: Callable[..., TestClient], seen: list[httpx.Request], service: str
) -> None:
    headers = {"Accept": "application/dicom+json", "Cookie": "session=1", "Authorization": "Basic stolen"}
    address = f"/proxy/dicom/{service}studies?PatientName=a%2Cb&limit=10&includefield=00081030%2C00080060"
    answer = viewer(fine).get(address, headers=headers)
    assert (answer.status_code, answer.content) == (200, b"pixels")
    (request,) = seen
    assert str(request.url) == f"{ROOT}/studies?PatientName=a%2Cb&limit=10&includefield=00081030,00080060"
    assert request.headers["accept"] == "application/dicom+json"
    assert request.headers["authorization"] == httpx.BasicAuth("mshub", "secret")._auth_header
    assert "cookie" not in request.headers
    assert "server" not in answer.headers


def test_objects_are_stored(viewer: Callable[..., TestClient], seen: list[httpx.Request]) -> None:
    headers = {"Content-Type": "multipart/related; boundary=x"}
    assert viewer(fine).post("/proxy/dicom/studies/1.2.3", content=b"--x", headers=headers).status_code == 200
    assert (seen[0].method, seen[0].content, seen[0].headers["content-type"]) == (
        "POST",
        b"--x",
        headers["Content-Type"],
    )


class HangsUp(httpx.AsyncByteStream):
    """A body that breaks off."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'[{"00100010'
        raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")


@pytest.mark.parametrize("kind", ["application/dicom+json", "application/json; charset=utf-8"])
def test_a_pacs_that_hangs_up_midway_is_the_pacs_fault(viewer: Callable[..., TestClient], kind: str) -> None:
    client = viewer(lambda _: httpx.Response(200, stream=HangsUp(), headers={"content-type": kind}))
    answer = client.get("/proxy/dicom/studies/1/metadata")
    assert (answer.status_code, "does not answer (RemoteProtocolError)" in answer.json()["detail"]) == (503, True)


def test_addresses_of_the_pacs_within_answers_lead_through_the_proxy(viewer: Callable[..., TestClient]) -> None:
    text = f'[{{"7FE00010": {{"BulkDataURI": "{ROOT}/studies/1/bulk/7fe00010"}}}}]'
    client = viewer(lambda _: httpx.Response(200, text=text, headers={"content-type": "application/dicom+json"}))
    answer = client.get("/proxy/dicom/studies/1/metadata")
    assert answer.json()[0]["7FE00010"]["BulkDataURI"] == "http://viewer:8000/proxy/dicom/studies/1/bulk/7fe00010"


@pytest.mark.parametrize(
    "path",
    [
        "studies/1.2/series/1.3/instances/1.4/frames/1,2",
        "studies/1.2/series/1.3/instances/1.4/bulk/7fe00010",
        "studies/1.2/series/1.3/instances/1.4/bulk/0040a730/1/0040a168",
        "instances/1.4/rendered",
    ],
)
def test_what_viewers_ask_for_is_passed_on(
    viewer: Callable[..., TestClient], seen: list[httpx.Request], path: str
) -> None:
    assert viewer(fine).get(f"/proxy/dicom/{path}").content == b"pixels"
    assert str(seen[0].url) == f"{ROOT}/{path}"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "system",
        "instances-of",
        "studies/..%2F..%2Fsystem",
        "studies//x",
        "studies/.%2E/x",
        "studies/%252e%252e/%252e%252e/system",
        "studies/..%252f..%252fsystem",
        "studies/1%3Fx=1",
        "studies/1%23",
        "studies/1%5C2",
        "studies/...",
        "qido/system",
        "http://a/",
        "wado",
    ],
)
def test_other_paths_are_refused_and_never_asked_for(
    viewer: Callable[..., TestClient], seen: list[httpx.Request], path: str
) -> None:
    assert viewer(fine).get(f"/proxy/dicom/{path}").status_code == 404
    assert seen == []


@pytest.mark.parametrize("path", ["series", "studies/1.2/series", "studies/x", "instances/1"])
def test_objects_are_stored_at_studies_only(
    viewer: Callable[..., TestClient], seen: list[httpx.Request], path: str
) -> None:
    assert viewer(fine).post(f"/proxy/dicom/{path}", content=b"x").status_code == 405
    assert seen == []


def test_a_pacs_that_is_down_or_absent_is_a_sentence(viewer: Callable[..., TestClient]) -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    answer = viewer(down).get("/proxy/dicom/studies")
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["detail"]
    answer = viewer(fine, studies="/a/folder").get("/proxy/dicom/studies")
    assert answer.status_code == 404
    assert "no PACS" in answer.json()["detail"]


def test_what_the_pacs_refuses_is_passed_on(viewer: Callable[..., TestClient]) -> None:
    refused = httpx.Response(401, stream=httpx.ByteStream(b"no"), headers={"content-type": "text/plain"})
    answer = viewer(lambda _: refused).get("/proxy/dicom/studies")
    assert (answer.status_code, answer.text) == (401, "no")


def test_a_connection_that_was_just_closed_is_opened_again(
    viewer: Callable[..., TestClient], seen: list[httpx.Request]
) -> None:
    def closing(request: httpx.Request) -> httpx.Response:
        if len(seen) == 1:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.", request=request)
        return fine(request)

    assert viewer(closing).get("/proxy/dicom/studies").content == b"pixels"
    seen.clear()
    assert viewer(closing).post("/proxy/dicom/studies", content=b"x").status_code == 503  # it may have arrived
