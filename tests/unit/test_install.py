"""Installing models: from folders, zips and the web, checked against their card, wholly or not at all."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import make_model_folder
from mshub.bundled import sample_data
from mshub.catalogue import load_card
from mshub.errors import (
    CatalogueError,
    ChecksumMismatch,
    DownloadError,
    LabelError,
    ModelFolderError,
    ModelNotAvailable,
    StoreError,
)
from mshub.install import add_model, fetch_model, origin_of
from mshub.nnunet.folder import ModelFolder
from mshub.store import ModelStore

CARD = """
id = "{id}"
title = "Liver and spleen of our lab"
site = "abdomen"
modality = "CT"
target = "liver, spleen"
status = "{status}"
generation = 2
"""


def zipped(folder: Path, target: Path, inside: str = "") -> Path:
    """Return a zip of a folder, under `inside`."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, Path(inside) / path.relative_to(folder))
    return target


@pytest.fixture
def card(tmp_path: Path):
    """Write a card of a lab's own model."""

    def write(more: str = "", *, model_id: str = "our-liver", status: str = "local") -> Path:
        path = tmp_path / "card.toml"
        path.write_text(CARD.format(id=model_id, status=status) + more)
        return path

    return write


def assert_nothing_is_left(store: ModelStore) -> None:
    """Nothing is installed, half-installed or known that was not before."""
    assert store.installed() == []
    assert list((store.home / "models").glob("*/v*")) == []
    staging = store.home / "staging"
    assert not staging.exists() or list(staging.iterdir()) == []
    assert not (store.home / "cards").exists()


# -- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "nested folder", "zip", "nested zip"])
def test_a_model_is_installed_from(source: str, store: ModelStore, liver_spleen: Path, tmp_path: Path) -> None:
    nested = "results/Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres"
    if source == "nested folder":
        shutil.copytree(liver_spleen, tmp_path / "download" / nested)
    path = {
        "folder": lambda: liver_spleen,
        "nested folder": lambda: tmp_path / "download",
        "zip": lambda: zipped(liver_spleen, tmp_path / "model.zip"),
        "nested zip": lambda: zipped(liver_spleen, tmp_path / "model.zip", nested),
    }[source]()
    version = add_model(store, "tiny", path)
    assert store.installed() == ["tiny"]
    assert store.current("tiny") == version
    assert store.verify("tiny") == version
    assert ModelFolder.open(version.model_path).labels.names == ("liver", "spleen")
    assert version.record["origin"] == origin_of(path)
    assert list((store.home / "staging").iterdir()) == []


def test_the_source_is_left_as_it_was(store: ModelStore, liver_spleen: Path) -> None:
    before = {path: path.stat() for path in liver_spleen.rglob("*")}
    add_model(store, "tiny", liver_spleen)
    after = {path: path.stat() for path in liver_spleen.rglob("*")}
    assert {path: (found.st_size, found.st_mode, found.st_mtime_ns) for path, found in before.items()} == {
        path: (found.st_size, found.st_mode, found.st_mtime_ns) for path, found in after.items()
    }


def test_the_origin_is_recorded_with_the_checksum_of_a_file(
    store: ModelStore, liver_spleen: Path, tmp_path: Path
) -> None:
    path = zipped(liver_spleen, tmp_path / "model.zip")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin_of(path) == {"how": "added", "from": "model.zip", "sha256": sha256}
    assert origin_of(liver_spleen) == {"how": "added", "from": liver_spleen.name}
    named = add_model(store, "tiny", path, origin=origin_of(path, "https://example.org/record/1"))
    assert named.record["origin"] == {"how": "added", "from": "https://example.org/record/1", "sha256": sha256}


@pytest.mark.parametrize(
    ("given", "file", "in_dataset", "expected"),
    [
        ("CC0", "CC BY 4.0", "CC BY-SA", "CC0"),
        (None, "\n CC BY 4.0 \nmore", "CC BY-SA", "CC BY-SA"),
        (None, "\n CC BY 4.0 \nmore", None, "CC BY 4.0 (LICENSE.txt)"),
        (None, "\n", None, None),
        (None, None, None, None),
    ],
)
def test_the_licence_is_the_one_given_or_that_of_the_card_or_that_of_the_file(
    store: ModelStore, tmp_path: Path, given: str | None, file: str | None, in_dataset: str | None, expected: str | None
) -> None:
    folder = make_model_folder(tmp_path / "model", dataset_extra={"licence": in_dataset} if in_dataset else None)
    if file is not None:
        (folder / "LICENSE.txt").write_text(file)
    version = add_model(store, "tiny", folder, licence=given)
    assert (version.record["licence"], version.card.licence) == (expected, expected)
    assert store.catalogue().get("tiny").licence == expected


def test_a_version_records_what_a_server_tells_of_it(store: ModelStore, two_channels: Path) -> None:
    record = add_model(store, "tumour", two_channels).record
    expected = {
        "labels": {"whole tumour": 1, "core": 2},
        "channels": ["T1w", "T2w"],
        "configuration": "3d_fullres",
        "folds": ["0"],
        "trainer": "nnUNetTrainer",
        "reader": "SimpleITKIO",
        "parent": None,
    }
    assert {key: record[key] for key in expected} == expected
    assert set(record["files"]) == {"dataset.json", "plans.json", "fold_0/checkpoint_final.pth"}


def test_a_model_inside_a_folder_with_several_is_chosen_by_its_root(
    store: ModelStore, liver_spleen: Path, two_channels: Path, tmp_path: Path
) -> None:
    shutil.copytree(liver_spleen, tmp_path / "all" / "a")
    shutil.copytree(two_channels, tmp_path / "all" / "b")
    with pytest.raises(ModelFolderError, match=r"holds 2 models:\n  a\n  b\n"):
        add_model(store, "tumour", tmp_path / "all")
    assert_nothing_is_left(store)
    assert list(add_model(store, "tumour", tmp_path / "all", root="b").record["labels"]) == ["whole tumour", "core"]


def test_adding_the_same_model_twice_is_one_version(store: ModelStore, liver_spleen: Path, tmp_path: Path) -> None:
    first = add_model(store, "tiny", liver_spleen)
    again = add_model(store, "tiny", zipped(liver_spleen, tmp_path / "model.zip"))
    assert again == first
    assert len(store.versions("tiny")) == 1


def test_adding_other_weights_is_a_new_version_that_waits(
    store: ModelStore, liver_spleen: Path, tmp_path: Path
) -> None:
    add_model(store, "tiny", liver_spleen)
    newer = Path(shutil.copytree(liver_spleen, tmp_path / "newer"))
    path = newer / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["network_weights"]["decoder.seg_layers.1.bias"] += 1
    torch.save(checkpoint, path)
    assert add_model(store, "tiny", newer).version == "v2"
    assert store.current("tiny").version == "v1"


# -- cards --------------------------------------------------------------------------------------------------------


def test_an_own_model_gets_a_drafted_card(store: ModelStore, two_channels: Path) -> None:
    add_model(store, "our-tumour", two_channels)
    card = store.catalogue().get("our-tumour")
    assert (card.status, card.modality, card.generation) == ("local", "MR", 2)
    assert card.labels == ("whole tumour", "core")
    assert [channel.name for channel in card.channels] == ["T1w", "T2w"]
    assert load_card(store.home / "cards" / "our-tumour.toml") == card


def test_an_own_model_keeps_the_card_it_is_given(store: ModelStore, liver_spleen: Path, card: Any) -> None:
    path = card('labels = ["liver", "spleen"]\ninput_clip = [-160, 240]\n')
    version = add_model(store, "our-liver", liver_spleen, card_path=path)
    assert version.card == store.catalogue().get("our-liver") == load_card(path)
    assert version.card.input_clip == (-160, 240)


def test_an_own_model_can_be_added_again_with_a_better_card(store: ModelStore, liver_spleen: Path, card: Any) -> None:
    add_model(store, "our-liver", liver_spleen)
    add_model(store, "our-liver", liver_spleen, card_path=card('notes = ["venous phase"]\n'))
    assert store.catalogue().get("our-liver").notes == ("venous phase",)


def test_a_corrected_card_makes_a_version_that_waits_for_promotion(
    store: ModelStore, liver_spleen: Path, card: Any
) -> None:
    add_model(store, "our-liver", liver_spleen, card_path=card(""))
    corrected = add_model(store, "our-liver", liver_spleen, card_path=card("input_clip = [-125, 275]\n"))
    assert (corrected.version, store.current("our-liver").version) == ("v2", "v1")
    assert store.current("our-liver").card.input_clip is None
    assert corrected.card.input_clip == (-125, 275)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ('labels = ["liver", "kidney"]', LabelError, "lacks kidney.*also has spleen"),
        ('labels = ["spleen", "liver"]', LabelError, "order"),
        ('labels = ["liver", "spleen", "lesion"]', LabelError, "lacks lesion"),
        ('[[channels]]\nname = "MR"', ModelFolderError, r"channels MR; the model's dataset\.json has CT"),
        ('configuration = "3d_lowres"', ModelFolderError, "for 3d_lowres; these weights are for 3d_fullres"),
    ],
    ids=["other labels", "other order", "more labels", "other channel", "other configuration"],
)
def test_a_card_that_does_not_fit_the_weights_is_refused_and_nothing_is_left(
    store: ModelStore, liver_spleen: Path, card: Any, more: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        add_model(store, "our-liver", liver_spleen, card_path=card(more + "\n"))
    assert_nothing_is_left(store)


def test_a_model_of_the_catalogue_must_have_the_labels_of_its_card(store: ModelStore, liver_spleen: Path) -> None:
    with pytest.raises(LabelError, match="card of starter"):
        add_model(store, "starter", liver_spleen)
    assert_nothing_is_left(store)


def test_a_model_of_the_catalogue_takes_no_other_card(store: ModelStore, liver_spleen: Path, card: Any) -> None:
    path = card(model_id="liver-lesion-ct")
    with pytest.raises(CatalogueError, match="has a card already"):
        add_model(store, "liver-lesion-ct", liver_spleen, card_path=path)
    assert_nothing_is_left(store)


def test_a_card_of_another_model_is_refused(store: ModelStore, liver_spleen: Path, card: Any) -> None:
    with pytest.raises(CatalogueError, match="is for 'our-liver', not 'my-liver'"):
        add_model(store, "my-liver", liver_spleen, card_path=card())
    assert_nothing_is_left(store)


@pytest.mark.parametrize("model_id", ["../outside", "/tmp/outside", "Our Liver", "a", "", "v1/x", ".hidden"])
def test_an_impossible_id_is_refused(store: ModelStore, liver_spleen: Path, model_id: str) -> None:
    with pytest.raises(CatalogueError, match="id"):
        add_model(store, model_id, liver_spleen)
    assert_nothing_is_left(store)
    assert sorted(path.name for path in store.home.parent.iterdir()) == ["home"]


def test_the_clipping_of_a_catalogue_model_travels_with_its_weights(
    store: ModelStore, liver_spleen: Path, card: Any
) -> None:
    assert add_model(store, "liver-lesion-ct", liver_spleen).card.input_clip == (-125, 275)
    assert not (store.home / "cards").exists()


# -- what is no model -----------------------------------------------------------------------------------------------


def test_damaged_weights_are_refused_and_nothing_is_left(store: ModelStore, liver_spleen: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(liver_spleen, tmp_path / "broken"))
    path = broken / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelFolderError, match=r"checkpoint_final\.pth"):
        add_model(store, "tiny", broken)
    assert_nothing_is_left(store)


def test_weights_of_a_later_fold_that_do_not_fit_are_refused(store: ModelStore, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "mixed", folds=("0", "1"))
    other = make_model_folder(tmp_path / "other", channels=("T1", "T2"))
    shutil.copyfile(other / "fold_0" / "checkpoint_final.pth", model / "fold_1" / "checkpoint_final.pth")
    with pytest.raises(ModelFolderError, match="do not fit the architecture"):
        add_model(store, "tiny", model)
    assert_nothing_is_left(store)


@pytest.mark.parametrize("name", ["nothing", "empty", "text.zip"])
def test_what_holds_no_model_is_refused(store: ModelStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises((StoreError, ModelFolderError)):
        add_model(store, "tiny", tmp_path / name)
    assert_nothing_is_left(store)


# -- fetching -----------------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A web server: (its folder, its address)."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def publish_card(store: ModelStore, url: str, sha256: str | None = None) -> None:
    """Put the card of a model whose weights are at `url` into the store's own cards."""
    weights = f'[weights]\nkind = "https"\nurl = "{url}"\n' + (f'sha256 = "{sha256}"\n' if sha256 else "")
    folder = store.home / "cards"
    folder.mkdir(parents=True)
    (folder / "our-liver.toml").write_text(CARD.format(id="our-liver", status="released") + weights)


def test_a_model_is_fetched_from_the_address_in_its_card(
    store: ModelStore, liver_spleen: Path, site: tuple[Path, str]
) -> None:
    folder, address = site
    archive = zipped(liver_spleen, folder / "model.zip", "weights/3d")
    size = archive.stat().st_size
    publish_card(store, f"{address}/model.zip", hashlib.sha256(archive.read_bytes()).hexdigest())
    steps: list[tuple[int, int | None]] = []
    version = fetch_model(store, "our-liver", lambda done, total: steps.append((done, total)))
    assert store.current("our-liver") == version
    assert version.card.title == "Liver and spleen of our lab"
    assert steps[-1] == (size, size)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_weights_with_another_checksum_are_not_installed(
    store: ModelStore, liver_spleen: Path, site: tuple[Path, str]
) -> None:
    folder, address = site
    zipped(liver_spleen, folder / "model.zip")
    publish_card(store, f"{address}/model.zip", "0" * 64)
    with pytest.raises(ChecksumMismatch):
        fetch_model(store, "our-liver")
    assert store.installed() == []
    assert [path for path in (store.home / "downloads").rglob("*.zip*") if path.is_file()] == []


def test_an_address_without_a_file_is_a_sentence(store: ModelStore, site: tuple[Path, str]) -> None:
    publish_card(store, f"{site[1]}/gone.zip")
    with pytest.raises(DownloadError, match="404"):
        fetch_model(store, "our-liver")
    assert store.installed() == []


@pytest.mark.parametrize("model_id", ["hn-oar-ct", "hn-tumor-ln-mr"])
def test_an_announced_model_cannot_be_fetched(store: ModelStore, model_id: str) -> None:
    with pytest.raises(ModelNotAvailable, match=f"announced: its weights are not published.*mshub add {model_id}"):
        fetch_model(store, model_id)
    assert_nothing_is_left(store)


def test_an_unknown_model_cannot_be_fetched(store: ModelStore) -> None:
    with pytest.raises(CatalogueError, match="Did you mean 'starter'"):
        fetch_model(store, "startr")


def test_the_starter_model_comes_with_mshub(store: ModelStore) -> None:
    folder = sample_data() / "starter-model"
    if not folder.is_dir():
        pytest.skip("sample-data/starter-model is not in this checkout: bench/train_starter.py trains it")
    version = fetch_model(store, "starter")
    assert store.installed() == ["starter"]
    assert list(version.record["labels"]) == list(store.catalogue().get("starter").labels or ())
    assert version.record["labels"].keys() == json.loads((folder / "dataset.json").read_text())["labels"].keys() - {
        "background"
    }
