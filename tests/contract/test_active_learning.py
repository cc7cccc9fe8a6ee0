"""Active learning through a live server, as MONAI Label's own client asks for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from monailabel.client import MONAILabelClient

from factories import make_image, make_model_folder
from live import LiveServer, Site
from mshub.install import add_model
from mshub.selection import STRATEGIES
from mshub.store import ModelStore
from waiting import eventually

BALANCED = {"profile": "balanced"}
SHAPE = (20, 17, 12)
ARGUMENTS = ("--conf", "device=cpu", "--conf", "profile=balanced")


def make_ward(folder: Path, images: int) -> tuple[Path, Path]:
    """Return home and studies of a small ward with the model ``tiny``."""
    home, studies = folder / "home", folder / "studies"
    one = make_image(folder / "image.nii.gz", SHAPE).read_bytes()
    studies.mkdir()
    for number in range(images):
        (studies / f"case{number:03d}.nii.gz").write_bytes(one)
    add_model(ModelStore(home), "tiny", make_model_folder(folder / "tiny", folds=("0", "1")))
    return home, studies


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ward")
    home, studies = make_ward(folder, 420)
    server = LiveServer(home, ["--studies", str(studies), *ARGUMENTS], folder)
    yield Site(server, studies, home)
    server.stop()


def client_of(site: Site, name: str, folder: Path) -> MONAILabelClient:
    return MONAILabelClient(site.server.url, tmpdir=str(folder), client_id=name)


until = partial(eventually, seconds=120, every_s=0.2)


def test_two_clients_asking_at_once_200_times_each_never_get_the_same_case(ward: Site, tmp_path: Path) -> None:
    """Through HTTP, several requests of each client at the same time."""
    clients = [client_of(ward, name, tmp_path) for name in ("ann", "ben")]

    def ask(number: int) -> tuple[str, int]:
        sample = clients[number % 2].next_sample("uncertainty", {"model": "tiny"})
        return sample["id"], number % 2

    with ThreadPoolExecutor(8) as pool:
        offered = list(pool.map(ask, range(400)))
    assert Counter(client for _, client in offered) == {0: 200, 1: 200}
    assert len({image for image, _ in offered}) == 400, "none is handed out twice, none is lost"


def test_slicer_and_ohif_can_choose_every_strategy(ward: Site) -> None:
    strategies = httpx.get(f"{ward.server.url}/info/").json()["strategies"]
    assert set(strategies) == set(STRATEGIES)
    assert all(strategy["description"] for strategy in strategies.values())


@pytest.mark.parametrize("strategy", [name for name, one in STRATEGIES.items() if not one.of_labelled])
def test_the_answer_has_what_clients_read_and_says_why(ward: Site, strategy: str, tmp_path: Path) -> None:
    sample = client_of(ward, "cleo", tmp_path).next_sample(strategy, {})
    assert {"id", "path", "name", "why", "waiting", "audit", "model", "version"} <= set(sample)
    assert sample["chosen_by"] in (strategy, "random"), "every fifth is drawn at random"
    assert Path(sample["path"]).is_file()
    assert sample["path"].endswith(sample["name"])


def test_a_prediction_returns_what_was_measured(ward: Site, tmp_path: Path) -> None:
    _, params = client_of(ward, "cleo", tmp_path).infer("tiny", "case000", BALANCED)
    found = params["uncertainty"]
    assert 0 < found["fold_dice"] < 1
    assert set(found["structures"]) == {"liver", "spleen"}
    assert found["embedding"]
    _, params = client_of(ward, "cleo", tmp_path).infer("tiny", "case000", {"profile": "accurate"})
    assert 0 < params["uncertainty"]["mirror_dice"] < 1


def test_monai_labels_scoring_is_that_of_several_structures(ward: Site, tmp_path: Path) -> None:
    """Exchanged labels do not agree at all; MONAI Label's own `dice` gives them more than 1."""
    client = client_of(ward, "cleo", tmp_path)
    label, _ = client.infer("tiny", "case001", {**BALANCED, "save_label": True})
    image = nib.load(label)
    array = np.asarray(image.dataobj)
    exchanged = nib.Nifti1Image(np.choose(array, (0, 2, 1)).astype(np.uint8), image.affine)
    nib.save(exchanged, tmp_path / "exchanged.nii.gz")
    info = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
    answer = httpx.put(
        f"{ward.server.url}/datastore/label?image=case001",
        data={"params": json.dumps({"label_info": info, "client_id": "cleo"})},
        files={"label": (tmp_path / "exchanged.nii.gz").open("rb")},
        timeout=60,
    ).json()
    assert answer["agreement"]["dice"] == {"liver": 0.0, "spleen": 0.0}
    assert answer["doubts"]
    scored = httpx.post(f"{ward.server.url}/scoring/dice?run_sync=true", json={}, timeout=120)
    assert scored.status_code == 200, scored.text


def test_a_batch_goes_on_after_the_server_was_killed(tmp_path: Path) -> None:
    home, studies = make_ward(tmp_path, 12)
    server = LiveServer(home, ["--studies", str(studies), *ARGUMENTS], tmp_path)
    started = httpx.post(f"{server.url}/mshub/prelabels/tiny", json={"strategy": "first"}, timeout=60).json()
    assert (started["total"], started["state"]) == (12, "running")
    address = f"/mshub/prelabels/{started['id']}"
    until(lambda: httpx.get(server.url + address).json()["ended"] >= 2)
    server.kill()
    server = LiveServer(home, ["--studies", str(studies), *ARGUMENTS], tmp_path)
    try:
        told = until(lambda: (found := httpx.get(server.url + address).json())["state"] == "done" and found)
        assert told["counts"]["done"] + told["counts"]["skipped"] == 12
        assert told["failures"] == []
        status = httpx.get(f"{server.url}/info/").json()["datastore"]
        assert status["label_tags"] == {"original": 12}
        assert httpx.get(f"{server.url}/mshub/prelabels").json()[0]["id"] == started["id"]
    finally:
        server.stop()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_an_unknown_batch_is_a_404(ward: Site, method: str) -> None:
    assert httpx.request(method, f"{ward.server.url}/mshub/prelabels/99").status_code == 404


@pytest.mark.parametrize("body", [["case000"], "case000", {"images": ["nowhere"]}, {"limit": "many"}])
def test_a_batch_that_cannot_be_is_a_4xx_with_a_sentence(ward: Site, body: Any) -> None:
    answer = httpx.post(f"{ward.server.url}/mshub/prelabels/tiny", json=body)
    assert 400 <= answer.status_code < 500
    assert len(answer.json()["detail"]) > 20
