"""The report of a training round, read back as a browser would: words, numbers, pictures, privacy."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb
from PIL import Image

from mshub.errors import GeometryError
from mshub.gate import GatePolicy, judge
from mshub.geometry import Grid, Volume
from mshub.lineage import CANDIDATE
from mshub.report.canvas import AFTER, BEFORE, PANEL_PIXELS, REVIEWED
from mshub.report.contents import Overlay, RoundReport, worst_cases
from mshub.report.curves import BAD
from mshub.report.page import render_report, write_report
from mshub.scores import CaseScore

HOSTILE = "<script>alert('x')</script> & <b>\"liver\"</b>"
POLICY = GatePolicy().as_dict()


# -- rounds that were never run ---------------------------------------------------------------------------------------


def case(number: int, dice: Mapping[str, float], patient: str | None = None, missed: Sequence[str] = ()) -> CaseScore:
    return CaseScore(f"case_{number}", patient or f"patient-{number}", dict(dice), tuple(missed))


BEFORE_SCORES = [
    case(1, {"liver": 0.90, "spleen": 0.80}),
    case(2, {"liver": 0.80, "spleen": 0.70}),
    case(3, {"liver": 0.70}),
]
AFTER_SCORES = [
    case(1, {"liver": 0.92, "spleen": 0.70}),
    case(2, {"liver": 0.86, "spleen": 0.62}),
    case(3, {"liver": 0.74}),
]

#: What the gate says of these, with intervals made up.
COMPARED = {
    "baseline": "v2",
    "cases": 3,
    "patients": 3,
    "overall": {"mean": -0.0033, "low": -0.04, "high": 0.04},
    "structures": {
        "liver": {"mean": 0.04, "low": 0.02, "high": 0.06},
        "spleen": {"mean": -0.09, "low": -0.1, "high": -0.08},
    },
    "per_case": {"case_1": -0.04, "case_2": -0.01, "case_3": 0.04},
    "lost": {},
}


def verdict(outcome: str = "refused", reasons: Sequence[str] = ("it got worse",), *compared: Any) -> dict[str, Any]:
    return {"outcome": outcome, "reasons": list(reasons), "comparisons": list(compared), "policy": POLICY}


def a_report(**changes: Any) -> RoundReport:
    """Return a round in which v3 was trained from v2 and compared with it."""
    facts = {
        "model_id": "abdomen",
        "title": "Abdominal organs",
        "version": "v3",
        "parent": "v2",
        "original": "v1",
        "created": "2026-05-09T07:35:25+00:00",
        "verdict": verdict("refused", ["it got worse"], COMPARED),
        "scores": {"v2": BEFORE_SCORES, "v3": AFTER_SCORES},
        **changes,
    }
    return RoundReport(**facts)


def bare(**changes: Any) -> RoundReport:
    """Return a round of which only the verdict is known."""
    return a_report(**{"verdict": verdict("needs a person", ["there are no hold-out cases"]), "scores": {}, **changes})


def page(report: RoundReport) -> BeautifulSoup:
    return BeautifulSoup(render_report(report), "html.parser")


def words(node: Any) -> str:
    return re.sub(r"\s+", " ", node.get_text(" ", strip=True))


def rows(table: Any) -> dict[str, list[str]]:
    """Return the first cell of each body row -> the texts of the others."""
    found = [[words(cell) for cell in row.find_all(["th", "td"])] for row in table.tbody.find_all("tr")]
    assert len({cells[0] for cells in found}) == len(found)
    return {cells[0]: cells[1:] for cells in found}


def row_of(table: Any, name: str) -> Any:
    return next(row for row in table.tbody.find_all("tr") if words(row.th) == name)


def percent(node: Any, name: str) -> float:
    return float(node[name].removesuffix("%"))


# -- the decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "badge", "kind", "commands"),
    [
        ("promoted", "Promoted", "good", ["mshub rollback abdomen"]),
        ("refused", "Refused", "bad", ["mshub promote abdomen v3"]),
        ("needs a person", "Needs a person", "unsure", ["mshub promote abdomen v3"]),
    ],
)
def test_the_badge_says_the_outcome_and_what_to_type_next(
    outcome: str, badge: str, kind: str, commands: list[str]
) -> None:
    read = page(a_report(verdict=verdict(outcome, ["because"], COMPARED)))
    found = read.find(class_="badge")
    assert words(found) == badge
    assert kind in found["class"]
    assert [words(code) for code in read.find_all("code")] == commands
    assert words(read.title) == f"abdomen v3: {badge}"


def test_a_first_version_that_serves_cannot_be_rolled_back() -> None:
    read = page(bare(version="v1", parent=None, original=None, verdict=verdict("promoted", ["mean Dice 0.900"])))
    assert read.find("code") is None
    assert "v1 serves from now on" in words(read.find(class_="verdict"))


def test_where_nothing_was_published_no_command_is_offered() -> None:
    read = page(bare(version=None))
    assert read.find("code") is None
    assert "Nothing was published" in words(read.find(class_="verdict"))
    assert "candidate, not published" in words(read.header)


def test_reasons_become_sentences_and_their_commands_can_be_pasted() -> None:
    clauses = ["judged by 5 cases: serve it with `mshub promote ID VERSION`", "a lone ` stays"]
    read = page(a_report(verdict=verdict("needs a person", clauses, COMPARED)))
    first, second = read.find(class_="verdict").find_all("li")
    assert words(first).replace(" .", ".") == "Judged by 5 cases: serve it with mshub promote abdomen v3."
    assert words(first.code) == "mshub promote abdomen v3"
    assert words(second) == "A lone ` stays."


def test_very_long_reasons_are_told_in_full() -> None:
    reasons = [f"the mean Dice of {'very_long_name' * 40}{number} changes" for number in range(50)]
    read = page(a_report(verdict=verdict("refused", reasons, COMPARED)))
    assert [words(item).lower().rstrip(".") for item in read.find(class_="verdict").find_all("li")] == [
        reason.lower() for reason in reasons
    ]


def test_the_header_names_model_versions_and_time() -> None:
    facts = words(page(a_report()).header)
    for part in (
        "Abdominal organs",
        "abdomen",
        "candidate v3",
        "trained from v2",
        "original v1",
        "2026-05-09 07:35 UTC",
    ):
        assert part in facts


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_every_structure_has_its_dice_before_and_after_its_change_and_its_interval() -> None:
    table = page(a_report()).find("table", class_="structures")
    found = {name: cells[:5] for name, cells in rows(table).items()}
    assert found == {
        "All structures": ["3", "0.767", "0.763", "−0.003", "−0.040 to +0.040"],
        "spleen": ["2", "0.750", "0.660", "−0.090", "−0.100 to −0.080"],
        "liver": ["3", "0.800", "0.840", "+0.040", "+0.020 to +0.060"],
    }
    assert [words(cell) for cell in table.thead.find_all("th")][2:4] == ["v2", "v3"]


def test_what_lost_most_comes_first() -> None:
    read = page(a_report())
    assert list(rows(read.find("table", class_="structures"))) == ["All structures", "spleen", "liver"]
    assert list(rows(read.find("table", class_="cases"))) == ["case_1", "case_2", "case_3"]


def test_the_changes_are_those_of_the_gate_whose_verdict_is_shown() -> None:
    generator = np.random.default_rng(4)
    names = ["liver", "spleen", "pancreas"]
    before = [case(n, dict(zip(names, generator.uniform(0.6, 0.9, 3), strict=True))) for n in range(9)]
    after = [
        case(n, {name: value + generator.normal(0.01, 0.02) for name, value in s.dice.items()})
        for n, s in enumerate(before)
    ]
    judged = judge(after, {"v2": before}, GatePolicy()).as_dict()
    read = page(a_report(verdict=judged, scores={"v2": before, "v3": after}))
    for name, cells in rows(read.find("table", class_="structures")).items():
        was, now, change = (float(text.replace("−", "-")) for text in cells[1:4])
        assert now - was == pytest.approx(change, abs=0.0016), name
    overall = judged["comparisons"][0]["overall"]
    assert f"{overall['low']:+.3f}".replace("-", "−") in words(read.find(class_="tiles"))


def test_a_case_only_one_version_was_scored_on_does_not_enter_the_means() -> None:
    extra = case(9, {"liver": 0.0, "spleen": 0.0})
    table = page(a_report(scores={"v2": BEFORE_SCORES, "v3": [*AFTER_SCORES, extra]})).find(
        "table", class_="structures"
    )
    assert rows(table)["liver"][:3] == ["3", "0.800", "0.840"]


def test_an_interval_of_a_single_patient_is_not_shown() -> None:
    one = [CaseScore(score.case_id, "same", score.dice) for score in AFTER_SCORES]
    compared = {**COMPARED, "patients": 1}
    table = page(a_report(scores={"v2": one, "v3": one}, verdict=verdict("refused", ["x"], compared))).find(
        "table", class_="structures"
    )
    assert {cells[4] for cells in rows(table).values()} == {"–"}
    assert table.find(class_="interval") is None


def test_both_baselines_are_shown_and_named() -> None:
    read = page(a_report(verdict=verdict("refused", ["x"], COMPARED, {**COMPARED, "baseline": "v1"})))
    headings = [words(section.h2) for section in read.find_all("section", class_="comparison")]
    assert headings == ["v3 against v2, which it was trained from", "v3 against v1, the original version"]
    original = read.find_all("table", class_="structures")[1]
    assert rows(original)["liver"][1:3] == ["–", "0.840"], "scores of v1 are not at hand"


def test_lost_structures_are_listed() -> None:
    lost = {**COMPARED, "lost": {"case_2": ["spleen", "liver"]}}
    assert "case_2: spleen, liver" in words(page(a_report(verdict=verdict("refused", ["x"], lost))))
    assert "no longer found" not in words(page(a_report()))


def test_the_tiles_hold_what_a_reader_takes_away() -> None:
    report = a_report(
        held_out_cases=["case_1", "case_2"], training_cases=[{"case": "a"}] * 7, seconds={"training": 3725.0}
    )
    tiles = [words(tile) for tile in page(report).find_all(class_="tile")]
    assert tiles == [
        "Mean Dice 0.767 → 0.763 v2 → v3",
        "Mean change −0.003 −0.040 to +0.040 (95 %)",
        "Hold-out cases 2 never trained on",
        "Training cases 7",
        "Time 1 h 02 min",
    ]


def test_a_first_version_shows_its_dice_case_by_case() -> None:
    read = page(bare(version="v1", parent=None, original=None, scores={"v1": AFTER_SCORES}))
    assert {name: cells[:3] for name, cells in rows(read.find(id="levels").table).items()} == {
        "All structures": ["3", "0.763", "0.740"],
        "spleen": ["2", "0.660", "0.620"],
        "liver": ["3", "0.840", "0.740"],
    }
    assert len(row_of(read.find(id="levels").table, "liver").find_all("circle")) == 3
    assert not read.find_all("section", class_="comparison")


def test_an_unpublished_candidate_has_its_scores_under_a_name_of_their_own() -> None:
    read = page(a_report(version=None, scores={"v2": BEFORE_SCORES, CANDIDATE: AFTER_SCORES}))
    assert rows(read.find("table", class_="structures"))["liver"][:4] == ["3", "0.800", "0.840", "+0.040"]
    assert "candidate against v2" in words(read)


# -- drawn numbers ----------------------------------------------------------------------------------------------------


def test_dots_and_intervals_lie_on_one_axis_with_zero_and_the_limit() -> None:
    table = page(a_report()).find("table", class_="structures")
    liver, spleen = row_of(table, "liver").svg, row_of(table, "spleen").svg
    zero, limit = percent(liver.find(class_="zero"), "x1"), percent(liver.find(class_="limit"), "x1")
    per_dice = (zero - limit) / 0.03
    for drawing, change, low, high in ((liver, 0.04, 0.02, 0.06), (spleen, -0.09, -0.1, -0.08)):
        assert percent(drawing.circle, "cx") == pytest.approx(zero + per_dice * change, abs=0.05)
        interval = drawing.find(class_="interval")
        assert percent(interval, "x1") == pytest.approx(zero + per_dice * low, abs=0.05)
        assert percent(interval, "x2") == pytest.approx(zero + per_dice * high, abs=0.05)
    ticks = {words(text): percent(text, "x") for text in table.tfoot.find_all("text")}
    assert ticks["0"] == zero
    assert ticks["−0.05"] == pytest.approx(zero - 0.05 * per_dice, abs=0.05)


def test_all_structures_are_held_to_the_limit_of_their_lower_bound() -> None:
    table = page(a_report()).find("table", class_="structures")
    overall, liver = row_of(table, "All structures").svg, row_of(table, "liver").svg
    zero = percent(liver.find(class_="zero"), "x1")
    to_structure_limit = zero - percent(liver.find(class_="limit"), "x1")
    assert zero - percent(overall.find(class_="limit"), "x1") == pytest.approx(to_structure_limit / 3, abs=0.05)


def test_colours_tell_violations_from_gains_and_from_noise() -> None:
    table = page(a_report()).find("table", class_="structures")
    assert {name: row_of(table, name).svg["class"] for name in rows(table)} == {
        "All structures": ["bad"],  # its interval reaches below -0.01
        "spleen": ["bad"],
        "liver": ["good"],
    }
    noise = {**COMPARED, "structures": {"liver": {"mean": 0.01, "low": -0.01, "high": 0.03}}}
    table = page(a_report(verdict=verdict("promoted", ["x"], noise))).find("table", class_="structures")
    assert row_of(table, "liver").svg["class"] == ["plain"]


def test_the_bars_of_cases_start_at_zero() -> None:
    table = page(a_report()).find("table", class_="cases")
    loss, gain = row_of(table, "case_1").svg, row_of(table, "case_3").svg
    zero = percent(loss.find(class_="zero"), "x1")
    assert percent(loss.rect, "x") + percent(loss.rect, "width") == pytest.approx(zero, abs=0.02)
    assert percent(gain.rect, "x") == zero
    assert percent(gain.rect, "width") == pytest.approx(percent(loss.rect, "width"), abs=0.02)
    assert rows(table)["case_1"][:3] == ["0.850", "0.810", "−0.040"]


def test_43_structures_each_have_a_row_and_a_dot_inside_the_plot() -> None:
    names = [f"structure {number}" for number in range(43)]
    generator = np.random.default_rng(1)
    after = [case(n, dict(zip(names, generator.uniform(0, 1, 43), strict=True))) for n in range(5)]
    means = generator.normal(0, 0.1, 43)
    structures = {
        name: {"mean": float(mean), "low": float(mean) - 0.4, "high": float(mean) + 0.01}
        for name, mean in zip(names, means, strict=True)
    }
    compared = {**COMPARED, "structures": structures, "per_case": {score.case_id: 0.0 for score in after}}
    read = page(a_report(verdict=verdict("refused", ["x"], compared), scores={"v3": after}))
    table = read.find("table", class_="structures")
    listed = list(rows(table))[1:]
    assert listed == [names[index] for index in np.argsort(means)]
    places = [percent(row_of(table, name).circle, "cx") for name in listed]
    assert places == sorted(places)
    ends = [percent(line, end) for line in table.find_all(class_="interval") for end in ("x1", "x2")]
    assert all(0 < place < 100 for place in (*places, *ends))


# -- the curves -------------------------------------------------------------------------------------------------------

LINEAGE = [
    {"version": "v1", "parent": None, "created": "2026-01-01T00:00:00+00:00", "cases": 0, "held_out": 0,
     "outcome": None, "mean_dice": 0.70},
    {"version": "v2", "parent": "v1", "created": "2026-02-01T00:00:00+00:00", "cases": 8, "held_out": 3,
     "outcome": "promoted", "mean_dice": 0.80},
    {"version": "v3", "parent": "v2", "created": "2026-03-01T00:00:00+00:00", "cases": 12, "held_out": 4,
     "outcome": "refused", "mean_dice": 0.75},
]  # fmt: skip


def drawing(image: Any) -> str:
    """Return the SVG text of an image, after parsing it."""
    kind, _, content = image["src"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(content).decode()
    ElementTree.fromstring(text)
    return text


def test_the_learning_curve_draws_refused_versions_hollow() -> None:
    section = page(a_report(lineage=LINEAGE)).find(id="lineage")
    svg = drawing(section.img)
    hollow = re.findall(rf"fill: #ffffff; stroke: {BAD}", svg)
    filled = re.findall(r"fill: #1f5fa8; stroke: #1f5fa8", svg)
    assert (len(hollow), len(filled)) == (1, 2)
    assert rows(section.table) == {
        "v1": ["–", "2026-01-01 00:00 UTC", "0", "0", "0.700", "–"],
        "v2": ["v1", "2026-02-01 00:00 UTC", "8", "3", "0.800", "promoted"],
        "v3": ["v2", "2026-03-01 00:00 UTC", "12", "4", "0.750", "refused"],
    }
    assert [words(row.th) for row in section.find_all("tr", class_="this")] == ["v3"]


def test_a_version_without_a_mean_of_its_own_gets_that_of_this_round() -> None:
    lineage = [{**LINEAGE[0], "version": "v2", "mean_dice": None}, LINEAGE[2]]
    section = page(a_report(lineage=lineage)).find(id="lineage")
    assert rows(section.table)["v2"][4] == "0.767"
    assert section.img is not None


def test_one_measured_version_makes_no_curve() -> None:
    section = page(bare(lineage=[LINEAGE[0], {**LINEAGE[1], "mean_dice": float("nan")}])).find(id="lineage")
    assert section.img is None
    assert rows(section.table)["v2"][4] == "–"


def test_rounds_that_published_nothing_and_odd_names_can_be_drawn() -> None:
    odd = [{"version": None, "mean_dice": 0.7}, {"version": "$x_1", "parent": None, "mean_dice": 0.8}] * 20
    assert drawing(page(bare(lineage=[LINEAGE[0], *odd[:3]])).find(id="lineage").img)
    assert drawing(
        page(bare(lineage=[{**entry, "version": f"v{n}"} for n, entry in enumerate(odd)])).find(id="lineage").img
    )


def test_the_loss_is_a_curve_from_two_epochs_on() -> None:
    assert drawing(page(bare(losses=[0.5, 0.4, 0.35])).find(id="training").img)
    one = page(bare(losses=[0.4321])).find(id="training")
    assert one.img is None
    assert "Mean training loss after 1 epoch: 0.432." in words(one)
    assert "loss" not in words(page(bare()).find(id="training"))


def test_losses_that_are_no_numbers_are_left_out() -> None:
    assert drawing(page(bare(losses=[0.5, float("nan"), 0.4, float("inf")])).find(id="training").img)
    assert "after 2 epochs: –" in words(page(bare(losses=[float("nan")] * 2)).find(id="training"))


# -- tables of what went in -------------------------------------------------------------------------------------------


def test_recipe_policy_and_times_are_told_in_words() -> None:
    recipe = {"learning_rate": 0.001, "folds": ["0", "1"], "batch_size": None, "seed": 0, "nested": {"a_b": True}}
    section = page(bare(recipe=recipe, seconds={"training": 61.0, "scoring": 0.26})).find(id="training")
    facts: dict[str, list[str]] = {}
    for table in section.find_all("table"):
        facts |= rows(table)
    assert facts.items() >= {
        "learning rate": ["0.001"], "folds": ["0, 1"], "batch size": ["–"], "seed": ["0"], "nested": ["a b: yes"],
        "worst structure": ["−0.03"], "min cases": ["8"], "automatic": ["yes"],
        "training": ["1 min 01 s"], "scoring": ["0.3 s"],
    }.items()  # fmt: skip


def test_training_cases_show_what_was_reviewed_and_since_which_version() -> None:
    cases = [
        {"case": "ct_7", "structures": ["liver", "spleen"], "started_from": "v2",
         "submitted": "2026-05-01T10:00:00+00:00", "client": "3D Slicer"},
        {"case": "ct_8"},
    ]  # fmt: skip
    assert rows(page(bare(training_cases=cases)).find(id="training-cases").table) == {
        "ct_7": ["liver, spleen", "v2", "2026-05-01 10:00 UTC", "3D Slicer"],
        "ct_8": ["–", "–", "–", "–"],
    }


def test_held_out_cases_and_notes_are_listed() -> None:
    read = page(bare(held_out_cases=["ct_1", "ct_2"], notes=["Stopped early."]))
    assert "ct_1, ct_2" in words(read.find(id="hold-out-cases"))
    assert words(read.find(id="notes").li) == "Stopped early."


def test_what_is_not_there_is_left_out_and_not_empty() -> None:
    read = page(bare(verdict={"outcome": "needs a person", "reasons": [], "comparisons": []}))
    assert read.find_all("img") == []
    assert read.find_all("table") == []
    assert read.find_all("ul") == []
    for name in ("notes", "levels", "pictures", "lineage", "training", "training-cases", "hold-out-cases"):
        assert read.find(id=name) is None, name


def test_no_section_of_a_full_report_is_empty() -> None:
    read = page(full())
    for section in read.find_all("section"):
        assert section.find(["table", "img", "ul", "p"]) is not None
    for table in read.find_all("table"):
        assert table.tbody.find_all("tr")


def full() -> RoundReport:
    """Return a report with every section, and patients whose names must not be in it."""
    named = [[CaseScore(s.case_id, "Doe^Jane", s.dice) for s in scores] for scores in (BEFORE_SCORES, AFTER_SCORES)]
    return a_report(
        scores={"v2": named[0], "v3": named[1]},
        recipe={"epochs": 2},
        lineage=LINEAGE,
        training_cases=[{"case": "ct_7", "patient": "Doe^Jane", "label": "/data/Doe^Jane.nii.gz"}],
        held_out_cases=["case_1", "case_2", "case_3"],
        losses=[0.5, 0.4],
        overlays=[an_overlay()],
        seconds={"training": 10.0},
        notes=["A note."],
    )


# -- safe to open anywhere --------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs() -> None:
    text = render_report(full())
    read = BeautifulSoup(text, "html.parser")
    assert read.find_all(["script", "link", "iframe", "object", "embed", "a", "form"]) == []
    assert all(node["src"].startswith("data:image/") for node in read.find_all(src=True))
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    policy = read.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'")


def test_no_patient_is_named() -> None:
    text = re.sub(r'data:image/[^"]*', "", render_report(full()))  # base64 holds any three letters by chance
    assert "Doe" not in text
    assert "ct_7" in text


def test_names_with_html_in_them_are_text() -> None:
    scores = [CaseScore(HOSTILE, "p", {HOSTILE: 0.5}), CaseScore("other", "q", {HOSTILE: 0.6})]
    change = {"mean": 0.0, "low": -0.1, "high": 0.1}
    compared = {"baseline": HOSTILE, "cases": 2, "patients": 2, "overall": change, "structures": {HOSTILE: change},
                "per_case": {HOSTILE: 0.0, "other": 0.0}, "lost": {HOSTILE: [HOSTILE]}}  # fmt: skip
    read = page(
        a_report(
            model_id=HOSTILE,
            title=HOSTILE,
            version=HOSTILE,
            verdict={**verdict("refused", [HOSTILE, f"`{HOSTILE}`"], compared), "policy": {HOSTILE: HOSTILE}},
            scores={HOSTILE: scores},
            recipe={HOSTILE: HOSTILE},
            lineage=[dict.fromkeys(("version", "parent", "created", "outcome"), HOSTILE)],
            training_cases=[dict.fromkeys(("case", "started_from", "submitted", "client"), HOSTILE)],
            held_out_cases=[HOSTILE],
            overlays=[an_overlay(case_id=HOSTILE, names={HOSTILE: 1})],
            seconds={HOSTILE: 1.0},
            notes=[HOSTILE],
        )
    )
    assert read.find_all(["script", "b"]) == []
    assert words(read.h1) == HOSTILE
    assert HOSTILE in rows(read.find("table", class_="structures"))
    assert HOSTILE in {image["alt"].partition(", axial")[0] for image in read.find_all("img")}


def test_missing_numbers_are_dashes_and_never_words_of_python() -> None:
    none = {"mean": float("nan"), "low": None, "high": float("inf")}
    compared = {**COMPARED, "overall": none, "structures": {"liver": none}, "per_case": {"case_1": None}}
    read = page(
        a_report(
            verdict=verdict("refused", ["x"], compared),
            scores={},
            recipe={"learning_rate": float("nan"), "folds": None},
            lineage=[{"version": "v1"}, {"version": "v2", "mean_dice": float("nan"), "created": None}],
            training_cases=[{}],
            losses=[float("nan")],
            seconds={"training": float("nan")},
            overlays=[an_overlay(dice_after=float("nan"), dice_before=None)],
        )
    )
    told = [
        words(node)
        for node in read.find_all(["p", "td", "th", "dd", "figcaption"])
        if "note" not in node.get("class", [])
    ]
    for text in told[:-1]:  # the last one explains what Dice is
        assert not re.search(r"\b(nan|inf|none|null|undefined|true|false)\b", text, re.IGNORECASE), text


def test_the_template_is_part_of_the_package() -> None:
    assert files("mshub.report").joinpath("page.html.j2").is_file()


def test_reports_need_neither_pyplot_nor_torch() -> None:
    program = (
        "import sys; from mshub.report.contents import RoundReport; from mshub.report.page import render_report\n"
        "verdict = {'outcome': 'refused', 'reasons': ['x'], 'comparisons': [], 'policy': {}}\n"
        "render_report(RoundReport('m', 'M', 'v2', 'v1', 'v1', '', verdict, losses=[2.0, 1.0]))\n"
        "print([name for name in ('matplotlib.pyplot', 'torch', 'nnunetv2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_reports_can_be_drawn_by_several_threads_at_once() -> None:
    def pictures(_: int) -> list[str]:
        return [image["src"] for image in page(a_report(overlays=[an_overlay()])).find_all("img")]

    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(pictures, range(8)))
    assert all(sources == drawn[0] for sources in drawn)


# -- written whole ----------------------------------------------------------------------------------------------------


def test_the_file_is_utf8_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "rounds" / "1" / "report.html"
    write_report(path, a_report(title="Leber und Milz, größer"))
    assert "größer" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report(path, a_report(verdict={}))
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_report_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(path, a_report())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- which cases to look at -------------------------------------------------------------------------------------------


def test_the_worst_cases_are_those_that_lost_most() -> None:
    assert worst_cases(AFTER_SCORES, BEFORE_SCORES, count=2) == ["case_1", "case_2"]
    alone = [case(1, {"liver": 0.9}), case(2, {"liver": 0.5, "spleen": 0.9}), case(3, {"liver": 0.6})]
    assert worst_cases(alone, count=2) == ["case_3", "case_2"], "without another version, the lowest"


def test_a_case_without_a_score_before_comes_last() -> None:
    scores = [*AFTER_SCORES, case(9, {"liver": 0.0})]
    assert worst_cases(scores, BEFORE_SCORES, count=9) == ["case_1", "case_2", "case_3", "case_9"]


# -- slices -----------------------------------------------------------------------------------------------------------

SHAPE = (30, 40, 20)


def rotated(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


#: Names of the axes x, y and z point to -> directions; the last ones oblique and left-handed.
DIRECTIONS = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "LAS, left-handed": np.diag([-1.0, 1.0, 1.0]),
    "RAI": np.diag([1.0, 1.0, -1.0]),
    "PSR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
    "SLA": np.array([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]),
    "oblique": rotated(20),
    "oblique, left-handed": rotated(-25) @ np.diag([1.0, -1.0, 1.0]),
}


def a_grid(
    directions: np.ndarray | None = None, spacing: Sequence[float] = (2, 2, 2), shape: Sequence[int] = SHAPE
) -> Grid:
    """Return a grid whose centre is at 0, 0, 0 mm."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if directions is None else directions) * np.array(spacing, dtype=float)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid((shape[0], shape[1], shape[2]), affine)


def positions(grid: Grid) -> np.ndarray:
    """Return R, A and S in mm of every voxel, shape (3, x, y, z)."""
    index = np.indices(grid.shape_xyz).reshape(3, -1)
    return (grid.affine_ras[:3, :3] @ index + grid.affine_ras[:3, 3:]).reshape(3, *grid.shape_xyz)


def ball(grid: Grid, centre_mm: Sequence[float], radius_mm: float = 8.0) -> np.ndarray:
    distance = np.linalg.norm(positions(grid) - np.array(centre_mm, dtype=float).reshape(3, 1, 1, 1), axis=0)
    return (distance <= radius_mm).astype(np.uint8)


def an_overlay(grid: Grid | None = None, image: np.ndarray | None = None, **changes: Any) -> Overlay:
    """Return a case with one ball that the candidate finds a little shifted."""
    grid = grid or a_grid()
    facts = {
        "case_id": "case_1",
        "image": Volume(positions(grid)[0] if image is None else image, grid),
        "names": {"liver": 1},
        "reviewed": ball(grid, (0, 0, 0)),
        "before": ball(grid, (6, 0, 0)),
        "after": ball(grid, (0, 4, 0)),
        **changes,
    }
    return Overlay(**facts)


def pictures(overlay: Overlay) -> list[np.ndarray]:
    """Return the pictures of a case as arrays of rows, columns and colours, 0 to 1."""
    found = []
    for image in page(bare(overlays=[overlay])).find(id="pictures").find_all("img"):
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as opened:
            assert opened.format == "PNG"
            found.append(np.asarray(opened.convert("RGB"), dtype=float) / 255)
    return found


def brighter_half(picture: np.ndarray) -> tuple[str, str]:
    """Return where a picture is brighter: left or right, top or bottom."""
    grey = picture.mean(axis=2)
    height, width = grey.shape
    across = grey[:, : width // 2].mean() - grey[:, -(width // 2) :].mean()
    along = grey[: height // 2].mean() - grey[-(height // 2) :].mean()
    return ("left" if across > 0 else "right", "top" if along > 0 else "bottom")


def has_colour(picture: np.ndarray, colour: str) -> bool:
    return bool((np.abs(picture - np.array(to_rgb(colour))).max(axis=2) < 0.1).sum() > 20)


def test_a_case_is_shown_whole_and_with_both_predictions() -> None:
    overlay = an_overlay(dice_before=0.71, dice_after=0.64)
    read = page(bare(overlays=[overlay])).find(id="pictures")
    assert [words(caption) for caption in read.find_all("figcaption")] == [
        "Whole slice",
        "Before: mean Dice 0.710",
        "After: mean Dice 0.640",
    ]
    whole, before, after = pictures(overlay)
    assert not any(has_colour(whole, colour) for colour in (REVIEWED, BEFORE, AFTER))
    assert has_colour(before, REVIEWED)
    assert has_colour(before, BEFORE)
    assert not has_colour(before, AFTER)
    assert has_colour(after, AFTER)
    assert not has_colour(after, BEFORE)
    for picture in (whole, before, after):
        assert max(picture.shape) == PANEL_PIXELS
        assert min(picture.shape[:2]) > 60


def test_a_first_version_is_shown_alone() -> None:
    read = page(bare(overlays=[an_overlay(before=None)])).find(id="pictures")
    assert [words(caption) for caption in read.find_all("figcaption")] == ["Whole slice", "Candidate"]
    assert "before" not in words(read)


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_the_patients_left_is_on_the_right_of_an_axial_picture(directions: np.ndarray) -> None:
    grid = a_grid(directions, shape=(40, 40, 40))
    marker = ball(grid, (-22, 22, 6))  # left, anterior
    overlay = an_overlay(grid, marker.astype(float), reviewed=marker, before=None, after=0 * marker, window=(0, 1))
    whole = page(bare(overlays=[overlay])).find(id="pictures").img
    assert re.fullmatch(r"case_1, axial slice, S .* mm, from R to L and from A down to P", whole["alt"])
    assert brighter_half(pictures(overlay)[0]) == ("right", "top")


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize(
    ("thick", "plane", "sides", "marker", "where"),
    [
        (0, "sagittal", "from A to P and from S down to I", (0, 20, 20), ("left", "top")),
        (1, "coronal", "from R to L and from S down to I", (-20, 0, -20), ("right", "bottom")),
        (2, "axial", "from R to L and from A down to P", (20, -20, 0), ("left", "bottom")),
    ],
)
def test_thick_slices_are_shown_as_they_were_acquired(
    directions: np.ndarray, thick: int, plane: str, sides: str, marker: Sequence[float], where: tuple[str, str]
) -> None:
    along = int(np.abs(directions[thick]).argmax())  # the voxel axis nearest to R, A or S
    spacing, shape = [2.0] * 3, [40] * 3
    spacing[along], shape[along] = 8.0, 10
    grid = a_grid(directions, spacing, shape)
    found = ball(grid, marker)
    overlay = an_overlay(grid, found.astype(float), reviewed=found, before=None, after=0 * found, window=(0, 1))
    alt = page(bare(overlays=[overlay])).find(id="pictures").img["alt"]
    assert f"{plane} slice" in alt
    assert alt.endswith(sides)
    assert brighter_half(pictures(overlay)[0]) == where


def test_proportions_are_those_of_the_patient() -> None:
    grid = a_grid(spacing=(0.5, 1.5, 1.0), shape=(80, 40, 30))
    whole = pictures(an_overlay(grid))[0]
    assert whole.shape[1] / whole.shape[0] == pytest.approx((80 * 0.5) / (40 * 1.5), abs=0.005)


def test_a_round_thing_is_round_in_every_picture() -> None:
    grid = a_grid(spacing=(0.5, 1.5, 1.0), shape=(120, 40, 30))
    disc = ball(grid, (0, 0, 0), radius_mm=12)
    overlay = an_overlay(grid, disc.astype(float), reviewed=disc, before=None, after=disc, window=(0, 1))
    for picture in pictures(overlay):
        inner = picture[40:-40, 40:-40]  # without letters
        rows_, columns = np.nonzero(inner.max(axis=2) > 0.5)
        assert np.ptp(columns) / np.ptp(rows_) == pytest.approx(1, abs=0.15)


def test_small_structures_are_shown_larger_and_framed() -> None:
    grid = a_grid(shape=(80, 80, 20))
    small = ball(grid, (40, 40, 0), radius_mm=4)
    overlay = an_overlay(grid, small.astype(float), reviewed=small, before=None, after=small, window=(0, 1))
    whole, detail = ((picture.min(axis=2) > 0.9)[40:-40, 40:-40].sum() for picture in pictures(overlay))
    assert detail > 4 * whole


def test_the_slice_with_most_disagreement_is_shown_at_its_place_in_the_patient() -> None:
    grid = a_grid(DIRECTIONS["LPS"])
    reviewed = ball(grid, (0, 0, -9)) | ball(grid, (0, 0, 9))
    after = reviewed.copy()
    after[..., 14] = 0  # of 20 slices 2 mm apart, centred: S +9 mm
    overlay = an_overlay(grid, reviewed=reviewed, after=after)
    assert "axial slice, S 9.0 mm. Differing most: liver." in words(page(bare(overlays=[overlay])).find(id="pictures"))


def test_perfect_agreement_shows_the_slice_with_most_of_the_structures() -> None:
    grid = a_grid()
    label = ball(grid, (0, 0, -9), radius_mm=10)
    text = words(page(bare(overlays=[an_overlay(grid, reviewed=label, after=label)])).find(id="pictures"))
    assert "S −9.0 mm." in text
    assert "Differing" not in text


def test_structures_nobody_reviewed_are_neither_drawn_nor_counted() -> None:
    grid = a_grid()
    label = ball(grid, (0, 0, 9), radius_mm=10)
    other = 7 * ball(grid, (0, 0, -9), radius_mm=12) * (label == 0)
    overlay = an_overlay(grid, np.zeros(SHAPE), reviewed=label, before=None, after=np.maximum(label, other))
    assert "S 9.0 mm" in words(page(bare(overlays=[overlay])).find(id="pictures"))
    only = an_overlay(grid, np.zeros(SHAPE), reviewed=0 * label, before=None, after=other)
    assert not has_colour(pictures(only)[1], AFTER)


def test_the_structures_have_contrast_whatever_air_and_bone_do() -> None:
    grid = a_grid()
    generator = np.random.default_rng(0)
    image = np.full(SHAPE, -1000.0)
    image[:, :10] = 3000.0
    organ, lesion = ball(grid, (0, 0, 0), radius_mm=16), ball(grid, (0, 0, 0), radius_mm=8)
    image[organ > 0] = 60.0 + generator.normal(0, 5, int(organ.sum()))
    image[lesion > 0] += 60.0
    whole = pictures(an_overlay(grid, image, reviewed=organ, after=organ, before=None))[0].mean(axis=2)
    middle, ring = whole[300:360, 230:260], whole[420:440, 230:260]
    assert abs(middle.mean() - ring.mean()) > 0.02


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_images_of_one_value_and_empty_labels_can_be_drawn(dtype: type) -> None:
    grid = a_grid()
    empty = np.zeros(SHAPE, np.uint8)
    drawn = pictures(an_overlay(grid, np.full(SHAPE, 7, dtype), reviewed=empty, before=empty, after=empty))
    assert len(drawn) == 3


def test_43_structures_can_be_drawn_on_one_slice() -> None:
    grid = a_grid()
    labels = (np.indices(SHAPE)[0] * 3 + np.indices(SHAPE)[1] // 4) % 44
    names = {f"structure {value}": value for value in range(1, 44)}
    overlay = an_overlay(grid, names=names, reviewed=labels, after=np.roll(labels, 1, axis=0), before=labels)
    assert has_colour(pictures(overlay)[2], AFTER)


def test_label_maps_of_another_shape_are_refused() -> None:
    with pytest.raises(GeometryError, match="transposed"):
        an_overlay(after=np.zeros(SHAPE[::-1], np.uint8))
