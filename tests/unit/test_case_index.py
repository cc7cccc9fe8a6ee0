"""The case index: what the active-learning loop knows, the same for every thread and process that asks."""

from __future__ import annotations

import logging
import multiprocessing
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mshub import case_index as module
from mshub.case_index import ITEM_STATES, AgreementRow, Batch, CaseIndex, ChoiceRow, Lease
from mshub.errors import StoreError
from mshub.uncertainty import StructureUncertainty, Uncertainty


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "studies" / "cases.sqlite"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(path: Path, clock: Clock) -> Iterator[CaseIndex]:
    with CaseIndex(path, clock) as opened:
        yield opened


def measured(liver: float = 0.9, embedding: tuple[float, ...] = (0.5, -2.0, 1e-3)) -> Uncertainty:
    """Return an uncertainty with numbers that its rounding leaves alone."""
    structures = {
        "liver": StructureUncertainty(1500.25, mirror_dice=liver, soft_dice=0.85, entropy=0.125),
        "Tumör": StructureUncertainty(0.0),
    }
    return Uncertainty(structures, entropy_foreground=0.2, entropy_border=None, embedding=embedding)


def as_stored(uncertainty: Uncertainty) -> Uncertainty:
    """Return an uncertainty with an embedding of float32."""
    embedding = tuple(np.float32(uncertainty.embedding).tolist())
    return Uncertainty(
        uncertainty.structures, uncertainty.entropy_foreground, uncertainty.entropy_border, embedding=embedding
    )


def images(number: int) -> list[str]:
    return [f"image-{i:04d}" for i in range(number)]


# -- scores -------------------------------------------------------------------------------------------------------


def test_a_score_comes_back_as_it_was_kept(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured())
    assert index.score("a", "liver", "v1") == as_stored(measured())


def test_nothing_is_known_of_what_was_never_scored(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured())
    assert index.score("b", "liver", "v1") is None
    assert index.score("a", "spleen", "v1") is None
    assert index.score("a", "liver", "v2") is None
    assert index.scores("liver", "v2") == {}


def test_a_score_is_of_the_state_its_image_was_in(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured(), state="12 bytes")
    assert index.score("a", "liver", "v1", "12 bytes") is not None
    assert index.score("a", "liver", "v1", "13 bytes") is None
    assert index.score("a", "liver", "v1", "") is None
    assert index.score("a", "liver", "v1") is not None


def test_a_later_score_replaces_an_earlier_one(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured(0.5), state="old")
    index.keep_score("a", "liver", "v1", measured(0.75), state="new", profile="balanced")
    assert index.score("a", "liver", "v1", "old") is None
    assert index.scores("liver", "v1") == {"a": as_stored(measured(0.75))}
    assert index.states("liver", "v1") == {"a": "new"}


def test_a_network_without_an_encoder_has_no_embedding(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured(embedding=()))
    assert index.scores("liver", "v1")["a"].embedding == ()


def test_numbers_of_numpy_are_kept_as_numbers(index: CaseIndex) -> None:
    structures = {"liver": StructureUncertainty(np.float32(12.5), entropy=np.float64(0.5))}
    index.keep_score("a", "liver", "v1", Uncertainty(structures, embedding=tuple(np.float32([0.1, 0.2]))))
    found = index.score("a", "liver", "v1")
    assert found is not None
    assert found.structures == {"liver": StructureUncertainty(12.5, entropy=0.5)}
    assert found.embedding == tuple(np.float32([0.1, 0.2]).tolist())


def test_an_index_of_5000_cases_gives_all_of_them(index: CaseIndex) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(5000, 640)).astype(np.float32)
    for image, embedding in zip(images(5000), embeddings.tolist(), strict=True):
        index.keep_score(image, "liver", "v1", measured(embedding=tuple(embedding)))
    found = index.scores("liver", "v1")
    assert list(found) == images(5000)
    assert np.array_equal(np.float32([one.embedding for one in found.values()]), embeddings)


def test_a_score_that_cannot_be_read_is_left_out(
    index: CaseIndex, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for image in ("a", "b", "c", "d"):
        index.keep_score(image, "liver", "v1", measured())
    change(path, "UPDATE scores SET measured = '{' WHERE image = 'a'")
    change(path, "UPDATE scores SET measured = '{}' WHERE image = 'b'")
    change(path, "UPDATE scores SET embedding = x'000000' WHERE image = 'c'")
    with caplog.at_level(logging.WARNING, "mshub.case_scores"):
        assert list(index.scores("liver", "v1")) == ["d"]
        assert index.score("a", "liver", "v1") is None
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == ["a", "b", "c", "a"]


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


# -- images that cannot be scored ---------------------------------------------------------------------------------


def test_a_failure_is_kept_until_the_image_or_the_version_changes(index: CaseIndex) -> None:
    index.keep_failure("a", "liver", "v1", "it has one slice", "old")
    assert index.failures("liver", "v1") == {"a": "it has one slice"}
    assert index.failure("a", "liver", "v1", "old") == "it has one slice"
    assert index.failure("a", "liver", "v1", "new") is None
    assert index.failure("a", "liver", "v2") is None
    assert index.failures("liver", "v2") == {}


def test_an_image_is_either_scored_or_a_failure_whichever_came_last(index: CaseIndex) -> None:
    index.keep_failure("a", "liver", "v1", "no memory")
    index.keep_score("a", "liver", "v1", measured())
    assert (list(index.scores("liver", "v1")), index.failures("liver", "v1")) == (["a"], {})
    assert index.failure("a", "liver", "v1") is None
    index.keep_failure("a", "liver", "v1", "it is gone", "new")
    assert (index.scores("liver", "v1"), list(index.failures("liver", "v1"))) == ({}, ["a"])
    assert index.score("a", "liver", "v1") is None


def test_the_states_say_what_need_not_be_tried_again(index: CaseIndex) -> None:
    index.keep_score("a", "liver", "v1", measured(), state="1")
    index.keep_failure("b", "liver", "v1", "no", "2")
    index.keep_score("c", "liver", "v2", measured(), state="3")
    assert index.states("liver", "v1") == {"a": "1", "b": "2"}


def test_a_forgotten_image_is_forgotten_for_every_model_and_version(index: CaseIndex) -> None:
    for image in ("a", "b"):
        for version in ("v1", "v2"):
            index.keep_score(image, "liver", version, measured())
        index.keep_failure(image, "spleen", "v1", "no")
        index.keep_agreement(image, "liver", "v1", {"liver": 0.9}, 7, score=None)
        index.keep_label_dice(image, "liver", "v1", {"liver": 0.9}, label_state="")
        index.renew(image, "ann", 60)
    index.forget_image("a")
    assert list(index.scores("liver", "v1")) == list(index.scores("liver", "v2")) == ["b"]
    assert list(index.failures("spleen", "v1")) == ["b"]
    assert [row.image for row in index.agreements("liver")] == ["b"]
    assert (list(index.label_dice("liver", "v1")), list(index.leases())) == (["b"], ["b"])


def test_a_forgotten_image_stays_in_the_logs(index: CaseIndex) -> None:
    index.keep_choice("a", "liver", "ann", "random", True, "drawn")
    batch = index.new_batch("liver", ["a"], "ann", {})
    index.forget_image("a")
    assert [row.image for row in index.choices("liver")] == ["a"]
    assert index.next_item(batch) == "a"


# -- labels -------------------------------------------------------------------------------------------------------


def test_an_agreement_comes_back_as_it_was_kept(index: CaseIndex, clock: Clock) -> None:
    index.keep_agreement("a", "liver", "v1", {"liver": 0.9, "Tumör": 0.0}, 1234, score=0.75, trained=True)
    row = AgreementRow("a", "liver", "v1", {"liver": 0.9, "Tumör": 0.0}, 1234, 0.75, clock.now, True)
    assert index.agreements("liver") == [row]


def test_an_agreement_may_have_no_score(index: CaseIndex) -> None:
    index.keep_agreement("a", "liver", "v1", {}, 0, score=None)
    (row,) = index.agreements("liver")
    assert (row.score, row.dice, row.trained) == (None, {}, False)


def test_an_agreement_of_numpy_numbers_is_one_of_numbers(index: CaseIndex) -> None:
    index.keep_agreement("a", "liver", "v1", {"liver": np.float32(0.5)}, np.int64(7), score=np.float32(0.25))
    (row,) = index.agreements("liver")
    assert (row.dice, row.edited_voxels, row.score) == ({"liver": 0.5}, 7, 0.25)


def test_agreements_come_oldest_first_and_the_newest_of_an_image_wins(index: CaseIndex, clock: Clock) -> None:
    for number, image in enumerate(["a", "b", "a", "c"]):
        clock.now += 1
        index.keep_agreement(image, "liver", "v1", {"liver": number / 10}, number, score=None)
    found = [(row.image, row.edited_voxels) for row in index.agreements("liver")]
    assert found == [("b", 1), ("a", 2), ("c", 3)]


def test_agreements_of_one_moment_come_in_the_order_they_were_kept(index: CaseIndex) -> None:
    for image in ("b", "c", "a", "b"):
        index.keep_agreement(image, "liver", "v1", {}, 0, score=None)
    assert [row.image for row in index.agreements("liver")] == ["c", "a", "b"]


def test_agreements_are_of_one_version_or_of_all(index: CaseIndex) -> None:
    for model, version in (("liver", "v1"), ("liver", "v2"), ("spleen", "v1")):
        index.keep_agreement("a", model, version, {}, 0, score=None)
    assert [row.version for row in index.agreements("liver")] == ["v1", "v2"]
    assert [row.version for row in index.agreements("liver", "v2")] == ["v2"]
    assert index.agreements("liver", "v3") == []


def test_label_checks_say_which_label_was_checked(index: CaseIndex) -> None:
    index.keep_label_dice("a", "liver", "v1", {"liver": 0.5}, label_state="old")
    index.keep_label_dice("a", "liver", "v1", {"liver": np.float32(0.75)}, label_state="new")
    index.keep_label_dice("b", "liver", "v2", {"liver": 0.1}, label_state="")
    assert index.label_dice("liver", "v1") == {"a": ("new", {"liver": 0.75})}


# -- interest -----------------------------------------------------------------------------------------------------


def test_models_come_most_recently_asked_for_first(index: CaseIndex, clock: Clock) -> None:
    start = clock.now
    for model, client in (("liver", "ann"), ("spleen", "bob"), ("lung", "ann"), ("liver", "bob")):
        clock.now += 10
        index.note_interest(model, client)
    assert index.interests(start) == ["liver", "lung", "spleen"]
    assert index.interests(start + 30) == ["liver", "lung"]
    assert index.interests(clock.now + 1) == []


def test_a_client_has_the_model_it_asked_for_last(index: CaseIndex) -> None:
    for model in ("liver", "spleen", "liver"):
        index.note_interest(model, "ann")
    index.note_interest("lung", "bob")
    assert (index.last_model("ann"), index.last_model("bob"), index.last_model("eve")) == ("liver", "lung", None)
    assert index.interests(0) == ["lung", "liver", "spleen"]


# -- leases -------------------------------------------------------------------------------------------------------


def test_the_first_free_image_is_leased_in_the_order_given(index: CaseIndex, clock: Clock) -> None:
    assert index.lease(["c", "a", "b"], "ann", 60, model="liver") == "c"
    assert index.lease(["c", "a", "b"], "bob", 60, model="spleen") == "a"
    assert index.leases() == {
        "c": Lease("c", "ann", "liver", clock.now + 60),
        "a": Lease("a", "bob", "spleen", clock.now + 60),
    }


def test_a_client_is_not_given_its_own_image_again(index: CaseIndex) -> None:
    assert [index.lease(["a", "b"], "ann", 60, model="liver") for _ in range(3)] == ["a", "b", None]


def test_of_no_images_none_is_leased(index: CaseIndex) -> None:
    assert index.lease([], "ann", 60, model="liver") is None


def test_a_lease_ends_with_its_time(index: CaseIndex, clock: Clock, path: Path) -> None:
    index.lease(["a"], "ann", 60, model="liver")
    clock.now += 59.5
    assert (list(index.leases()), index.lease(["a"], "bob", 60, model="liver")) == (["a"], None)
    clock.now += 0.5
    assert index.leases() == {}
    assert index.lease(["b"], "bob", 60, model="liver") == "b"
    assert rows(path, "SELECT image FROM leases") == [("b",)]
    assert index.lease(["a"], "bob", 60, model="liver") == "a"


def rows(path: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(path)
    found = connection.execute(query).fetchall()
    connection.close()
    return found


def test_a_lease_is_renewed_by_its_client_only(index: CaseIndex, clock: Clock) -> None:
    index.lease(["a"], "ann", 60, model="liver")
    clock.now += 30
    assert not index.renew("a", "bob", 600)
    assert index.leases()["a"].until == clock.now + 30
    assert index.renew("a", "ann", 600)
    assert index.leases() == {"a": Lease("a", "ann", "liver", clock.now + 600)}


def test_renewing_a_free_image_takes_it(index: CaseIndex, clock: Clock) -> None:
    assert index.renew("a", "ann", 60, model="liver")
    clock.now += 61
    assert index.renew("a", "bob", 60)
    assert index.leases() == {"a": Lease("a", "bob", "", clock.now + 60)}


def test_a_released_image_is_free(index: CaseIndex) -> None:
    index.lease(["a"], "ann", 60, model="liver")
    index.release("a")
    index.release("never leased")
    assert index.leases() == {}
    assert index.lease(["a"], "bob", 60, model="liver") == "a"


# -- choices ------------------------------------------------------------------------------------------------------


def test_the_log_of_choices_says_who_was_offered_what_and_why(index: CaseIndex, clock: Clock) -> None:
    index.keep_choice("a", "liver", "ann", "hybrid", False, "the model is unsure of it")
    index.keep_choice("b", "liver", "bob", "random", True, "drawn at random")
    index.keep_choice("a", "spleen", "bob", "first", False, "the first")
    assert index.choices("liver") == [
        ChoiceRow("a", "liver", "ann", "hybrid", False, "the model is unsure of it", clock.now),
        ChoiceRow("b", "liver", "bob", "random", True, "drawn at random", clock.now),
    ]


def test_choices_are_counted_from_the_last_audit_on(index: CaseIndex) -> None:
    counts = []
    for audit in (False, False, True, False, True, True, False, False):
        index.keep_choice("a", "liver", "ann", "hybrid", audit, "")
        counts.append(index.choices_since_audit("liver"))
    assert counts == [1, 2, 0, 1, 0, 0, 1, 2]
    assert index.choices_since_audit("spleen") == 0


def test_every_fifth_choice_of_a_model_is_an_audit(index: CaseIndex) -> None:
    due = [(index.audit_is_due("liver", 5), index.audit_is_due("spleen", 2)) for _ in range(10)]
    assert [number for number, (liver, _) in enumerate(due, 1) if liver] == [5, 10]
    assert [number for number, (_, spleen) in enumerate(due, 1) if spleen] == [2, 4, 6, 8, 10]


def test_every_choice_or_none_may_be_an_audit(index: CaseIndex) -> None:
    assert [index.audit_is_due("liver", 1) for _ in range(3)] == [True] * 3
    assert [index.audit_is_due("liver", 0) for _ in range(3)] == [False] * 3


def test_an_audit_is_due_at_once_where_there_are_to_be_more_from_now_on(index: CaseIndex) -> None:
    assert [index.audit_is_due("liver", 100) for _ in range(7)] == [False] * 7
    assert [index.audit_is_due("liver", 3) for _ in range(4)] == [True, False, False, True]


# -- batches ------------------------------------------------------------------------------------------------------


def counts(**some: int) -> dict[str, int]:
    return {**dict.fromkeys(ITEM_STATES, 0), **some}


def test_a_batch_keeps_what_it_was_started_with(index: CaseIndex, clock: Clock) -> None:
    number = index.new_batch("liver", ["c", "a", "b"], "ann", {"profile": "balanced", "overwrite": False})
    options = {"profile": "balanced", "overwrite": False}
    expected = Batch(number, "liver", "ann", options, clock.now, "running", counts(waiting=3), ())
    assert index.batch(number) == expected
    assert index.batch(number + 1) is None


def test_items_are_taken_in_the_order_given_and_once(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["c", "a", "c", "b"], "ann", {})
    assert [index.next_item(number) for _ in range(4)] == ["c", "a", "b", None]
    assert index.batch(number).counts == counts(running=3)  # type: ignore[union-attr]


def test_a_batch_is_done_with_its_last_item(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["a", "b", "c"], "ann", {})
    states = []
    for state, message in (("failed", "it has one slice"), ("skipped", "it has a label"), ("done", "")):
        item = index.next_item(number)
        states.append(index.batch(number).state)  # type: ignore[union-attr]
        index.finish_item(number, str(item), state, message)  # type: ignore[arg-type]
    batch = index.batch(number)
    assert batch is not None
    assert states == ["running"] * 3
    assert (batch.state, batch.counts) == ("done", counts(done=1, failed=1, skipped=1))
    assert batch.failures == (("a", "it has one slice"),)
    assert index.next_item(number) is None


def test_failures_come_in_the_order_of_the_batch(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["c", "a", "b"], "ann", {})
    for image in ("b", "a", "c"):
        index.finish_item(number, image, "failed", f"{image} is damaged")
    batch = index.batch(number)
    assert batch is not None
    assert batch.failures == (("c", "c is damaged"), ("a", "a is damaged"), ("b", "b is damaged"))


def test_a_batch_of_nothing_is_done(index: CaseIndex) -> None:
    batch = index.batch(index.new_batch("liver", [], "ann", {}))
    assert batch is not None
    assert (batch.state, batch.counts) == ("done", counts())


def test_batches_come_newest_first_and_open_ones_in_their_turn(index: CaseIndex) -> None:
    numbers = [index.new_batch("liver", ["a"], "ann", {}) for _ in range(4)]
    index.finish_item(numbers[1], "a", "done")
    index.stop_batch(numbers[2])
    assert [batch.id for batch in index.batches()] == numbers[::-1]
    assert [batch.id for batch in index.open_batches()] == [numbers[0], numbers[3]]


def test_a_stopped_batch_hands_out_nothing_until_it_is_resumed(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["a", "b"], "ann", {})
    index.next_item(number)
    index.stop_batch(number)
    index.finish_item(number, "a", "done")
    batch = index.batch(number)
    assert batch is not None
    assert (index.next_item(number), batch.state, batch.counts) == (None, "stopped", counts(done=1, waiting=1))
    index.resume_batch(number)
    assert index.next_item(number) == "b"


def test_a_batch_stopped_during_its_last_item_is_done_with_it(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["a"], "ann", {})
    index.next_item(number)
    index.stop_batch(number)
    index.finish_item(number, "a", "done")
    index.resume_batch(number)
    index.stop_batch(number)
    assert index.batch(number).state == "done"  # type: ignore[union-attr]


def test_items_that_ran_when_the_server_ended_wait_again(path: Path) -> None:
    with CaseIndex(path) as index:
        number = index.new_batch("liver", ["a", "b", "c"], "ann", {})
        index.finish_item(number, str(index.next_item(number)), "done")
        assert index.next_item(number) == "b"
    with CaseIndex(path) as index:
        assert index.next_item(number) == "c"
        assert index.recover() == 2
        assert index.recover() == 0
        assert [index.next_item(number) for _ in range(3)] == ["b", "c", None]


def test_what_is_no_batch_or_no_item_is_refused(index: CaseIndex) -> None:
    number = index.new_batch("liver", ["a"], "ann", {})
    with pytest.raises(StoreError, match=f"Batch {number} has no image b"):
        index.finish_item(number, "b", "done")
    with pytest.raises(StoreError, match=r"cannot end as 'running'. Expected: done, failed, skipped"):
        index.finish_item(number, "a", "running")  # type: ignore[arg-type]
    for change_it in (index.stop_batch, index.resume_batch):
        with pytest.raises(StoreError, match="There is no batch 99"):
            change_it(99)
    assert index.next_item(99) is None
    assert index.batch(number).counts == counts(waiting=1)  # type: ignore[union-attr]


# -- at the same time ---------------------------------------------------------------------------------------------


def run_in_processes(work: Any, *arguments: tuple[Any, ...]) -> list[Any]:
    """Run `work` once per tuple of arguments, each in a process of its own, all at once; return what they answer."""
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(len(arguments)), context.Queue()
    workers = [context.Process(target=answer, args=(work, one, start, answers)) for one in arguments]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    return found


def answer(work: Any, arguments: tuple[Any, ...], start: Any, answers: Any) -> None:
    start.wait()
    try:
        answers.put(work(*arguments))
    except Exception as error:
        answers.put(repr(error))


def lease_many(path: Path, client: str, calls: int) -> list[str | None]:
    with CaseIndex(path) as index, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: index.lease(images(400), client, 600, model="liver"), range(calls)))


def test_clients_of_two_processes_never_get_the_same_image(path: Path) -> None:
    ann, bob = run_in_processes(lease_many, (path, "ann", 200), (path, "bob", 200))
    assert sorted([*ann, *bob]) == images(400)
    with CaseIndex(path) as index:
        assert Counter(lease.client for lease in index.leases().values()) == {"ann": 200, "bob": 200}
        assert index.lease(images(400), "ann", 600, model="liver") is None


@pytest.mark.parametrize("moment", [0.0, 0.2])
def test_what_another_process_is_writing_counts_before_anything_is_decided(
    index: CaseIndex, path: Path, moment: float
) -> None:
    number = index.new_batch("liver", ["a", "b"], "ann", {})
    index.audit_is_due("liver", 5)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE audits SET calls = 4")
    other.execute("INSERT INTO leases VALUES ('a', 'bob', 'liver', 1e12)")
    other.execute("UPDATE batch_items SET state = 'running' WHERE image = 'a'")
    with ThreadPoolExecutor(3) as pool:
        due = pool.submit(index.audit_is_due, "liver", 5)
        leased = pool.submit(index.lease, ["a", "b"], "ann", 60, model="liver")
        item = pool.submit(index.next_item, number)
        time.sleep(moment)
        other.execute("COMMIT")
        assert (due.result(), leased.result(), item.result()) == (True, "b", "b")
    other.close()


def write_many(path: Path, client: str, calls: int) -> int:
    """Write and read all kinds of things, opening the file anew again and again."""
    for number in range(calls):
        with CaseIndex(path) as index, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: index.keep_score(f"{client}-{i}", "liver", "v1", measured()), range(10)))
            index.keep_choice(f"{client}-{number}", "liver", client, "random", False, "")
            index.note_interest("liver", client)
            index.scores("liver", "v1")
    return calls


def test_writers_of_several_processes_wait_for_each_other(path: Path) -> None:
    found = run_in_processes(write_many, *((path, client, 25) for client in ("ann", "bob", "eve")))
    assert found == [25, 25, 25]
    with CaseIndex(path) as index:
        assert len(index.scores("liver", "v1")) == 30
        assert Counter(row.client for row in index.choices("liver")) == {"ann": 25, "bob": 25, "eve": 25}


def test_threads_count_audits_exactly(index: CaseIndex) -> None:
    with ThreadPoolExecutor(16) as pool:
        due = list(pool.map(lambda _: index.audit_is_due("liver", 5), range(1000)))
    assert sum(due) == 200


def count_audits(path: Path, calls: int) -> int:
    with CaseIndex(path) as index, ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda _: index.audit_is_due("liver", 5), range(calls)))


def test_processes_count_audits_exactly(path: Path) -> None:
    assert sum(run_in_processes(count_audits, (path, 333), (path, 167))) == 100


def test_threads_share_the_items_of_a_batch(index: CaseIndex) -> None:
    number = index.new_batch("liver", images(200), "ann", {})

    def work(_: int) -> list[str]:
        taken = []
        while (image := index.next_item(number)) is not None:
            index.finish_item(number, image, "done")
            taken.append(image)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [image for images_of_one in pool.map(work, range(8)) for image in images_of_one]
    assert sorted(taken) == images(200)
    assert index.batch(number).state == "done"  # type: ignore[union-attr]


def test_threads_that_read_and_write_at_once_see_whole_scores(index: CaseIndex) -> None:
    def work(number: int) -> bool:
        index.keep_score(f"image-{number % 20}", "liver", "v1", measured(number / 100))
        return all(one.structures["liver"].soft_dice == 0.85 for one in index.scores("liver", "v1").values())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(100)))
    assert len(index.scores("liver", "v1")) == 20


# -- the public names ---------------------------------------------------------------------------------------------


def test_the_module_offers_what_it_returns() -> None:
    assert all(hasattr(module, name) for name in module.__all__)
