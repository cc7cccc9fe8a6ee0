"""Which series serves which channel: found by what it is, by hand, or refused with a list of the study."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.dataset import Dataset

from factories import odd_grids
from mshub.card_tables import Channel
from mshub.channel_series import MIN_OVERLAP, choose_series, overlap, resample_to
from mshub.errors import ChannelError, GeometryError
from mshub.geometry import Grid, Volume, to_sitk

AXIAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]
BRATS = tuple(Channel(name=name) for name in ("T1", "T1ce", "T2", "FLAIR"))


def header(description: str, **attributes: Any) -> Dataset:
    dataset = Dataset()
    common = {
        "Modality": "MR",
        "SeriesDescription": description,
        "FrameOfReferenceUID": "1.9",
        "ImageOrientationPatient": AXIAL,
        "Rows": 256,
        "Columns": 256,
        "PixelSpacing": [0.9, 0.9],
        "SliceThickness": 5,
        "NumberOfSeriesRelatedInstances": 24,
        "AcquisitionDate": "20240102",
        "AcquisitionTime": "101500",
    }
    for keyword, value in {**common, **attributes}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def study(**more: Dataset) -> dict[str, Dataset]:
    """Return a brain study by UID; a keyword such as ``s7`` adds the series 1.7."""
    series = {
        "1.1": header("localizer"),
        "1.2": header("AX T1 pre"),
        "1.3": header("AX T2"),
        "1.4": header("AX T2 FLAIR"),
        "1.5": header("AX T1 post"),
        "1.6": header("T1 SUB"),
    }
    return series | {f"1.{name[1:]}": dataset for name, dataset in more.items()}


def uids(chosen: tuple) -> list[str]:
    return [item.series_uid for item in chosen]


def flairs(**more: Dataset) -> dict[str, Dataset]:
    """Return a T1 as 1.1 and several FLAIR."""
    return {"1.1": header("T1")} | {f"1.{name[1:]}": dataset for name, dataset in more.items()}


TWO = (Channel(name="T1"), Channel(name="FLAIR"))


class TestFinding:
    @pytest.mark.parametrize("reference", ["1.2", "1.3", "1.4", "1.5"])
    def test_every_channel_finds_its_series_whichever_is_the_reference(self, reference: str) -> None:
        chosen = choose_series(BRATS, reference, study())
        assert [(item.channel, item.series_uid) for item in chosen] == [
            *(("T1", "1.2"), ("T1ce", "1.5"), ("T2", "1.3"), ("FLAIR", "1.4"))
        ]

    def test_it_says_which_and_why(self) -> None:
        flair = choose_series(BRATS, "1.5", study())[3]
        assert (flair.description, flair.sequence) == ("AX T2 FLAIR", "FLAIR")
        assert flair.why == "SeriesDescription 'AX T2 FLAIR' says FLAIR"

    def test_a_card_s_sequence_goes_before_the_channel_s_name(self) -> None:
        channels = (Channel(name="0", sequence="T1w contrast-enhanced"), Channel(name="T1", sequence="T2w"))
        assert uids(choose_series(channels, "1.3", study())) == ["1.5", "1.3"]

    def test_pet_and_ct_are_told_apart_by_modality(self) -> None:
        headers = {"1.1": header("AC CT", Modality="CT"), "1.2": header("WB AC", Modality="PT")}
        for channels in (
            (Channel(name="CT"), Channel(name="PET")),
            (Channel(name="0", modality="CT"), Channel(name="noNorm", modality="PT")),
        ):
            assert uids(choose_series(channels, "1.1", headers)) == ["1.1", "1.2"]
            assert uids(choose_series(channels, "1.2", headers)) == ["1.1", "1.2"]

    def test_a_model_may_ask_for_fewer_than_the_study_has(self) -> None:
        assert uids(choose_series((Channel(name="ADC"), Channel(name="T2")), "1.3", study(s7=header("ADC")))) == [
            *("1.7", "1.3")
        ]


class TestOneChannel:
    @pytest.mark.parametrize("channel", [Channel(name="MRI"), Channel(name="T2w"), Channel(name="0000")])
    def test_it_takes_the_series_asked_for(self, channel: Channel) -> None:
        assert uids(choose_series((channel,), "1.5", study(), modality="MR")) == ["1.5"]

    def test_another_sequence_is_taken_and_said(self) -> None:
        (item,) = choose_series((Channel(name="T2w"),), "1.5", study(), modality="MR")
        assert "made for T2w and this was taken for T1w contrast-enhanced" in item.why

    def test_another_modality_is_refused(self) -> None:
        with pytest.raises(ChannelError, match=r"'AX T2' .*a MR series, expected CT: the model has never seen MR"):
            choose_series((Channel(name="CT"),), "1.3", study())
        with pytest.raises(ChannelError, match="expected CT"):
            choose_series((Channel(name="0"),), "1.3", study(), modality="CT")

    def test_another_modality_is_taken_by_hand_and_said(self) -> None:
        (item,) = choose_series((Channel(name="CT"),), "1.3", study(), {"CT": "1.3"})
        assert item.series_uid == "1.3"
        assert item.why == "chosen by hand, though the model asks for CT and it was taken for T2w"

    def test_a_model_of_no_known_modality_takes_any(self) -> None:
        headers = {"1.1": header("thorax", Modality="CT")}
        assert uids(choose_series((Channel(name="image"),), "1.1", headers, modality="other")) == ["1.1"]
        assert uids(choose_series((Channel(name="image"),), "1.1", headers)) == ["1.1"]

    def test_a_series_that_does_not_say_its_modality_is_taken(self) -> None:
        assert uids(choose_series((Channel(name="CT"),), "1.1", {"1.1": header("x", Modality=None)})) == ["1.1"]


class TestByHand:
    def test_a_choice_goes_before_evidence(self) -> None:
        chosen = choose_series(BRATS, "1.2", study(s7=header("AX FLAIR 2")), {"FLAIR": "1.7", "T2": ""})
        assert uids(chosen) == ["1.2", "1.5", "1.3", "1.7"]
        assert chosen[3].why == "chosen by hand"

    def test_a_reference_that_says_nothing_may_be_given_its_channel(self) -> None:
        headers = flairs(s2=header("FLAIR")) | {"1.1": header("series one")}
        assert uids(choose_series(TWO, "1.1", headers, {"T1": "1.1"})) == ["1.1", "1.2"]

    def test_a_reference_may_serve_no_channel_when_all_are_chosen(self) -> None:
        chosen = choose_series(TWO, "1.3", study(), {"T1": "1.2", "FLAIR": "1.4"})
        assert uids(chosen) == ["1.2", "1.4"]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"Flair": "1.4"}, "chosen for channel 'Flair', expected one of T1, T1ce, T2, FLAIR"),
            ({"FLAIR": "1.77"}, "channel 'FLAIR': found no series 1.77 in the study, .*'AX T2' .T2w, 1.3.;"),
            ({"FLAIR": "1.4", "T2": "1.4"}, "'AX T2 FLAIR' .* chosen for the channels FLAIR, T2, expected one series"),
        ],
    )
    def test_impossible_choices_are_refused(self, overrides: dict[str, str], message: str) -> None:
        with pytest.raises(ChannelError, match=message):
            choose_series(BRATS, "1.2", study(), overrides)

    def test_a_series_used_by_hand_serves_no_other_channel(self) -> None:
        with pytest.raises(ChannelError, match="channel 'FLAIR': found no FLAIR series"):
            choose_series(BRATS, "1.2", study(), {"T2": "1.4"})


class TestRefusing:
    def test_a_missing_sequence_and_lists_what_each_series_was_taken_for(self) -> None:
        headers = study()
        del headers["1.4"]
        with pytest.raises(ChannelError) as raised:
            choose_series(BRATS, "1.2", headers)
        message = str(raised.value)
        assert "channel 'FLAIR': found no FLAIR series in the study" in message
        assert "'AX T1 post' (T1w contrast-enhanced, 1.5); 'T1 SUB' (derived, 1.6)" in message
        assert '"series": {"FLAIR": "its SeriesInstanceUID"}' in message

    def test_a_reference_that_serves_no_channel(self) -> None:
        with pytest.raises(ChannelError, match=r"'localizer' \(localizer, 1.1\), which serves none of the channels"):
            choose_series(BRATS, "1.1", study())

    def test_a_reference_that_is_not_in_the_study(self) -> None:
        with pytest.raises(ChannelError, match=r"found no image series 1\.99 in its study"):
            choose_series(BRATS, "1.99", study())

    def test_a_channel_whose_name_says_nothing(self) -> None:
        with pytest.raises(ChannelError, match=r"channel 'noNorm': found no sequence in its name"):
            choose_series((Channel(name="T1"), Channel(name="noNorm")), "1.2", study(), modality="MR")

    def test_two_channels_that_ask_for_one_thing(self) -> None:
        channels = (Channel(name="T2"), Channel(name="DWI b0"), Channel(name="DWI b1000"))
        headers = study(s7=header("DWI b1000"), s8=header("DWI b0"))
        with pytest.raises(ChannelError, match="'DWI b0' and 'DWI b1000' both ask for DWI b1000"):
            choose_series(channels, "1.3", headers)
        by_hand = {"DWI b0": "1.8", "DWI b1000": "1.7"}
        assert uids(choose_series(channels, "1.3", headers, by_hand)) == ["1.3", "1.8", "1.7"]

    @pytest.mark.parametrize("frame", ["1.8", "", None])
    @pytest.mark.parametrize("overrides", [{}, {"FLAIR": "1.2"}])
    def test_another_frame_of_reference_even_by_hand(self, frame: str | None, overrides: dict[str, str]) -> None:
        headers = flairs(s2=header("FLAIR", FrameOfReferenceUID=frame))
        with pytest.raises(ChannelError, match=r"channel 'FLAIR': found 'FLAIR' .* in (the|no) frame of reference"):
            choose_series(TWO, "1.1", headers, overrides)

    def test_frames_that_are_blank_on_both_sides_are_not_shared(self) -> None:
        headers = {"1.1": header("T1", FrameOfReferenceUID=""), "1.2": header("FLAIR", FrameOfReferenceUID="")}
        with pytest.raises(ChannelError, match="in no frame of reference, expected the reference's"):
            choose_series(TWO, "1.1", headers)

    def test_series_that_nothing_tells_apart(self) -> None:
        headers = flairs(s2=header("FLAIR"), s3=header("FLAIR"))
        with pytest.raises(ChannelError, match=r"found 2 FLAIR series that nothing tells apart \(.*1.2\); .*1.3\)"):
            choose_series(TWO, "1.1", headers)


class TestSeveralCandidates:
    @pytest.mark.parametrize(
        ("better", "worse", "reason"),
        [
            ({}, {"FrameOfReferenceUID": "1.8", "AcquisitionTime": "120000"}, None),
            ({}, {"ImageOrientationPatient": SAGITTAL, "AcquisitionTime": "120000"}, "lies in the plane"),
            ({}, {"Rows": 512, "Columns": 512, "PixelSpacing": [0.45, 0.45]}, "has the pixels of the reference"),
            ({}, {"NumberOfSeriesRelatedInstances": 12, "SliceThickness": 2}, "has most slices"),
            ({"SliceThickness": 3}, {}, "has the finest voxels"),
            ({}, {"SeriesDescription": "FLAIR MPR", "AcquisitionTime": "120000"}, "is no reformat"),
            ({}, {"ImageType": ["DERIVED", "SECONDARY"], "AcquisitionTime": "120000"}, "is no reformat"),
            ({"AcquisitionTime": "101501"}, {}, "was made last"),
            ({"AcquisitionDate": "20240103", "AcquisitionTime": "080000"}, {}, "was made last"),
        ],
    )
    def test_the_better_one_is_taken_whatever_the_order(self, better: dict, worse: dict, reason: str | None) -> None:
        one, other = header("FLAIR", **better), header(**{"description": "FLAIR"}, **worse)
        for headers, expected in ((flairs(s2=one, s3=other), "1.2"), (flairs(s2=other, s3=one), "1.3")):
            item = choose_series(TWO, "1.1", headers)[1]
            assert item.series_uid == expected
            assert (f"of 2 such series the one that {reason}" in item.why) is (reason is not None)

    def test_an_absent_attribute_is_no_argument(self) -> None:
        headers = flairs(s2=header("FLAIR", NumberOfSeriesRelatedInstances=None), s3=header("FLAIR"))
        with pytest.raises(ChannelError, match="nothing tells apart"):
            choose_series(TWO, "1.1", headers)

    def test_reasons_add_up(self) -> None:
        headers = flairs(
            s2=header("FLAIR", ImageOrientationPatient=SAGITTAL, SliceThickness=1),
            s3=header("FLAIR"),
            s4=header("FLAIR", AcquisitionTime="101700"),
        )
        item = choose_series(TWO, "1.1", headers)[1]
        assert item.series_uid == "1.4"
        assert "of 3 such series the one that lies in the plane of the reference and was made last" in item.why

    def test_more_images_are_not_more_slices_of_diffusion(self) -> None:
        channels = (Channel(name="T1"), Channel(name="DWI"))
        headers = flairs(
            s2=header("DTI 64", NumberOfSeriesRelatedInstances=1560), s3=header("DWI", AcquisitionTime="11")
        )
        assert uids(choose_series(channels, "1.1", headers)) == ["1.1", "1.3"]


def ramp(grid: Grid, dtype: Any = np.float32) -> Volume:
    """Return a volume whose values are linear in patient coordinates: linear interpolation keeps them."""
    indices = np.stack(np.meshgrid(*map(np.arange, grid.shape_xyz), indexing="ij"), axis=-1)
    points = indices @ grid.affine_ras[:3, :3].T + grid.affine_ras[:3, 3]
    return Volume((points @ [3.0, -2.0, 5.0] + 400).astype(dtype), grid)


def part_of(grid: Grid, start: tuple[int, int, int], shape: tuple[int, int, int]) -> Grid:
    affine = grid.affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    return Grid(shape, affine)


class TestResampling:
    @pytest.mark.parametrize("name", odd_grids())
    def test_values_go_where_the_patient_has_them(self, name: str) -> None:
        reference = Grid((11, 9, 7), odd_grids()[name])
        affine = reference.affine_ras.copy()
        affine[:3, :3] = affine[:3, :3] @ np.diag([0.5, 0.7, 0.4])
        affine[:3, 3] -= reference.affine_ras[:3, :3] @ [1, 1, 1]
        volume = ramp(Grid((26, 18, 24), affine))
        resampled = resample_to(volume, reference)
        assert resampled.grid is reference
        np.testing.assert_allclose(resampled.array_xyz, ramp(reference).array_xyz, rtol=0, atol=2e-3)

    def test_the_very_same_grid_keeps_the_very_same_array(self) -> None:
        grid = Grid((5, 6, 7), odd_grids()["oblique"])
        array = np.random.default_rng(1).integers(0, 900, (5, 6, 7)).astype(np.int16)
        kept = resample_to(Volume(array, grid), Grid((5, 6, 7), grid.affine_ras.copy()))
        assert kept.array_xyz is array

    @pytest.mark.parametrize("orientation", ["LPS", "RAS", "PIR", "SAL"])
    def test_turned_axes_give_the_same_values_back(self, orientation: str) -> None:
        grid = Grid((8, 6, 7), odd_grids()["oblique"])
        volume = Volume(np.random.default_rng(2).integers(0, 900, (8, 6, 7)).astype(np.int16), grid)
        back = resample_to(volume.turned(orientation), grid)
        np.testing.assert_allclose(back.array_xyz, volume.array_xyz, rtol=0, atol=1e-2)

    def test_outside_is_the_minimum(self) -> None:
        grid = Grid((10, 8, 6), odd_grids()["oblique"])
        volume = Volume(np.random.default_rng(3).integers(-30, 900, (10, 8, 6)).astype(np.int16), grid)
        part = Volume(volume.array_xyz[3:, :, :5], part_of(grid, (3, 0, 0), (7, 8, 5)))
        resampled = resample_to(part, grid).array_xyz
        np.testing.assert_allclose(resampled[3:, :, :5], part.array_xyz, rtol=0, atol=1e-2)
        assert set(np.unique(resampled[:3])) == set(np.unique(resampled[:, :, 5:])) == {float(part.array_xyz.min())}

    def test_it_agrees_with_simpleitk_on_images(self) -> None:
        grid, other = Grid((12, 10, 8), odd_grids()["oblique"]), Grid((10, 9, 9), odd_grids()["slightly-oblique"])
        volume = Volume(np.random.default_rng(4).normal(size=(12, 10, 8)).astype(np.float32), grid)
        image = to_sitk(Volume(np.zeros(other.shape_xyz, np.float32), other))
        expected = sitk.Resample(
            to_sitk(volume), image, sitk.Transform(), sitk.sitkLinear, float(volume.array_xyz.min())
        )
        expected_xyz = sitk.GetArrayFromImage(expected).transpose(2, 1, 0)
        if overlap(grid, other) < MIN_OVERLAP:
            pytest.fail("the grids of this test must overlap")
        np.testing.assert_array_equal(resample_to(volume, other).array_xyz, expected_xyz)

    @pytest.mark.parametrize(("slices", "share"), [(6, "30%"), (9, "45%")])
    def test_little_overlap_is_refused_with_its_number(self, slices: int, share: str) -> None:
        grid = Grid((10, 8, 20), odd_grids()["oblique"])
        volume = ramp(part_of(grid, (0, 0, 0), (10, 8, slices)))
        with pytest.raises(GeometryError, match=f"covers {share} of the volume of the reference series, .*50%"):
            resample_to(volume, grid)

    def test_half_an_overlap_will_do_and_the_smaller_one_may_be_the_reference(self) -> None:
        grid = Grid((10, 8, 20), odd_grids()["oblique"])
        small = part_of(grid, (0, 0, 0), (10, 8, 10))
        assert resample_to(ramp(small), grid).grid is grid
        tiny = part_of(grid, (0, 0, 0), (10, 8, 4))
        np.testing.assert_allclose(resample_to(ramp(grid), tiny).array_xyz, ramp(tiny).array_xyz, atol=2e-3)

    def test_series_beside_each_other_do_not_overlap(self) -> None:
        grid = Grid((10, 8, 6), odd_grids()["oblique"])
        assert overlap(part_of(grid, (30, 0, 0), (10, 8, 6)), grid) == 0
        assert overlap(grid, grid) == 1
