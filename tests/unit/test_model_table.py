"""The README's model table is generated from the cards."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mshub.catalogue import Catalogue, Link, ModelCard, Weights

SCRIPT = Path(__file__).parents[2] / "bench" / "model_table.py"
README = Path(__file__).parents[2] / "README.md"

_spec = importlib.util.spec_from_file_location("model_table", SCRIPT)
model_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(model_table)


def a_card(**changes):
    facts = {
        "id": "spleen-ct",
        "title": "Spleen",
        "site": "abdomen",
        "modality": "CT",
        "target": "spleen",
        "status": "released",
        "generation": 2,
        "weights": Weights(kind="gdrive-folder", id="abc"),
    }
    return ModelCard(**(facts | changes))


def cells_of(card):
    row = model_table.render_table([card]).splitlines()[2]
    return [cell.strip() for cell in row.strip("|").split(" | ")]


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- models:begin -->\nold\n<!-- models:end -->\n\nThe end.\n", encoding="utf-8")
    return path


def test_the_table_has_a_heading_a_rule_and_one_row_per_card():
    lines = model_table.render_table([a_card(), a_card(id="liver-ct")]).splitlines()
    assert lines[0] == "| Model | Modality | Target | Training scans | DSC | Weights | Notes |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| `spleen-ct`", "| `liver-ct`"]


def test_every_row_has_as_many_cells_as_the_heading():
    lines = model_table.render_table(Catalogue.load()).splitlines()
    assert {line.count(" | ") for line in lines} == {6}


def test_figures_are_shown_with_two_decimals_and_scans_as_published():
    card = a_card(dsc=0.7, dsc_source="current catalogue", training_scans=">6800")
    assert cells_of(card)[3:5] == [">6800", "0.70"]


def test_unknown_figures_are_a_dash_and_not_zero():
    assert cells_of(a_card())[3:5] == ["–", "–"]


def test_a_dsc_of_zero_is_a_figure():
    assert cells_of(a_card(dsc=0, dsc_source="current catalogue"))[4] == "0.00"


def test_drive_folders_link_to_their_page():
    assert cells_of(a_card())[5] == "[Google Drive](https://drive.google.com/drive/folders/abc), nnU-Net v2"


def test_drive_files_link_to_their_page_and_generation_one_is_named():
    card = a_card(weights=Weights(kind="gdrive-file", id="abc"), generation=1)
    assert cells_of(card)[5] == "[Google Drive](https://drive.google.com/file/d/abc/view), nnU-Net v1"


def test_weights_elsewhere_are_a_download():
    card = a_card(weights=Weights(kind="https", url="https://example.org/a.zip"))
    assert cells_of(card)[5] == "[download](https://example.org/a.zip), nnU-Net v2"


def test_announced_models_say_so_and_link_nowhere():
    assert cells_of(a_card(status="announced", weights=None))[5] == "announced"


def test_notes_and_links_share_a_cell():
    card = a_card(notes=("first", "second"), links=(Link(title="Paper", url="https://example.org"),))
    assert cells_of(card)[6] == "first; second; [Paper](https://example.org)"


def test_pipes_and_line_breaks_cannot_break_the_table():
    row = model_table.render_table([a_card(target="a|b\nc")]).splitlines()[2]
    assert r"| a\|b c |" in row


def test_replacing_keeps_everything_outside_the_markers():
    text = f"above\n{model_table.BEGIN}\nold\n{model_table.END}\nbelow\n"
    assert model_table.replace_table(text, "new\n") == f"above\n{model_table.BEGIN}\nnew\n{model_table.END}\nbelow\n"


def test_replacing_twice_changes_nothing_more():
    text = f"{model_table.BEGIN}{model_table.END}"
    once = model_table.replace_table(text, "new\n")
    assert model_table.replace_table(once, "new\n") == once


@pytest.mark.parametrize(
    "text",
    [
        "",
        model_table.BEGIN,
        model_table.END,
        model_table.END + model_table.BEGIN,
        (model_table.BEGIN + model_table.END) * 2,
    ],
)
def test_missing_repeated_or_swapped_markers_are_refused(text):
    with pytest.raises(ValueError, match="models:begin"):
        model_table.replace_table(text, "new\n")


def test_check_complains_about_a_stale_table_and_changes_nothing(readme, capsys):
    before = readme.read_text(encoding="utf-8")
    assert model_table.main(["--check", "--readme", str(readme)]) == 1
    assert "make table" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == before


def test_writing_makes_the_check_pass(readme):
    assert model_table.main(["--readme", str(readme)]) == 0
    assert model_table.main(["--check", "--readme", str(readme)]) == 0
    assert "`liver-lesion-ct`" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_a_readme_without_markers_is_reported(tmp_path, capsys, options):
    path = tmp_path / "README.md"
    path.write_text("nothing here\n", encoding="utf-8")
    assert model_table.main([*options, "--readme", str(path)]) == 1
    assert "models:begin" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "nothing here\n"


def test_the_script_exits_with_what_main_returns(readme):
    done = subprocess.run([sys.executable, SCRIPT, "--check", "--readme", readme], capture_output=True, text=True)
    assert done.returncode == 1
    assert "make table" in done.stderr


def test_the_repositorys_readme_shows_what_the_cards_say():
    text = README.read_text(encoding="utf-8")
    if model_table.BEGIN not in text:
        pytest.skip("README.md has no model table markers yet")
    assert text == model_table.replace_table(text, model_table.render_table(Catalogue.load())), "run: make table"
