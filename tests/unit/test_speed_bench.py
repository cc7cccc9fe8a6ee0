"""The benchmark of speed: what its arms do, what it keeps, and the page it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import speed
import speed_arms
import speed_cases
import speed_report
from speed_cases import Case
from speed_phantoms import Geometry, write_logits

GEOMETRY = Geometry((9, 40, 44), (2.5, 0.977, 0.977), (3.0, 1.0, 1.0))
CASE = Case("export", "tiny", GEOMETRY, heads=3, curves=("slices", "classes"))
PAGE = f"# Title\n\nabove\n{speed_report.BEGIN}\nold\n{speed_report.END}\nbelow\n"


@pytest.fixture
def settings(tmp_path: Path) -> speed.Settings:
    return speed.Settings(
        repeats=2,
        threads=1,
        memory=2**34,
        quick=True,
        mirroring=False,
        cold=False,
        only="",
        profiles=(),
        real=None,
        out=tmp_path / "out",
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(PAGE, encoding="utf-8")
    return path


def measured(settings: speed.Settings, monkeypatch: pytest.MonkeyPatch, case: Case = CASE) -> dict[str, Any]:
    """Measure a case in this process, and return what is kept."""
    monkeypatch.setattr(speed_arms, "run", speed_arms.work)
    speed.Measurement(case.part, settings, "python bench/speed.py").measure(case)
    content: dict[str, Any] = json.loads((settings.out / f"{case.part}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("spacings", [speed_cases.IN_3D, speed_cases.BY_PLANE])
def test_both_arms_of_the_export_make_the_same_label(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch, spacings: Any, regions: bool
) -> None:
    case = Case("export", "tiny", Geometry((9, 40, 44), *spacings), heads=3, regions=regions)
    runs = measured(settings, monkeypatch, case)["runs"]
    assert [run["arm"] for run in runs] == ["nnunetv2", "mshub"] * 2, "in turn"
    assert all(run["wall_s"] > 0 and run["cpu_s"] > 0 and run["peak"] >= run["baseline"] > 0 for run in runs)
    assert [(run["differing"], run["voxels"]) for run in runs[1:]] == [(0, 9 * 40 * 44)] * 3
    assert runs[1]["foreground"] > 0.01
    assert not (settings.out / "scratch").exists()


def test_requests_can_be_measured_with_some_profiles_only(settings: speed.Settings) -> None:
    arms = speed.arms_of(
        Case("request", "tiny", GEOMETRY), "request", dataclasses.replace(settings, profiles=("balanced",))
    )
    assert {arm.get("profile") for arm in arms} == {None, "balanced"}


def test_both_arms_of_the_preprocessing_give_the_same_image(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = measured(settings, monkeypatch, Case("preprocessing", "tiny", GEOMETRY))["runs"]
    assert len(runs) == 4
    assert all(run["largest_difference"] < 1e-4 for run in runs[1:])


def test_the_page_gets_tables_and_plots_between_its_markers(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    measured(settings, monkeypatch)
    speed_report.write(settings.out, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\nabove\n{speed_report.BEGIN}\n### Export")
    assert text.endswith(f"{speed_report.END}\nbelow\n")
    assert "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| tiny"))
    assert "44 x 40 x 9 at 0.977 x 0.977 x 2.5 mm" in row
    assert row.endswith("| 0 |")
    assert (page.parent / "images" / "performance-growth.png").stat().st_size > 10_000


def test_one_case_is_measured_again_and_the_others_stay(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [
        {"case": name, "arm": speed.NNUNET, "beside": None, "repeat": 0, "failed": "before"}
        for name in ("tiny", "other")
    ]
    kept = {"command": "before", "cases": [{"name": "tiny"}, {"name": "other"}], "runs": results}
    settings.out.mkdir(parents=True)
    (settings.out / "export.json").write_text(json.dumps(kept), encoding="utf-8")
    found = measured(dataclasses.replace(settings, only="tiny", repeats=1), monkeypatch)
    assert [case["name"] for case in found["cases"]] == ["other", "tiny"]
    assert [(run["case"], run.get("failed")) for run in found["runs"]] == [
        ("other", "before"),
        ("tiny", None),
        ("tiny", None),
    ]
    assert found["command"] == "before"


def test_an_arm_that_needs_too_much_memory_is_not_run_and_the_table_says_so(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    large = Case("export", "large", Geometry((200, 512, 512), *speed_cases.IN_3D), 44, curves=("slices", "classes"))
    limited = speed.Settings(**{**vars(settings), "memory": 2**30})
    runs = measured(limited, monkeypatch, large)["runs"]
    assert [run["skipped"] for run in runs] == ["not run: needs about 23 GB", "not run: needs about 4 GB"]
    speed_report.write(settings.out, page)
    assert "not run: needs about 23 GB" in page.read_text(encoding="utf-8")


def test_an_arm_that_fails_is_told_and_the_others_go_on(
    settings: speed.Settings, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    def work(task: dict[str, Any]) -> dict[str, Any]:
        return {"failed": "ended by SIGKILL"} if task["arm"]["program"] == "nnunetv2" else speed_arms.work(task)

    monkeypatch.setattr(speed_arms, "run", work)
    speed.Measurement("export", settings, "x").measure(CASE)
    speed_report.write(settings.out, page)
    row = next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| tiny"))
    assert row.count("failed: ended by SIGKILL") == 3
    assert row.endswith("|  |"), "nothing to compare with"
    assert speed_report.failures(settings.out) == ["export | tiny | nnunetv2: failed: ended by SIGKILL"]


def test_a_task_that_raises_in_its_own_process_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_arms, "LIBRARIES", ())
    assert speed_arms.run({"part": "none"}) == {"failed": "KeyError"}


def test_whole_requests_have_a_row_per_arm_and_their_stages(settings: speed.Settings, page: Path) -> None:
    stages = {"preprocess": {"wall_s": 1.0, "peak": 10**9}, "network": {"wall_s": 3.0, "peak": None}}
    run = {"case": "organs", "wall_s": 4.0, "cpu_s": 8.0, "baseline": 10**9, "peak": 3 * 10**9, "stages": stages}
    theirs = {**run, "arm": "nnunetv2, warm", "beside": "nnunetv2, warm"}
    ours = {**run, "arm": "mshub, warm", "beside": "nnunetv2, warm", "wall_s": 2.0, "second": {"wall_s": 1.5}}
    case = Case("request", "organs", GEOMETRY).facts()
    content = {"part": "request", "command": "x", "date": "d", "machine": speed_report.machine(), "threads": 2}
    content |= {"repeats": 1, "cases": [case], "runs": [theirs, {**ours, "differing": 5, "voxels": 1000}]}
    settings.out.mkdir()
    (settings.out / "request.json").write_text(json.dumps(content), encoding="utf-8")
    speed_report.write(settings.out, page)
    text = page.read_text(encoding="utf-8")
    assert "| mshub, warm | 2.00 | **2.0x** | 8.00 | **1.0x** | 3,000 | 2,000 | 1.50 | 5 (0.50%) |" in text
    assert "| nnunetv2, warm | 1.00 s, 1,000 MB | 3.00 s |" in text
    assert (page.parent / "images" / "performance-stages.png").is_file()


def test_the_server_is_told_beside_what_its_answers_say(settings: speed.Settings, page: Path) -> None:
    posts = [{"wall_s": 1.1, "told_s": 1.0}, {"wall_s": 2.2, "told_s": 2.0}]
    content = {"part": "server", "command": "x", "date": "d", "machine": speed_report.machine(), "threads": 2}
    content |= {"repeats": 2, "cases": [CASE.facts()], "runs": [{"case": "tiny", "arm": "POST", "requests": posts}]}
    settings.out.mkdir()
    (settings.out / "server.json").write_text(json.dumps(content), encoding="utf-8")
    speed_report.write(settings.out, page)
    assert "| tiny | POST | 1.65 (1.10 to 2.20) | 1.50 (1.00 to 2.00) | +10.0 % |" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", speed_report.BEGIN, speed_report.END + speed_report.BEGIN, PAGE + PAGE])
def test_a_page_without_its_markers_once_each_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="speed:begin"):
        speed_report.replaced(text, "new")


def test_the_projects_page_has_its_markers() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    assert "new tables" in speed_report.replaced(page.read_text(encoding="utf-8"), "new tables")


def test_made_up_outputs_are_the_same_every_time_with_few_surfaces(tmp_path: Path) -> None:
    geometry = Geometry((40, 256, 256), (2.5, 2.0, 2.0), (3.0, 2.0, 2.0))
    borders = [write_logits(tmp_path / f"{name}.npy", geometry, 5, False) for name in "ab"]
    one, other = (np.load(tmp_path / f"{name}.npy") for name in "ab")
    np.testing.assert_array_equal(one, other)
    assert one.dtype == np.float16
    assert 0.005 < borders[0] < 0.05
    assert set(np.unique(one.argmax(0))) == {0, 1, 2, 3, 4}


def test_what_nnunet_needs_grows_with_classes_and_slices() -> None:
    def needs(slices: int, heads: int) -> float:
        return speed_cases.nnunet_export_bytes(
            Case("export", "", Geometry((slices, 512, 512), *speed_cases.IN_3D), heads)
        )

    assert needs(200, 44) == pytest.approx(24e9, rel=0.05)
    assert needs(400, 44) == pytest.approx(2 * needs(200, 44), rel=0.02)
    assert needs(200, 88) == pytest.approx(2 * needs(200, 44), rel=0.05)


def test_the_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    told = speed.command_of(["request", "--real", str(tmp_path / "ct.nii.gz"), "--repeats", "3"])
    assert told == "python bench/speed.py request --real ct.nii.gz --repeats 3"


def test_a_quick_run_leaves_the_projects_page_alone() -> None:
    arguments = speed.parsed(["--quick", "--server"])
    assert arguments.doc.parent == arguments.out != speed.parsed([]).out
    assert arguments.parts == [part for part in speed.PARTS if part != "gpu" or speed._has_gpu()]
    assert speed.parsed(["export"]).parts == ["export"]
