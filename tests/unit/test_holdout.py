"""The hold-out: decided once per patient, for good, and the same whoever asks."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mshub import holdout as holdout_module
from mshub.cases import ReviewedCase
from mshub.errors import ConfigError, StoreError
from mshub.holdout import SALT, HoldOut, patient_key, patient_number

LATE = {"early_fraction": 0.0}


def case(patient: str, number: int = 0, audit: bool = True) -> ReviewedCase:
    """Return a case of a patient; its files do not exist, as nothing here looks at them."""
    name = f"{patient}-{number}{'' if audit else '-chosen'}"
    return ReviewedCase(name, (Path(f"{name}.nii.gz"),), Path("label.nii.gz"), {"liver": 1}, ("liver",), patient, audit)


def cases(patients: Iterable[str]) -> list[ReviewedCase]:
    """Return one case of each patient."""
    return [case(patient) for patient in patients]


def ids(some: Sequence[ReviewedCase]) -> list[str]:
    return [one.case_id for one in some]


def owners(some: Sequence[ReviewedCase]) -> set[str]:
    return {one.patient for one in some}


def patients_between(low: float, high: float) -> Iterator[str]:
    """Yield patients whose number lies in [low, high)."""
    return (name for name in (f"patient {i}" for i in count()) if low <= patient_number(name) < high)


def first(low: float, high: float, number: int) -> list[str]:
    return [name for name, _ in zip(patients_between(low, high), range(number), strict=False)]


LOW, MIDDLE, HIGH = first(0.0, 0.2, 30), first(0.2, 1 / 3, 30), first(1 / 3, 1.0, 30)
"""Patients who are held out, who are held out only as long as there are few, and who train."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hold-out" / "patients.json"


# -- a patient's number -------------------------------------------------------------------------------------------


def test_a_number_is_the_salted_hash_of_the_name_and_never_changes() -> None:
    digest = hashlib.sha256("mshub hold-out 1\nZoë".encode()).hexdigest()
    assert patient_key("Zoë") == digest
    assert patient_number("Zoë") == pytest.approx(int(digest, 16) / 2**256)
    assert SALT == "mshub hold-out 1\n"
    assert patient_number("1.2.840.1") == pytest.approx(0.09293372198965844, abs=1e-15)


def test_a_name_of_broken_characters_has_a_number_too() -> None:
    assert 0 <= patient_number("M\udcfcller") < 1


def test_numbers_are_spread_evenly() -> None:
    numbers = [patient_number(f"patient {i}") for i in range(5000)]
    assert 0 <= min(numbers) < 0.002
    assert 0.998 < max(numbers) < 1
    for tenth in range(10):
        assert 420 < sum(tenth / 10 <= number < (tenth + 1) / 10 for number in numbers) < 580


# -- deciding -----------------------------------------------------------------------------------------------------


def test_low_numbers_judge_and_high_numbers_train(path: Path) -> None:
    training, held_out = HoldOut(path).split(cases([LOW[0], HIGH[0], LOW[1], HIGH[1]]))
    assert (owners(training), owners(held_out)) == ({HIGH[0], HIGH[1]}, {LOW[0], LOW[1]})


def test_every_case_of_a_patient_is_on_the_same_side_and_the_order_is_kept(path: Path) -> None:
    given = [case(patient, number) for number in (3, 1, 2) for patient in (HIGH[0], LOW[0], HIGH[1], LOW[1])]
    training, held_out = HoldOut(path).split(given)
    assert training == [one for one in given if one.patient in HIGH]
    assert held_out == [one for one in given if one.patient in LOW]


def test_about_a_fifth_of_many_patients_is_held_out_and_nobody_is_on_both_sides(path: Path) -> None:
    given = cases(f"someone {i}" for i in range(2000))
    training, held_out = HoldOut(path).split(given)
    assert 350 <= len(held_out) <= 450
    assert len(training) + len(held_out) == 2000
    assert not owners(training) & owners(held_out)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_fraction_can_be_chosen(path: Path, fraction: float) -> None:
    _, held_out = HoldOut(path, fraction, **LATE).split(cases(f"someone {i}" for i in range(2000)))
    assert len(held_out) / 2000 == pytest.approx(fraction, abs=0.035)


def test_a_fraction_of_nothing_holds_nobody_out(path: Path) -> None:
    training, held_out = HoldOut(path, 0.0, 0.0).split(cases(LOW + HIGH))
    assert (len(training), held_out) == (60, [])


def test_more_patients_are_held_out_until_there_are_enough(path: Path) -> None:
    hold_out = HoldOut(path, enough=8)
    _, held_out = hold_out.split(cases([HIGH[0], *LOW[:3], *MIDDLE[:10]]))
    assert owners(held_out) == {*LOW[:3], *MIDDLE[:5]}
    _, held_out = hold_out.split(cases([HIGH[0], *MIDDLE, *LOW[:6]]))
    assert owners(held_out) == {*LOW[:6], *MIDDLE[:5]}


def test_the_early_fraction_does_not_lower_the_fraction(path: Path) -> None:
    _, held_out = HoldOut(path, fraction=0.2, early_fraction=0.0).split(cases([HIGH[0], *LOW, *MIDDLE]))
    assert owners(held_out) == set(LOW)


def test_with_none_enough_there_is_no_early_phase(path: Path) -> None:
    _, held_out = HoldOut(path, enough=0).split(cases([HIGH[0], *MIDDLE, LOW[0]]))
    assert owners(held_out) == {LOW[0]}


def test_somebody_has_to_train(path: Path) -> None:
    training, held_out = HoldOut(path).split(cases(LOW[:4]))
    last = max(LOW[:4], key=patient_number)
    assert owners(training) == {last}
    assert owners(held_out) == set(LOW[:4]) - {last}


def test_a_single_patient_trains_and_stays_so(path: Path) -> None:
    hold_out = HoldOut(path)
    assert ids(hold_out.split([case(LOW[0])])[0]) == [f"{LOW[0]}-0"]
    training, held_out = hold_out.split(cases([LOW[0], LOW[1]]))
    assert (owners(training), owners(held_out)) == ({LOW[0]}, {LOW[1]})


def test_only_a_new_patient_can_be_made_to_train(path: Path) -> None:
    hold_out = HoldOut(path)
    hold_out.split(cases([LOW[0], HIGH[0]]))
    assert hold_out.split(cases([LOW[0]])) == ([], cases([LOW[0]]))  # the one who trained is gone
    training, held_out = hold_out.split(cases([LOW[0], LOW[1]]))
    assert (owners(training), owners(held_out)) == ({LOW[1]}, {LOW[0]})


def test_no_cases_decide_nothing(path: Path) -> None:
    assert HoldOut(path).split([]) == ([], [])
    assert HoldOut(path).patients() == {}
    assert not path.exists()


# -- for good -----------------------------------------------------------------------------------------------------


def test_a_decision_survives_other_fractions_and_other_orders(path: Path) -> None:
    given = cases(f"someone {i}" for i in range(200))
    training, held_out = HoldOut(path).split(given)
    for other in (HoldOut(path, 0.0, 0.0), HoldOut(path, 0.9, 0.9, enough=500), HoldOut(path)):
        assert other.split(given) == (training, held_out)
        assert other.split(given[::-1]) == (training[::-1], held_out[::-1])
    assert HoldOut(path, 0.0, 0.0).split(held_out) == ([], held_out)


def test_the_hold_out_grows_over_rounds_and_never_changes_sides(path: Path) -> None:
    seen: dict[str, str] = {}
    for round_number in range(1, 21):
        fraction = 0.05 * (round_number % 5)
        given = cases(f"someone {i}" for i in range(round_number * 7))
        training, held_out = HoldOut(path, fraction).split(given if round_number % 2 else given[::-1])
        sides = {**dict.fromkeys(owners(training), "training"), **dict.fromkeys(owners(held_out), "hold-out")}
        assert len(sides) == round_number * 7
        assert {patient: sides[patient] for patient in seen} == seen
        seen = sides
    assert 8 <= sum(side == "hold-out" for side in seen.values()) < 70


def test_the_ledger_says_who_is_where_without_a_name(path: Path) -> None:
    hold_out = HoldOut(path)
    hold_out.split([*cases(["Miller^Ann", LOW[0], HIGH[0]])])
    sides = hold_out.patients()
    assert len(sides) == 3
    assert (sides[patient_key(LOW[0])], sides[patient_key(HIGH[0])]) == ("hold-out", "training")
    text = path.read_text()
    assert json.loads(text) == {"format": 1, "patients": sides}
    assert "Miller" not in text
    assert "patient " not in text


def test_nothing_is_written_when_nothing_is_new(path: Path) -> None:
    hold_out = HoldOut(path)
    hold_out.split(cases(LOW + HIGH))
    before = path.stat()
    hold_out.split(cases(LOW))
    hold_out.mark_training([HIGH[3]])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_only_the_ledger_and_its_lock_are_left_in_the_folder(path: Path) -> None:
    HoldOut(path).split(cases(LOW + HIGH))
    assert sorted(file.name for file in path.parent.iterdir()) == [".patients.json.lock", "patients.json"]


# -- cases chosen by active learning ------------------------------------------------------------------------------


def test_a_patient_with_a_case_that_was_not_picked_at_random_trains(path: Path) -> None:
    given = [case(LOW[0], 1), case(LOW[0], 2, audit=False), case(LOW[1]), case(HIGH[0])]
    training, held_out = HoldOut(path).split(given)
    assert ids(training) == [f"{LOW[0]}-1", f"{LOW[0]}-2-chosen", f"{HIGH[0]}-0"]
    assert owners(held_out) == {LOW[1]}


def test_a_chosen_case_of_a_held_out_patient_neither_trains_nor_judges(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hold_out = HoldOut(path)
    hold_out.split(cases([LOW[0], HIGH[0]]))
    with caplog.at_level(logging.INFO, "mshub.holdout"):
        training, held_out = hold_out.split([case(LOW[0]), case(LOW[0], 1, audit=False), case(HIGH[0], 1, audit=False)])
    assert (ids(training), ids(held_out)) == ([f"{HIGH[0]}-1-chosen"], [f"{LOW[0]}-0"])
    assert f"{LOW[0]}-1-chosen" in caplog.text
    assert "left out" in caplog.text
    assert hold_out.patients()[patient_key(LOW[0])] == "hold-out"


def test_a_patient_who_trains_because_of_a_chosen_case_does_so_for_good(path: Path) -> None:
    hold_out = HoldOut(path)
    hold_out.split([case(LOW[0], audit=False)])
    training, held_out = hold_out.split([case(LOW[0], 1), case(HIGH[0])])
    assert (len(training), held_out) == (2, [])


def test_chosen_cases_alone_hold_nobody_out(path: Path) -> None:
    given = [case(f"someone {i}", audit=False) for i in range(100)]
    assert HoldOut(path).split(given) == (given, [])


def test_a_chosen_patient_is_enough_to_train_so_that_others_may_judge(path: Path) -> None:
    training, held_out = HoldOut(path).split([case(LOW[0], audit=False), case(LOW[1]), case(LOW[2])])
    assert (owners(training), owners(held_out)) == ({LOW[0]}, {LOW[1], LOW[2]})


# -- patients who trained elsewhere -------------------------------------------------------------------------------


def test_patients_who_trained_elsewhere_never_judge(path: Path) -> None:
    hold_out = HoldOut(path)
    hold_out.mark_training([*LOW[:5], *LOW[:2]])
    assert hold_out.patients() == {patient_key(patient): "training" for patient in LOW[:5]}
    training, held_out = hold_out.split(cases(LOW[:8]))
    assert (owners(training), owners(held_out)) == (set(LOW[:5]), set(LOW[5:8]))


def test_marking_does_not_move_who_is_held_out_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hold_out = HoldOut(path)
    hold_out.split(cases([LOW[0], LOW[1], HIGH[0]]))
    with caplog.at_level(logging.WARNING, "mshub.holdout"):
        hold_out.mark_training(patient for patient in [LOW[0], LOW[1], HIGH[0], LOW[2]])
    assert "2 patients" in caplog.text
    sides = hold_out.patients()
    assert [sides[patient_key(patient)] for patient in LOW[:3]] == ["hold-out", "hold-out", "training"]


def test_marking_nobody_makes_no_ledger(path: Path) -> None:
    HoldOut(path).mark_training([])
    assert not path.exists()


# -- damage -------------------------------------------------------------------------------------------------------

KEY = patient_key("someone")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 2, "patients": {}}',
        b'{"format": 1, "patients": []}',
        b'{"format": 1, "patients": {"someone": "training"}}',
        json.dumps({"format": 1, "patients": {KEY: "test"}}).encode(),
        json.dumps({"format": 1, "patients": {KEY: None}}).encode(),
        json.dumps({"format": 1, "patients": {KEY: ["training"]}}).encode(),
        json.dumps({"format": 1, "patients": {KEY: "training"}}).encode()[:-9],
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_ledger_is_never_decided_again(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for use in (
        lambda: HoldOut(path).split(cases(LOW)),
        lambda: HoldOut(path).mark_training(LOW),
        lambda: HoldOut(path).patients(),
    ):
        with pytest.raises(StoreError, match=r"patients\.json is damaged.*restore it from a backup"):
            use()
    assert path.read_bytes() == content


def test_a_ledger_that_is_a_folder_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="is damaged"):
        HoldOut(path).split(cases(LOW))


def test_a_crash_while_writing_keeps_the_old_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_out = HoldOut(path)
    hold_out.split(cases([LOW[0], HIGH[0]]))
    before = path.read_bytes()

    def crash(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(StoreError, match=r"cannot be written \(no space left"):
            hold_out.split(cases([LOW[0], LOW[1]]))
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == [".patients.json.lock", "patients.json"]
    hold_out.split(cases([LOW[0], LOW[1], HIGH[1]]))
    assert len(hold_out.patients()) == 4


def test_a_place_that_cannot_be_written_becomes_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot be written"):
        HoldOut(tmp_path / "file" / "patients.json").split(cases(LOW))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": -0.1}, "fraction is -0.1"),
        ({"fraction": 1.0}, "fraction is 1.0; expected a number from 0 to below 1"),
        ({"fraction": float("nan")}, "fraction is nan"),
        ({"early_fraction": 20}, "early_fraction is 20"),
        ({"enough": -1}, "enough is -1"),
    ],
)
def test_values_that_cannot_be_are_refused(path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HoldOut(path, **values)


# -- at the same time ---------------------------------------------------------------------------------------------


def split_from_another_process(path: Path, patients: list[str], answers: Any, start: Any) -> None:
    start.wait()
    training, held_out = HoldOut(path).split(cases(patients))
    answers.put((sorted(owners(training)), sorted(owners(held_out))))


def test_processes_that_decide_at_once_agree(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    orders = [LOW + MIDDLE + HIGH, (LOW + MIDDLE + HIGH)[::-1]]  # apart, they would hold out others of MIDDLE
    workers = [
        context.Process(target=split_from_another_process, args=(path, order, answers, start)) for order in orders
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert found[0] == found[1]
    assert len(HoldOut(path).patients()) == 90


def test_threads_that_decide_at_once_lose_nobody(path: Path) -> None:
    groups = [[f"group {group} someone {i}" for i in range(20)] for group in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda group: HoldOut(path).split(cases(group)), groups))
    sides = HoldOut(path).patients()
    assert len(sides) == 160
    for training, held_out in answers:
        assert {sides[patient_key(patient)] for patient in owners(training)} == {"training"}
        assert {sides[patient_key(patient)] for patient in owners(held_out)} <= {"hold-out"}


def test_a_lock_that_is_not_released_becomes_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HoldOut(path).split(cases(HIGH))
    monkeypatch.setattr(holdout_module, "LOCK_TIMEOUT_S", 0.05)
    with (
        FileLock(path.parent / ".patients.json.lock"),
        pytest.raises(StoreError, match="Another process has been deciding"),
    ):
        HoldOut(path).split(cases(HIGH))
    assert len(HoldOut(path).patients()) == 30  # reading needs no lock


def test_who_would_judge_is_known_before_and_decides_nothing(path: Path) -> None:
    everybody = [f"someone {number}" for number in range(60)]
    judges = HoldOut(path).judging(everybody)
    assert 10 < len(judges) < 35
    assert not path.exists()
    _, held_out = HoldOut(path, enough=10**6).split(cases(everybody))
    assert owners(held_out) == judges


def test_who_was_decided_stays_on_that_side_whatever_the_number(path: Path) -> None:
    judge = next(iter(HoldOut(path).judging(f"someone {number}" for number in range(60))))
    HoldOut(path).mark_training([judge])
    assert HoldOut(path).judging([judge]) == set()


def test_fewer_would_judge_once_there_are_enough(path: Path) -> None:
    everybody = [f"someone {number}" for number in range(200)]
    early = HoldOut(path).judging(everybody)
    HoldOut(path).split(cases(f"another {number}" for number in range(60)))
    assert HoldOut(path).judging(everybody) < early
