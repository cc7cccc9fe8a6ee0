"""bench/reliability in small: bad files, odd texts, people at work and a wrong PACS; what storing costs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

import bad_files
import index_cost
import load
import pacs_faults
import paths
import schema
import soak
from arena import Arena
from pacs_arena import hospital
from traffic import Journal, Person
from traversals import traversals
from wrong_series import cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is looked at is in /proc and told by inotify")
EVERY = 13


def test_bad_files_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    place = Arena(tmp_path)
    try:
        found = bad_files.send_all(place, EVERY, 30)
    finally:
        place.server.stop()
    assert found["not_refused"] == []
    assert found["temporary_files_left"] == []
    assert found["requests"] > 40
    assert bad_files.holds(found), bad_files.report(found)


def test_no_text_reads_or_writes_a_file_outside(tmp_path: Path) -> None:
    texts = traversals(tmp_path)
    assert len(texts) >= 200
    with paths.guarded_site(tmp_path) as place:
        found = paths.ask_all(tmp_path, place, texts[:: len(texts) // 5])
    assert (found["touched"], found["changed"], found["in_answers"]) == ([], [], [])
    assert found["server_errors"] == []
    assert found["canaries"] > 10
    assert found["requests"] > 1000
    assert paths.holds(found)


def test_no_operation_answers_5xx(tmp_path: Path) -> None:
    place = Arena(tmp_path)
    try:
        found = schema.ask_all(place, 200, quick=True)
    finally:
        place.server.stop()
    for who in ("without_users", "as_admin"):
        assert found[who]["faults"] == []
        assert found[who]["operations"] > 90
        assert found[who]["succeeded"] > 0.2 * found[who]["cases"]
    assert schema.holds(found), schema.report(found)


def test_what_is_written_to_store_something_does_not_grow_with_the_images(tmp_path: Path) -> None:
    few, many = (index_cost.measured("MSHub", images, tmp_path / str(images)) for images in (25, 250))
    before = index_cost.measured("MSHub, whole each time", 250, tmp_path / "before")
    for what in index_cost.WHAT:
        assert many[f"{what}_bytes"] < 1.1 * few[f"{what}_bytes"]
        assert many[f"{what}_bytes"] < before["index_bytes"] / 50
    assert many["index_bytes"] > 8 * few["index_bytes"]
    assert index_cost.report([few, many, before]).count("\n") == 4


def test_a_series_comes_whole_from_a_pacs_that_misbehaves_or_is_refused() -> None:
    every = list(cases("axial, 5"))
    chosen = [*islice(every, 3, None, 43), next(case for case in every if case.stalls)]
    with hospital() as place:
        found = pacs_faults.try_all(place, chosen)
    assert [problem for outcome in found.values() for problem in outcome.wrong] == []
    assert sum(outcome.cases for outcome in found.values()) > 8
    assert sum(outcome.refused for outcome in found.values()) > 4
    assert max(outcome.slowest_info_s for outcome in found.values()) < 20, pacs_faults.report(found)


def test_the_watch_sees_what_is_opened_and_made(tmp_path: Path) -> None:
    from watch import Watch, snapshot

    (tmp_path / "canary.txt").write_text("x")
    (tmp_path / "other.txt").write_text("x")
    before, watch = snapshot(tmp_path), Watch([tmp_path], "canary")
    assert watch.happened() == []
    (tmp_path / "other.txt").read_text()
    assert watch.happened() == []
    (tmp_path / "canary.txt").read_text()
    (tmp_path / "canary-new").write_text("y")
    assert {line.split()[0] for line in watch.happened()} >= {"opened", "read", "made", "written"}
    watch.close()
    assert snapshot(tmp_path).keys() - before.keys() == {str(tmp_path / "canary-new")}


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    place = Arena(tmp_path_factory.mktemp("ward"), has_users=True)
    yield place
    place.server.stop()


def test_people_at_work_beside_long_predictions_lose_nothing(ward: Arena) -> None:
    found = load.measure(ward, clients=3, requests=25, count=2, seconds=1.0)
    assert found["wrong"] == {}
    assert found["labels"] > 0 == found["labels_lost"]
    assert found["requests"] > 75
    assert found["info_requests"] > 20
    assert len(found["long_predictions_s"]) == 2
    assert {row[0] for row in found["latencies"]} >= {"info", "label", "list of images"}


def test_a_lost_label_and_an_odd_answer_are_noticed(ward: Arena) -> None:
    journal = Journal()
    person = Person(ward.server.url, ward.token, "careful", journal, seed=7)
    person.begin()
    person.label()
    person.label()
    assert (person.check(), journal.wrong) == (0, [])
    kept = ward.studies / "labels" / "version_1" / "careful.nii.gz"
    kept.write_bytes(kept.read_bytes()[:-1])
    assert person.check() == 1
    (ward.studies / "labels" / "final" / "careful.nii.gz").write_bytes(kept.read_bytes())
    person.own_label()
    assert journal.wrong == ["the label of careful is not the last one submitted"]
    person.begin()
    assert journal.wrong[1].startswith("upload: 409")


def test_the_soak_samples_what_the_server_holds(ward: Arena) -> None:
    found = soak.soak(ward, minutes=0.1, every_s=1.0)
    assert (found["wrong"], found["labels_lost"]) == ({}, 0)
    assert found["requests"] >= 4
    assert all(one["rss_mb"] > 100 and one["threads"] > 1 and one["files"] > 5 for one in found["samples"])


def test_the_soak_tells_growth_from_noise() -> None:
    assert abs(soak.growth([50.0, *[100.0, 101.0, 99.0] * 9])["percent"]) < 0.5
    assert soak.growth([100.0 + minute for minute in range(40)])["percent"] > 5
    good = {"wrong": {}, "labels_lost": 0}
    for held, is_flat in (([0, 0, 0, 1] * 10, True), ([11, 12] * 20, True), ([11] * 20 + [12] * 20, False)):
        assert soak.holds({**good, "grown": {"threads": soak.growth(held)}}) is is_flat
