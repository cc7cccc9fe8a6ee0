"""Whatever is sent, the answer is a 4xx with a sentence that says what is wrong: no bare 500, no empty mask.

Run with ``-s`` to see the table of statuses and messages.
"""

from __future__ import annotations

import gzip
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from factories import make_image
from live import Site

SHAPE = (19, 23, 17)
AFFINE = np.diag([1.5, 1.2, 3.0, 1.0])


def _noise(shape: tuple[int, ...], dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(-500, 500, shape).astype(dtype)


def _save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def _truncated(path: Path) -> None:
    make_image(path, SHAPE)
    path.write_bytes(path.read_bytes()[:-2000])


def _with_nan(path: Path) -> None:
    array = _noise(SHAPE, "float32")
    array[3, 4, 5] = np.nan
    _save(path, array)


def _zero_spacing(path: Path) -> None:
    _save(path, _noise(SHAPE))
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[76 + 12 : 76 + 16] = struct.pack("<f", 0.0)  # pixdim[3]
    content[252 + 28 + 32 : 252 + 28 + 48] = bytes(16)  # srow_z
    path.write_bytes(gzip.compress(bytes(content)))


def _rgb(path: Path) -> None:
    array = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    array["R"] = 1
    _save(path, array)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncated, "truncated|incomplete|ends|end"),
    "2-D": (lambda path: _save(path, _noise((19, 23))), "2-D|2 dimension|2D|3-D"),
    "a single slice": (lambda path: _save(path, _noise((19, 23, 1))), "slice"),
    "4-D": (lambda path: _save(path, _noise((19, 23, 17, 3))), "4-D|4 dimension|4D|3-D"),
    "NaN": (_with_nan, "NaN|not finite|non-finite"),
    "constant": (lambda path: _save(path, np.full(SHAPE, -1000, "int16")), "-1000"),
    "zero spacing": (_zero_spacing, "spacing|pixdim"),
    "RGB": (_rgb, "RGB|colour"),
    "complex": (lambda path: _save(path, _noise(SHAPE).astype("complex64")), "complex"),
    "empty file": (lambda path: path.write_bytes(b""), "empty|0 bytes"),
    "text, not an image": (lambda path: path.write_bytes(b"hello" * 100), "gzip|NIfTI"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_image_is_refused_with_its_fault_named(site: Site, fault: str, tmp_path: Path) -> None:
    write, words = BAD_FILES[fault]
    path = tmp_path / "scan.nii.gz"
    write(path)
    uploads = _uploads()
    answer = site.server.infer("tiny", "output=image", {"profile": "balanced"}, file=("scan.nii.gz", path.read_bytes()))
    _check(fault, answer.status_code, answer.text, words)
    assert "json" in answer.headers["content-type"]
    assert _uploads() <= uploads, "the refused upload is still in the temporary folder"


def _uploads() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("mshub-server-*/**/*.nii.gz"))


REQUESTS: dict[str, tuple[str, str, object, int, str]] = {
    "wrong channel count": ("two-channels", "image=case01", {}, 422, "needs 2.*T1, T2"),
    "too many channels": ("tiny", "image=pair", {}, 422, "2 image file.*needs 1"),
    "unknown image id": ("tiny", "image=nobody", {}, 404, "nobody.*case01"),
    "an image id that is a path": ("tiny", "image=/etc/hostname", {}, 404, "no image"),
    "an image id that climbs": ("tiny", "image=../home/models", {}, 404, "no image"),
    "no image": ("tiny", "", {}, 400, "names no image"),
    "unknown model": ("no-such-model", "image=case01", {}, 404, "no-such-model.*tiny"),
    "model not installed": ("kidney-lesion-ct", "image=case01", {}, 404, "not installed.*mshub fetch kidney-lesion-ct"),
    "bad JSON": ("tiny", "image=case01", "{oops", 400, "not valid JSON"),
    "JSON that is no object": ("tiny", "image=case01", "[1]", 400, "expected an object"),
    "image in params": ("tiny", "image=case01", {"image": "/etc/hostname"}, 400, "may not set image"),
    "unknown profile": ("tiny", "image=case01", {"profile": "turbo"}, 422, "accurate, balanced, fast"),
    "unknown fold": ("tiny", "image=case01", {"folds": "7"}, 422, "Fold 7.*0, 1"),
    "unknown device": ("tiny", "image=case01", {"device": "tpu"}, 422, "tpu"),
    "unknown result type": ("tiny", "image=case01", {"result_extension": ".jpg"}, 422, r"\.nrrd"),
    "unknown label": ("tiny", "image=case01", {"label_prompt": [9]}, 422, r"9.*liver"),
    "expired session": ("tiny", "session_id=11111111-1111-1111-1111-111111111111", {}, 404, "session"),
    "a session id that is a path": ("tiny", "session_id=../../x", {}, 404, "session"),
}


@pytest.mark.parametrize("fault", REQUESTS)
def test_a_bad_request_is_refused_with_its_fault_named(site: Site, fault: str) -> None:
    model, query, params, status, words = REQUESTS[fault]
    answer = site.server.infer(model, query, params)  # type: ignore[arg-type]
    assert answer.status_code == status, answer.text
    _check(fault, answer.status_code, answer.text, words)


def test_unknown_things_elsewhere_are_404(site: Site) -> None:
    url = site.server.url
    label = {"label": ("x.nii.gz", b"x")}
    answers = {
        "next sample, unknown strategy": httpx.post(f"{url}/activelearning/astrology", json={}),
        "save label, unknown image": httpx.put(f"{url}/datastore/label?image=nobody", files=label),
        "download, unknown image": httpx.get(f"{url}/datastore/image?image=nobody"),
        "image info, unknown image": httpx.get(f"{url}/datastore/image/info?image=nobody"),
        "label info, unknown label": httpx.put(
            f"{url}/datastore/updatelabelinfo?label=nobody&tag=final", data={"info": "{}"}
        ),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 404)


def test_an_upload_under_a_name_that_leaves_the_folder_is_refused(site: Site, tmp_path: Path) -> None:
    path = make_image(tmp_path / "scan.nii.gz", SHAPE)
    answer = httpx.put(
        f"{site.server.url}/datastore/image?image=../../evil", files={"file": ("scan.nii.gz", path.read_bytes())}
    )
    assert answer.status_code == 400
    assert not list(site.studies.parent.rglob("evil*"))


def test_an_archive_is_not_unpacked(site: Site, tmp_path: Path) -> None:
    path = make_image(tmp_path / "scan.nii.gz", SHAPE)
    answer = httpx.put(f"{site.server.url}/session/?uncompress=true", files={"files": ("x.tar", path.read_bytes())})
    assert answer.status_code == 400
    assert "Archives are not unpacked" in answer.json()["detail"]


def test_a_page_of_another_origin_cannot_read_the_answers(site: Site) -> None:
    answer = httpx.get(f"{site.server.url}/info/", headers={"Origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_the_log_can_be_read_through_the_server(site: Site) -> None:
    assert "MSHub" in httpx.get(f"{site.server.url}/logs/?lines=1000").text


def test_bad_json_in_other_requests_is_a_400(site: Site) -> None:
    answer = httpx.put(
        f"{site.server.url}/datastore/label?image=case01", data={"params": "{oops"}, files={"label": ("x.nii.gz", b"x")}
    )
    assert answer.status_code == 400
    assert "JSON" in answer.json()["detail"]


def _check(fault: str, status: int, text: str, words: str) -> None:
    print(f"| {fault} | {status} | {text} |")  # noqa: T201  (-s shows the table)
    assert 400 <= status < 500, text
    assert re.search(words, text, re.DOTALL), text
    assert len(text) > 40, "a code is no explanation"
