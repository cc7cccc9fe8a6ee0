"""The model store: versions never change, pointers move in one step, and nothing half-done looks installed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mshub import store as store_module
from mshub.catalogue import draft_card, dump_card
from mshub.errors import ChecksumMismatch, ModelNotAvailable, StoreError
from mshub.store import ModelStore, ModelVersion, default_home

CARD = draft_card("tiny", {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}})
RECORD = {"origin": {"how": "added"}, "labels": {"liver": 1}, "parent": None, "card": dump_card(CARD)}


def publish(
    store: ModelStore, content: str, model_id: str = "tiny", *, serve_first: bool = True, **facts: str
) -> ModelVersion:
    """Publish a model of two files, one of which holds `content`."""
    with store.staging() as staging:
        model = staging / "model"
        (model / "fold_0").mkdir(parents=True)
        (model / "plans.json").write_text("{}")
        (model / "fold_0" / "checkpoint_final.pth").write_text(content)
        return store.publish(model_id, model, {**RECORD, **facts}, serve_first=serve_first)


def left_behind(store: ModelStore) -> list[Path]:
    """Return what a store has in its staging folder."""
    return list((store.home / "staging").iterdir())


# -- publishing ---------------------------------------------------------------------------------------------------


def test_the_first_version_serves_at_once(store: ModelStore) -> None:
    version = publish(store, "weights")
    assert (version.model_id, version.version, version.number) == ("tiny", "v1", 1)
    assert store.installed() == ["tiny"]
    assert store.current("tiny") == version
    assert version.card == CARD
    assert (version.model_path / "fold_0" / "checkpoint_final.pth").read_text() == "weights"
    assert left_behind(store) == []


def test_a_second_version_waits_for_its_promotion(store: ModelStore) -> None:
    publish(store, "old")
    assert publish(store, "new").version == "v2"
    assert store.current("tiny").version == "v1"
    assert [version.version for version in store.versions("tiny")] == ["v1", "v2"]


def test_versions_are_listed_in_order_of_number_not_of_name(store: ModelStore) -> None:
    for number in range(11):
        publish(store, str(number))
    assert [version.number for version in store.versions("tiny")] == list(range(1, 12))
    assert publish(store, "twelfth").version == "v12"


def test_the_same_files_published_twice_are_one_version(store: ModelStore) -> None:
    first = publish(store, "weights")
    publish(store, "other weights")
    assert publish(store, "weights") == first
    assert len(store.versions("tiny")) == 2
    assert left_behind(store) == []


def test_a_version_records_a_checksum_of_every_file_and_when_it_came(store: ModelStore) -> None:
    record = publish(store, "weights").record
    assert record["files"] == {
        "plans.json": hashlib.sha256(b"{}").hexdigest(),
        "fold_0/checkpoint_final.pth": hashlib.sha256(b"weights").hexdigest(),
    }
    assert record["created"].endswith("+00:00")
    assert record["origin"] == {"how": "added"}


def test_the_files_of_a_version_are_read_only(store: ModelStore) -> None:
    version = publish(store, "weights")
    files = [path for path in version.path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert [path.name for path in files if path.stat().st_mode & 0o222] == []


def test_models_do_not_share_versions(store: ModelStore) -> None:
    publish(store, "weights", "one")
    publish(store, "weights", "two")
    publish(store, "more", "two")
    assert store.installed() == ["one", "two"]
    assert [len(store.versions(name)) for name in ("one", "two", "three")] == [1, 2, 0]


@pytest.mark.parametrize("at", ["moving the model in", "writing the pointer"])
def test_a_crash_while_publishing_leaves_the_model_not_installed_and_can_be_repeated(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        name = Path(target).name
        if name == ("v1" if at == "moving the model in" else "current"):
            raise OSError("power cut")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            publish(store, "weights")
    assert store.installed() == []
    with pytest.raises(ModelNotAvailable):
        store.current("tiny")
    assert left_behind(store) == []
    assert publish(store, "weights").version == "v1"
    assert store.current("tiny").version == "v1"
    assert store.installed() == ["tiny"]


def test_a_crash_while_promoting_leaves_the_old_version_serving(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "old")
    publish(store, "new")

    def crash(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            store.promote("tiny", "v2", "better")
    assert store.current("tiny").version == "v1"
    assert store.promote("tiny", "v2", "better").version == "v2"
    assert store.current("tiny").version == "v2"


def publish_from_another_process(home: Path, content: str, start: Any) -> None:
    start.wait()
    publish(ModelStore(home), content)


def test_processes_that_publish_at_once_make_a_version_each(store: ModelStore) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    contents = [f"weights {number}" * 20_000 for number in range(2)]
    workers = [
        context.Process(target=publish_from_another_process, args=(store.home, content, start)) for content in contents
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    versions = store.versions("tiny")
    assert [version.version for version in versions] == ["v1", "v2"]
    found = {(version.model_path / "fold_0" / "checkpoint_final.pth").read_text() for version in versions}
    assert found == set(contents)
    assert [step["to"] for step in store.history("tiny")] == ["v1"]
    assert store.verify("tiny").version == "v1"
    assert store.verify("tiny", "v2").version == "v2"


def test_a_lock_that_is_not_released_becomes_a_sentence(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, "weights")
    monkeypatch.setattr(store_module, "LOCK_TIMEOUT_S", 0.05)
    with (
        FileLock(store.home / "models" / "tiny" / ".lock"),
        pytest.raises(StoreError, match="Another process has been changing tiny"),
    ):
        store.promote("tiny", "v1", "again")


# -- versions nobody has judged ------------------------------------------------------------------------------------


def test_a_first_version_that_must_be_judged_waits_for_its_promotion(store: ModelStore) -> None:
    version = publish(store, "weights", serve_first=False)
    assert version.version == "v1"
    assert store.versions("tiny") == [version]
    assert store.installed() == []
    assert store.history("tiny") == []
    assert store.verify("tiny", "v1") == version
    with pytest.raises(ModelNotAvailable, match="tiny is not installed"):
        store.current("tiny")
    store.promote("tiny", "v1", "gate: better on all 5 cases")
    assert store.installed() == ["tiny"]
    assert store.current("tiny") == version
    assert [(step["from"], step["to"]) for step in store.history("tiny")] == [(None, "v1")]


def test_the_same_files_published_again_to_be_judged_still_wait(store: ModelStore) -> None:
    first = publish(store, "weights", serve_first=False)
    assert publish(store, "weights", serve_first=False) == first
    assert store.installed() == []


def test_a_version_that_somebody_installs_serves_even_if_others_wait_to_be_judged(store: ModelStore) -> None:
    publish(store, "trained here", serve_first=False)
    assert publish(store, "from elsewhere").version == "v2"
    assert store.current("tiny").version == "v2"


def test_installing_the_files_of_a_waiting_version_lets_it_serve(store: ModelStore) -> None:
    publish(store, "weights", serve_first=False)
    assert publish(store, "weights").version == "v1"
    assert store.current("tiny").version == "v1"


def test_a_later_version_to_be_judged_changes_nothing_about_what_serves(store: ModelStore) -> None:
    publish(store, "old")
    assert publish(store, "new", serve_first=False).version == "v2"
    assert store.current("tiny").version == "v1"
    assert len(store.history("tiny")) == 1


# -- the pointer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"", b"v9", b"../other/v1", b"latest", b"v0", b"v01", b"\xff\xfe\x00", b"v1\nv2"])
def test_garbage_in_the_pointer_means_not_installed_and_adding_repairs_it(store: ModelStore, garbage: bytes) -> None:
    publish(store, "weights", "other")
    publish(store, "weights")
    (store.home / "models" / "tiny" / "current").write_bytes(garbage)
    assert store.installed() == ["other"]
    with pytest.raises(ModelNotAvailable, match="tiny is not installed"):
        store.current("tiny")
    publish(store, "weights")
    assert store.current("tiny").version == "v1"


def test_a_pointer_that_is_a_folder_means_not_installed(store: ModelStore) -> None:
    (store.home / "models" / "tiny" / "current").mkdir(parents=True)
    assert store.installed() == []


def test_white_space_around_the_pointer_does_no_harm(store: ModelStore) -> None:
    publish(store, "weights")
    (store.home / "models" / "tiny" / "current").write_text("  v1\r\n")
    assert store.current("tiny").version == "v1"


def test_a_promotion_switches_and_is_written_down(store: ModelStore) -> None:
    publish(store, "old")
    publish(store, "new")
    assert store.promote("tiny", "v2", "Dice 0.91 against 0.88").version == "v2"
    assert store.current("tiny").version == "v2"
    first, second = store.history("tiny")
    assert (first["from"], first["to"], first["reason"]) == (None, "v1", "first version")
    assert (second["from"], second["to"], second["reason"]) == ("v1", "v2", "Dice 0.91 against 0.88")


def test_a_rollback_returns_to_the_version_before_the_last_promotion(store: ModelStore) -> None:
    for content in ("one", "two", "three"):
        publish(store, content)
    store.promote("tiny", "v3", "better")
    store.promote("tiny", "v2", "better still")
    assert store.rollback("tiny").version == "v3"
    assert store.current("tiny").version == "v3"
    assert store.history("tiny")[-1]["reason"] == "rollback from v2"


def test_a_second_rollback_undoes_the_promotion_before(store: ModelStore) -> None:
    for content in ("one", "two", "three"):
        publish(store, content)
    store.promote("tiny", "v2", "better")
    store.promote("tiny", "v3", "better still")
    assert [store.rollback("tiny").version, store.rollback("tiny").version] == ["v2", "v1"]
    with pytest.raises(StoreError, match="nothing to go back to"):
        store.rollback("tiny")
    store.promote("tiny", "v3", "after all")
    assert store.rollback("tiny").version == "v1"


def test_the_same_files_with_another_card_are_another_version(store: ModelStore) -> None:
    first = publish(store, "one", card="a card")
    assert publish(store, "one", card="a card").version == first.version
    assert publish(store, "one", card="a corrected card").version == "v2"
    assert store.current("tiny").version == "v1"


def test_promoting_what_serves_already_does_not_spoil_the_rollback(store: ModelStore) -> None:
    publish(store, "old")
    publish(store, "new")
    store.promote("tiny", "v2", "better")
    store.promote("tiny", "v2", "better, again")
    assert store.rollback("tiny").version == "v1"


def test_there_is_nothing_to_roll_back_to_before_a_promotion(store: ModelStore) -> None:
    publish(store, "old")
    publish(store, "new")
    with pytest.raises(StoreError, match="nothing to go back to"):
        store.rollback("tiny")
    assert store.current("tiny").version == "v1"


def test_a_rollback_of_a_model_that_is_not_there_fails(store: ModelStore) -> None:
    with pytest.raises(StoreError):
        store.rollback("tiny")
    assert store.history("tiny") == []


@pytest.mark.parametrize("name", ["v3", "v0", "2", "", "current", "../tiny/v1", "v1/.."])
def test_only_versions_that_exist_can_be_promoted(store: ModelStore, name: str) -> None:
    publish(store, "old")
    publish(store, "new")
    with pytest.raises(ModelNotAvailable, match="installed: v1, v2"):
        store.promote("tiny", name, "why not")
    assert store.current("tiny").version == "v1"
    assert len(store.history("tiny")) == 1


def test_a_record_nobody_can_read_does_not_hide_the_other_models(store: ModelStore) -> None:
    publish(store, "one", model_id="good")
    broken = publish(store, "two", model_id="broken")
    (broken.path / "version.json").chmod(0o644)
    (broken.path / "version.json").write_text("{")
    assert store.installed() == ["good"]


def test_a_card_of_another_version_of_mshub_can_still_be_read(store: ModelStore) -> None:
    version = publish(store, "one", card='key_of_the_future = "x"\n' + dump_card(CARD))
    assert version.card.title == "tiny"


def test_a_promotion_whose_history_was_not_written_can_be_rolled_back(store: ModelStore) -> None:
    publish(store, "one")
    publish(store, "two")
    (store.home / "models" / "tiny" / "current").write_text("v2\n")
    assert store.rollback("tiny").version == "v1"


def test_a_rollback_whose_history_was_not_written_never_leads_back_to_what_was_rolled_back(store: ModelStore) -> None:
    publish(store, "one")
    publish(store, "two")
    store.promote("tiny", "v2", "better")
    (store.home / "models" / "tiny" / "current").write_text("v1\n")  # then the disk was full
    with pytest.raises(StoreError, match="nothing to go back to"):
        store.rollback("tiny")
    assert store.current("tiny").version == "v1"


def test_a_line_of_the_history_that_was_broken_off_spoils_no_other(store: ModelStore) -> None:
    publish(store, "one")
    publish(store, "two")
    publish(store, "three")
    store.promote("tiny", "v2", "better")
    history = store.home / "models" / "tiny" / "history.jsonl"
    with history.open("a") as stream:
        stream.write('{"time": "2026-11-27T00:0')
    store.promote("tiny", "v3", "better still")
    assert [step["to"] for step in store.history("tiny")] == ["v1", "v2", "v3"]
    assert store.rollback("tiny").version == "v2"


def test_the_number_of_a_version_that_was_removed_is_not_given_again(store: ModelStore) -> None:
    publish(store, "one")
    removed = publish(store, "two")
    store.promote("tiny", "v2", "better")
    store.rollback("tiny")
    shutil.rmtree(removed.path)
    assert publish(store, "three").version == "v3"


def test_an_old_version_that_cannot_be_read_is_left_out_of_what_is_shown(store: ModelStore) -> None:
    old = publish(store, "one")
    publish(store, "two")
    store.promote("tiny", "v2", "better")
    (old.path / "version.json").chmod(0o644)
    (old.path / "version.json").write_text("{")
    assert [version.version for version in store.readable_versions("tiny")] == ["v2"]
    with pytest.raises(StoreError):
        store.versions("tiny")


# -- checking -----------------------------------------------------------------------------------------------------


def test_untouched_models_verify(store: ModelStore) -> None:
    publish(store, "old")
    publish(store, "new")
    assert store.verify("tiny").version == "v1"
    assert store.verify("tiny", "v2").version == "v2"


def tamper(path: Path) -> None:
    path.chmod(0o644)
    path.write_text("other weights")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: tamper(model / "fold_0" / "checkpoint_final.pth"), "fold_0/checkpoint_final.pth"),
        (lambda model: (model / "plans.json").unlink(), "plans.json"),
        (lambda model: (model / "fold_0" / "extra.pth").write_text("more"), "fold_0/extra.pth"),
    ],
    ids=["changed", "vanished", "appeared"],
)
def test_a_tampered_file_is_named(store: ModelStore, change: Any, named: str) -> None:
    version = publish(store, "weights")
    change(version.model_path)
    with pytest.raises(ChecksumMismatch, match=named):
        store.verify("tiny")


def test_a_damaged_record_names_the_file_and_what_to_do(store: ModelStore) -> None:
    record = publish(store, "weights").path / "version.json"
    record.chmod(0o644)
    record.write_text('{"files": ')
    with pytest.raises(StoreError, match=r"version\.json cannot be read .* install it again"):
        store.current("tiny")


def test_a_model_that_is_not_installed_says_how_to_get_it(store: ModelStore) -> None:
    with pytest.raises(ModelNotAvailable, match="mshub fetch liver-lesion-ct"):
        store.current("liver-lesion-ct")


# -- staging, cards, places ---------------------------------------------------------------------------------------


def test_staging_is_removed_even_after_an_error(store: ModelStore) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("a download")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), store.staging() as staging:
        fail(staging)
    assert left_behind(store) == []


def test_a_home_that_cannot_be_written_becomes_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = ModelStore(tmp_path / "file" / "home")
    assert store.installed() == []
    with pytest.raises(StoreError, match="cannot be written"), store.staging():
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_home_without_write_permission_becomes_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="cannot be written"), ModelStore(tmp_path / "home").staging():
            pass
    finally:
        tmp_path.chmod(0o755)


def test_reading_an_empty_store_creates_nothing(store: ModelStore) -> None:
    assert store.installed() == []
    assert store.versions("starter") == []
    assert store.history("starter") == []
    assert "starter" in store.catalogue()
    assert not store.home.exists()


def test_a_kept_card_joins_the_catalogue_and_can_be_replaced(store: ModelStore) -> None:
    assert "tiny" not in store.catalogue()
    store.keep_card(CARD)
    assert store.catalogue().get("tiny") == CARD
    store.keep_card(CARD.model_copy(update={"title": "Renamed"}))
    assert store.catalogue().get("tiny").title == "Renamed"
    assert [path.name for path in (store.home / "cards").iterdir()] == ["tiny.toml"]


def test_the_home_comes_from_the_environment_or_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSHUB_HOME", str(tmp_path / "somewhere"))
    assert default_home() == tmp_path / "somewhere"
    monkeypatch.setenv("MSHUB_HOME", "~/models")
    assert default_home() == Path("~/models").expanduser()
    monkeypatch.delenv("MSHUB_HOME")
    assert default_home().name == "mshub"


def test_the_history_survives_a_blank_line(store: ModelStore) -> None:
    publish(store, "weights")
    path = store.home / "models" / "tiny" / "history.jsonl"
    path.write_text(path.read_text() + "\n")
    assert [json.dumps(step["to"]) for step in store.history("tiny")] == ['"v1"']
