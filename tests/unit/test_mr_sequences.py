"""What series of hospitals are taken for, in the words and the timing their scanners write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from mshub.mr_sequences import Sequence, description_of, matches, sequence_of, wanted_sequence

CE = "T1w contrast-enhanced"

# description -> what it is, on words alone
DESCRIBED = {
    # T1, before contrast or unsaid
    "T1": "T1w",
    "AX T1": "T1w",
    "Ax T1 FLAIR": "T1w",
    "SAG T1 FLAIR": "T1w",
    "T1W_SE": "T1w",
    "T1WI": "T1w",
    "AxT1": "T1w",
    "T1-weighted": "T1w",
    "t1_se_tra": "T1w",
    "t1_mprage_sag_p2_iso": "T1w",
    "MPRAGE": "T1w",
    "3D MP-RAGE": "T1w",
    "mp2rage_UNI_Images": "T1w",
    "Ax 3D FSPGR": "T1w",
    "SAG BRAVO": "T1w",
    "sT1W_3D_TFE": "T1w",
    "t1_vibe_dixon_tra_W": "T1w",
    "T1 FFE": "T1w",
    "t1_fl2d_tra": "T1w",
    "T1 pre contrast": "T1w",
    "T1 without contrast": "T1w",
    "AX T1 W/O": "T1w",
    "AX T1 WO CONTRAST": "T1w",
    "T1 non-contrast": "T1w",
    "T1 SE PRE GD": "T1w",
    "T1_pre": "T1w",
    "T1 C-": "T1w",
    "t1_tse_tra nativ": "T1w",
    "T1 ohne KM": "T1w",
    "T1 vor KM": "T1w",
    "T1 zonder contrast": "T1w",
    "T1 sans gado": "T1w",
    "T1 senza mdc": "T1w",
    "T1 平扫": "T1w",
    "t1n": "T1w",
    "post-op T1": "T1w",
    "POSTOP T1 AX": "T1w",
    "T1 post RT": "T1w",
    "T1 post fossa": "T1w",
    "Series 2 T1": "T1w",
    # T1, after contrast
    "T1post": CE,
    "T1 POST": CE,
    "t1_mprage_post": CE,
    "t1_mprage_tra_p2_iso_KM": CE,
    "T1 mit KM": CE,
    "T1 nach KM": CE,
    "T1+C": CE,
    "T1 + C": CE,
    "AX T1 C+": CE,
    "AX T1 +GD": CE,
    "T1-Gd": CE,
    "T1Gd": CE,
    "T1c": CE,
    "T1ce": CE,
    "t1wce": CE,
    "T1W CE": CE,
    "CET1": CE,
    "T1_GAD": CE,
    "3D T1 GADO": CE,
    "AX SPGR 3D POST GAD": CE,
    "Ax T1 with contrast": CE,
    "AX T1 W/ CONTRAST": CE,
    "AX T1 POST W/O FS": CE,
    "T1 post-contrast post-op": CE,
    "post-op T1 post": CE,
    "T1 met contrast": CE,
    "T1 na contrast": CE,
    "T1 injecté": CE,
    "T1 con mdc": CE,
    "T1增强": CE,
    "T1 portal venous phase": CE,
    "LAVA arterial phase": CE,
    "T1 MPR post": CE,
    "SAG T1 FLAIR POST": CE,
    "T1w_post_reg_to_T2": CE,
    # T2 and friends
    "T2": "T2w",
    "AX T2 FSE": "T2w",
    "t2_tse_tra_448": "T2w",
    "T2W_TSE": "T2w",
    "T2WI": "T2w",
    "t2_space_sag_iso": "T2w",
    "HASTE cor": "T2w",
    "AX T2 POST": "T2w",
    "T2 BLADE fs": "T2w",
    "SAG T2 C7-T1": "T2w",
    "T2 TSE T1-T12": "T2w",
    "SAG T2 FRFSE L1-T12": "T2w",
    "T2 FLAIR": "FLAIR",
    "AX T2 FLAIR FS": "FLAIR",
    "FLAIR": "FLAIR",
    "FLAIR_reg": "FLAIR",
    "FLAIR reg to T1": "FLAIR",
    "FLAIR2T1": "FLAIR",
    "3DFLAIR": "FLAIR",
    "t2_tirm_tra_dark-fluid": "FLAIR",
    "t2_spc_da-fl_sag_p2_iso": "FLAIR",
    "T2 压水": "FLAIR",
    "t2f": "FLAIR",
    "Sag CUBE FLAIR post": "FLAIR",
    "STIR COR": "STIR",
    "t2_stir_sag": "STIR",
    "PD FS": "PD",
    "Proton density": "PD",
    "PDW_TSE": "PD",
    "T2* GRE": "T2*",
    "AX T2 GRE": "T2*",
    "T2 star": "T2*",
    "t2_fl2d_tra_hemo": "T2*",
    "T2W_FFE": "T2*",
    "SWI_Images": "SWI",
    "AX SWAN": "SWI",
    # diffusion
    "DWI": "DWI",
    "AX DWI B1000": "DWI",
    "ep2d_diff_b0_b1000_TRACEW": "DWI",
    "DTI 32 dir": "DWI",
    "isoDWI": "DWI",
    "sDW_SSh SENSE": "DWI",
    "HBV": "DWI",
    "弥散": "DWI",
    "ADC": "ADC",
    "Diffusion ADC": "ADC",
    "ep2d_diff_3scan_trace_p2_ADC": "ADC",
    "dADC map": "ADC",
    "Average DC": "ADC",
    "Apparent Diffusion Coefficient (mm2/s)": "ADC",
    # what is no input of a model
    "3-plane localizer": "localizer",
    "3 PL LOC": "localizer",
    "3-pl T2* FGRE": "localizer",
    "AAHead_Scout": "localizer",
    "Survey": "localizer",
    "ASSET calibration": "localizer",
    "定位": "localizer",
    "T1 post SUB": "derived",
    "SUBTRACTION T1": "derived",
    "MIP T1 post": "derived",
    "SWI mIP": "derived",
    "T1 map": "derived",
    "eADC": "derived",
    "ep2d_diff_FA": "derived",
    "rCBV": "derived",
    "ep2d_perf": "perfusion",
    "DSC perfusion": "perfusion",
    "3D pCASL": "perfusion",
    "TOF MRA": "angiography",
    "3D phase contrast": "angiography",
    "MRCP": "other",
    "SAG FIESTA": "other",
    "BOLD resting state": "other",
    "t1_vibe_dixon_tra_F": "other",
    # words that say nothing
    "AX": "unknown",
    "Brain": "unknown",
    "Unspecified 3": "unknown",
    "PD+T2": "unknown",
    "T1/T2 ratio": "unknown",
    "t2_tirm_cor": "unknown",
}


def series(**attributes: Any) -> Dataset:
    dataset = Dataset()
    dataset.Modality = "MR"
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


@pytest.mark.parametrize(("description", "expected"), DESCRIBED.items(), ids=DESCRIBED)
def test_a_description_is_taken_for(description: str, expected: str) -> None:
    found = sequence_of(series(SeriesDescription=description, SpecificCharacterSet="ISO_IR 192"))
    assert found.name == expected, found.why


def spin(te: float, tr: float, **more: Any) -> dict[str, Any]:
    return {"ScanningSequence": "SE", "EchoTime": te, "RepetitionTime": tr, **more}


def gradient(te: float, tr: float, **more: Any) -> dict[str, Any]:
    return {"ScanningSequence": "GR", "SequenceVariant": ["SK", "SP"], "EchoTime": te, "RepetitionTime": tr, **more}


# attributes -> what it is and a part of the evidence; no telling description
TIMED = [
    (spin(10, 550), "T1w", "TE 10, TR 550 ms"),
    (spin(10, 550, ContrastBolusAgent="Gadovist"), CE, "ContrastBolusAgent is 'Gadovist'"),
    (spin(10, 550, ContrastBolusAgent="NONE"), "T1w", "TE 10"),
    (spin(100, 4500), "T2w", "TE 100, TR 4500 ms"),
    (spin(400, 3200, MRAcquisitionType="3D"), "T2w", "TE 400"),
    (spin(15, 3000), "PD", "TE 15"),
    (spin(55, 3000), "unknown", "no known sequence"),
    (spin(120, 9000, ScanningSequence=["SE", "IR"], InversionTime=2500), "FLAIR", "TI 2500 ms"),
    (spin(30, 4000, ScanningSequence=["SE", "IR"], InversionTime=160), "STIR", "TI 160"),
    (spin(9, 2000, ScanningSequence=["SE", "IR"], InversionTime=860), "T1w", "TI 860"),
    (spin(60, 5000, ScanningSequence=["SE", "IR"]), "unknown", "no known sequence"),
    (gradient(2.5, 2000, SequenceVariant=["SK", "SP", "MP"], InversionTime=900), "T1w", "TI 900"),
    (gradient(3.1, 8.2), "T1w", "TE 3.1"),
    (gradient(25, 700), "T2*", "TE 25"),
    (gradient(1.8, 4, SequenceVariant="SS"), "other", "TE 1.8"),
    (gradient(4.5, 22, AngioFlag="Y"), "angiography", "AngioFlag is Y"),
    ({"ScanningSequence": "EP", "EchoTime": 30, "RepetitionTime": 2000}, "unknown", "no known sequence"),
    ({"ScanningSequence": "EP", "EchoTime": 80, "RepetitionTime": 6000, "DiffusionBValue": 800}, "DWI", "is 800"),
    ({"SequenceName": "*ep_b1000t", "EchoTime": 80, "RepetitionTime": 6000}, "DWI", "*ep_b1000t"),
    ({}, "unknown", "neither its description nor its echo"),
]


@pytest.mark.parametrize(("attributes", "expected", "evidence"), TIMED)
def test_timing_is_taken_for(attributes: dict[str, Any], expected: str, evidence: str) -> None:
    found = sequence_of(series(SeriesDescription="Series 7", **attributes))
    assert found.name == expected
    assert evidence in found.why


class TestEvidence:
    def test_words_go_before_timing(self) -> None:
        assert sequence_of(series(SeriesDescription="T2", **spin(10, 500))).kind == "T2w"

    def test_t2_whose_inversion_nulls_fluid_is_flair(self) -> None:
        found = sequence_of(series(SeriesDescription="AX T2 TIR", ScanningSequence=["SE", "IR"], InversionTime=2400))
        assert found.kind == "unknown"  # TIR says that something is nulled, and without an echo time nothing more
        found = sequence_of(series(SeriesDescription="AX T2", ScanningSequence=["SE", "IR"], InversionTime=2400))
        assert (found.kind, "2400 ms nulls fluid" in found.why) == ("FLAIR", True)

    @pytest.mark.parametrize(("inversion", "kind"), [(2500, "FLAIR"), (170, "STIR")])
    def test_tirm_is_what_its_inversion_nulls(self, inversion: float, kind: str) -> None:
        timing = spin(80, 8000, ScanningSequence=["SE", "IR"], InversionTime=inversion)
        assert sequence_of(series(SeriesDescription="t2_tirm_tra", **timing)).kind == kind

    def test_dual_echoes_are_told_apart_by_their_echo_time(self) -> None:
        kinds = [sequence_of(series(SeriesDescription="PD+T2_tse", **spin(te, 3500))).kind for te in (14, 96)]
        assert kinds == ["PD", "T2w"]

    def test_a_protocol_names_the_series_except_on_ge_scanners(self) -> None:
        assert sequence_of(series(SeriesDescription="", ProtocolName="t1_mprage_post")).name == CE
        ge = series(Manufacturer="GE MEDICAL SYSTEMS", ProtocolName="Brain - RCBV", **spin(10, 650))
        assert sequence_of(ge).kind == "T1w"

    def test_a_description_before_contrast_goes_before_the_agent(self) -> None:
        found = sequence_of(series(SeriesDescription="AX T1 PRE", ContrastBolusAgent="Dotarem"))
        assert (found.name, found.contrast) == ("T1w", False)
        assert "SeriesDescription 'AX T1 PRE' says before contrast" in found.why

    def test_a_description_with_and_without_leaves_it_to_the_agent(self) -> None:
        for spelling in ("with and without contrast", "W WO", "w/wo contrast", "W & W/O CONTRAST"):
            assert sequence_of(series(SeriesDescription=f"T1 {spelling}")).contrast is None, spelling
            with_agent = series(SeriesDescription=f"T1 {spelling}", ContrastBolusAgent="Gd")
            assert sequence_of(with_agent).contrast is True, spelling

    @pytest.mark.parametrize(
        ("image_type", "kind"),
        [
            (["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], "ADC"),
            (["ORIGINAL", "PRIMARY", "LOCALIZER"], "localizer"),
            (["DERIVED", "SECONDARY", "SUBTRACTION"], "derived"),
            (["DERIVED", "PRIMARY", "PROJECTION IMAGE"], "derived"),
            (["DERIVED", "SECONDARY", "MIP"], "derived"),
            (["ORIGINAL", "PRIMARY", "P", "ND"], "other"),
            (["ORIGINAL", "PRIMARY", "M", "ND"], "T1w"),
        ],
    )
    def test_an_image_type_goes_before_words(self, image_type: list[str], kind: str) -> None:
        assert sequence_of(series(SeriesDescription="T1 post", ImageType=image_type)).kind == kind

    @pytest.mark.parametrize("description", ["T1 post MPR", "T1 reformat sag", "FLAIR_reg"])
    def test_reformats_are_no_originals(self, description: str) -> None:
        assert not sequence_of(series(SeriesDescription=description)).original

    def test_what_the_scanner_derived_is_no_original(self) -> None:
        assert not sequence_of(series(SeriesDescription="T1", ImageType=["DERIVED", "SECONDARY"])).original
        assert sequence_of(series(SeriesDescription="T1", ImageType=["ORIGINAL", "PRIMARY"])).original

    def test_another_modality_is_named(self) -> None:
        found = sequence_of(series(Modality="CT", SeriesDescription="T1 to T12"))
        assert (found.name, found.why) == ("CT", "Modality is CT")

    def test_damaged_and_empty_values_count_for_nothing(self) -> None:
        dataset = series(SeriesDescription=None, EchoTime="", InversionTime=None)
        dataset[0x00180080] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(0x00180080), "DS", 4, b"abc ", 0, False, True
        )
        assert sequence_of(dataset).kind == "unknown"

    def test_attributes_of_dicom_json_are_read(self) -> None:
        answer = {
            "00080060": {"vr": "CS", "Value": ["MR"]},
            "0008103E": {"vr": "LO", "Value": ["AX T1 +C"]},
            "00180081": {"vr": "DS", "Value": [9.5]},
        }
        assert sequence_of(Dataset.from_json(answer)).name == CE

    def test_an_empty_dataset_is_unknown(self) -> None:
        assert sequence_of(Dataset()).kind == "unknown"


T1W, ENHANCED = Sequence("T1w"), Sequence("T1w", contrast=True)


class TestMatches:
    @pytest.mark.parametrize("wanted", ["T1", "T1w", "t1n", "T1W", "T1-weighted", "MPRAGE", "T1 pre"])
    def test_t1_means_before_contrast(self, wanted: str) -> None:
        assert matches(wanted, T1W)
        assert matches(wanted, Sequence("T1w", contrast=False))
        assert not matches(wanted, ENHANCED)

    @pytest.mark.parametrize(
        "wanted", ["T1c", "t1c", "T1ce", "T1w contrast-enhanced", "t1gd", "T1-Gd", "T1+C", "T1wCE", "T1post"]
    )
    def test_enhanced_t1_must_be_enhanced(self, wanted: str) -> None:
        assert matches(wanted, ENHANCED)
        assert not matches(wanted, T1W)

    @pytest.mark.parametrize(
        ("wanted", "kind"),
        [
            *(
                ("T2", "T2w"),
                ("t2w", "T2w"),
                ("T2W", "T2w"),
                ("FLAIR", "FLAIR"),
                ("t2f", "FLAIR"),
                ("T2-FLAIR", "FLAIR"),
            ),
            *(("ADC", "ADC"), ("DWI", "DWI"), ("HBV", "DWI"), ("PD", "PD"), ("SWI", "SWI"), ("T2*", "T2*")),
        ],
    )
    def test_other_kinds_match_themselves_alone(self, wanted: str, kind: str) -> None:
        kinds = ["T1w", "T2w", "FLAIR", "PD", "STIR", "T2*", "SWI", "DWI", "ADC", "perfusion", "derived", "unknown"]
        assert [other for other in kinds if matches(wanted, Sequence(other))] == [kind]

    def test_flair_after_contrast_is_flair_and_not_the_other_way_round(self) -> None:
        assert matches("FLAIR", Sequence("FLAIR", contrast=True))
        assert not matches("FLAIR post contrast", Sequence("FLAIR"))

    @pytest.mark.parametrize("wanted", ["MRI", "CT", "0000", "zscore", "noNorm", "", "channel 1", "localizer"])
    def test_names_that_are_no_sequence_match_nothing(self, wanted: str) -> None:
        assert wanted_sequence(wanted) is None
        assert not matches(wanted, T1W)
        assert not matches(wanted, Sequence("unknown"))


def test_a_series_is_called_by_its_description_its_protocol_or_its_number() -> None:
    assert description_of(series(SeriesDescription=" T1 ", ProtocolName="head")) == "T1"
    assert description_of(series(SeriesDescription="", ProtocolName="head")) == "head"
    assert description_of(series(SeriesNumber=7)) == "series 7"
    assert description_of(Dataset()) == ""


REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom_mr"


@pytest.mark.parametrize("blanked", [(), ("SeriesDescription",), ("SeriesDescription", "ProtocolName")])
@pytest.mark.parametrize(("folder", "expected"), [("T1post", CE), ("FLAIR", "FLAIR")])
def test_real_series_are_known_by_their_words_and_by_their_timing(
    folder: str, expected: str, blanked: tuple[str, ...]
) -> None:
    if not REAL.is_dir():
        pytest.skip("the real series are not here (shared test data, not part of the repository)")
    dataset = pydicom.dcmread(next((REAL / folder).iterdir()), stop_before_pixels=True)
    for keyword in blanked:
        delattr(dataset, keyword)
    if folder == "T1post" or len(blanked) != 1:
        assert sequence_of(dataset).name == expected
    else:  # the software that registered it copied the examination's name into its protocol
        assert sequence_of(dataset).name == "derived"
