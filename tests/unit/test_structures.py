"""The table of structures: codes that exist, colours that differ, names that are found however they are spelled."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydicom.sr._concepts_dict import concepts

from mshub.catalogue import Catalogue
from mshub.structures import (
    ABNORMAL,
    ANATOMY,
    LEFT,
    PRIVATE_SCHEME,
    RIGHT,
    SNOMED,
    SPATIAL,
    TISSUE,
    Code,
    StructureOverride,
    structure,
    structures,
    tomllib,
)

STARTER = Path(__file__).resolve().parents[2] / "sample-data" / "starter-model" / "dataset.json"
TABLE = tomllib.loads((files("mshub") / "structures.toml").read_text(encoding="utf-8"))["structure"]
MEANINGS: dict[str, set[str]] = {}  # SNOMED code -> what DICOM calls it, from pydicom's copy of PS3.16
for entries in concepts["SCT"].values():
    for value, (meaning, _) in entries.items():
        MEANINGS.setdefault(value, set()).add(meaning.split(" (")[0].casefold())

SEGRAP = """
Brain BrainStem Chiasm TemporalLobe_L TemporalLobe_R Hippocampus_L Hippocampus_R Eye_L Eye_R Lens_L Lens_R OpticNerve_L
OpticNerve_R MiddleEar_L MiddleEar_R IAC_L IAC_R TympanicCavity_L TympanicCavity_R VestibulSemi_L VestibulSemi_R
Cochlea_L Cochlea_R ETbone_L ETbone_R Pituitary OralCavity Mandible_L Mandible_R Submandibular_L Submandibular_R
Parotid_L Parotid_R Mastoid_L Mastoid_R TMjoint_L TMjoint_R SpinalCord Esophagus Larynx Larynx_Glottic
Larynx_Supraglot PharynxConst Thyroid Trachea GTVp GTVnd
"""
TOTAL = """
spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left
lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right esophagus
trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate heart aorta superior_vena_cava
inferior_vena_cava portal_vein_and_splenic_vein humerus_left scapula_right clavicula_left femur_right spinal_cord brain
skull sternum sacrum kidney_cyst_left
"""


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry["names"][0])
def test_every_code_is_one_of_dicoms_and_means_what_dicom_says(entry):
    for key in ("type", "modifier", "region"):
        if key in entry:
            value, meaning = entry[key]
            known = MEANINGS[value] | {"clinical target volume", "planning target volume"}
            assert meaning.casefold() in known


@pytest.mark.parametrize("code", [ANATOMY, ABNORMAL, SPATIAL, TISSUE, LEFT, RIGHT], ids=lambda code: code.meaning)
def test_every_category_and_side_is_one_of_dicoms(code):
    assert code.scheme == SNOMED
    assert code.meaning.casefold() in MEANINGS[code.value]


def test_no_two_structures_of_the_table_have_one_colour():
    names = [entry["names"][0] for entry in TABLE]
    sides = [f"{side} {entry['names'][0]}" for entry in TABLE if entry.get("paired") for side in ("left", "right")]
    unpaired = [name for name, entry in zip(names, TABLE, strict=True) if not entry.get("paired")]
    assert len({structure(name).colour for name in unpaired + sides}) == len(unpaired + sides)


def test_no_spelling_belongs_to_two_structures():
    spelled = [structure(name).colour for entry in TABLE for name in entry["names"]]
    assert spelled == [tuple(entry["colour"]) for entry in TABLE for _ in entry["names"]]


@pytest.mark.parametrize("name", ["kidney_right", "Kidney_R", "KidneyR", "right kidney", "RIGHT-KIDNEY", "kidney rt"])
def test_a_side_is_found_however_it_is_written(name):
    found = structure(name)
    assert (found.name, found.category, found.modifier) == (name, ANATOMY, RIGHT)
    assert found.type == Code("64033007", SNOMED, "Kidney")
    assert found.colour == structure("kidney_right").colour != structure("kidney_left").colour


@pytest.mark.parametrize(
    ("name", "value", "modifier"),
    [
        ("liver", "10200004", None),
        ("  LIVER ", "10200004", None),
        ("hippocampus_anterior", "5366008", "Anterior"),
        ("Hippocampus posterior", "5366008", "Posterior"),
        ("OpticNerve_L", "18234004", "Left"),
        ("lung_middle_lobe_right", "72481006", None),
        ("oesophagus", "32849002", None),
        ("CTV_R", "228792002", "Right"),
        ("GTVp", "86049000", None),
        ("GTVn", "14799000", None),
    ],
)
def test_names_of_models_have_the_codes_of_their_structures(name, value, modifier):
    found = structure(name)
    assert found.type.value == value
    assert (found.modifier and found.modifier.meaning) == modifier


def test_a_lesion_says_which_organ_it_is_in():
    found = structure("liver_lesion")
    assert (found.category, found.type.meaning, found.region) == (ABNORMAL, "Lesion", structure("liver").type)


@pytest.mark.parametrize("text", [SEGRAP, TOTAL], ids=["head and neck", "whole body"])
def test_the_structures_of_public_data_sets_are_in_the_table_with_distinct_colours(text):
    names = text.split()
    found = structures(names)
    assert [name for name in names if found[name].category == TISSUE] == []
    assert len({item.colour for item in found.values()}) == len(names)


def test_every_structure_of_a_card_and_of_the_starter_is_coded():
    cards = {name for card in Catalogue.load() for name in (card.labels or (card.plan.labels if card.plan else ()))}
    starter = set(json.loads(STARTER.read_text())["labels"]) - {"background"}
    assert starter <= cards
    assert [name for name in cards if structure(name).type.scheme != SNOMED] == []


class TestANameNobodyKnows:
    def test_has_a_code_and_a_colour_that_never_change(self):
        found = structure("Left Wumpus")
        assert (found.category, found.modifier, found.region) == (TISSUE, None, None)
        assert found.type == Code("LEFTWUMPU-a50896", PRIVATE_SCHEME, "Left Wumpus")
        assert found.colour == structure(" left  wumpus ").colour
        assert found.type.value == structure(" left  wumpus ").type.value

    def test_of_a_tumour_is_abnormal(self):
        assert structure("wumpus tumour").category == ABNORMAL
        assert structure("wumpus tumour").is_tumour

    @pytest.mark.parametrize("name", ["x" * 200, "肝臓", "a\\b", "_", "µ 12/3"])
    def test_has_a_code_that_dicom_can_hold(self, name):
        code = structure(name).type
        assert 0 < len(code.value) <= 16
        assert code.value.isascii()
        assert 0 < len(code.meaning) <= 64
        assert "\\" not in code.meaning

    def test_is_told_apart_from_others_that_begin_alike(self):
        assert structure("lymph node level 1").type.value != structure("lymph node level 2").type.value


class TestColoursOfOneModel:
    def test_are_distinct_where_two_names_are_one_structure(self):
        found = structures(["tumor", "Tumour", "cancer", "liver"])
        assert found["tumor"].colour == structure("tumor").colour
        assert len({item.colour for item in found.values()}) == 4

    def test_do_not_depend_on_which_names_come_first_unless_they_clash(self):
        there, back = structures(["liver", "spleen", "wumpus"]), structures(["wumpus", "spleen", "liver"])
        assert there == back


class TestWhatACardSays:
    def test_goes_before_the_table(self):
        codes = {"category": list(ABNORMAL), "type": ["7", "99LAB", "Our thing"]}
        said = StructureOverride.model_validate({**codes, "colour": [1, 2, 3]})
        found = structure("liver", {"Liver": said})
        assert found.type == Code("7", "99LAB", "Our thing")
        assert found.category == ABNORMAL
        assert found.colour == (1, 2, 3)

    def test_leaves_the_rest_as_it_was(self):
        found = structure("kidney_left", {"kidney_left": StructureOverride(colour=(9, 9, 9))})
        assert (found.type, found.modifier) == (structure("kidney_left").type, LEFT)

    def test_keeps_its_colour_and_others_make_way(self):
        liver = structure("liver").colour
        found = structures(["liver", "spleen"], {"spleen": StructureOverride(colour=liver)})
        assert found["spleen"].colour == liver
        assert found["liver"].colour != liver

    @pytest.mark.parametrize(
        "content",
        [
            {"colour": [0, 0, 256]},
            {"colour": [0, 0]},
            {"type": ["10200004", "SCT"]},
            {"type": ["x" * 17, "99LAB", "too long"]},
            {"type": ["1", "99LAB", "x" * 65]},
            {"type": ["1\\2", "99LAB", "two values"]},
            {"color": [1, 2, 3]},
        ],
    )
    def test_is_refused_where_dicom_cannot_hold_it(self, content):
        with pytest.raises(ValidationError):
            StructureOverride.model_validate(content)
