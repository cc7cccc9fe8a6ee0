"""Two channels of one real MR study: told apart, chosen, and brought onto one grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from mshub.card_tables import Channel
from mshub.channel_series import choose_series, overlap, resample_to
from mshub.dicom_series import SeriesStack, read_series, read_stack
from mshub.errors import ChannelError, GeometryError
from mshub.geometry import Grid, Volume, lps_affine, same_grid

CHANNELS = (Channel(name="T1w contrast-enhanced"), Channel(name="FLAIR"))


@pytest.fixture(scope="module")
def stacks(shared_data: Path) -> dict[str, SeriesStack]:
    return {name: read_stack(shared_data / "dicom_mr" / name) for name in ("T1post", "FLAIR")}


@pytest.fixture(scope="module")
def volumes(shared_data: Path) -> dict[str, Volume]:
    return {name: read_series(shared_data / "dicom_mr" / name) for name in ("T1post", "FLAIR")}


def headers_of(stacks: dict[str, SeriesStack]) -> dict[str, pydicom.Dataset]:
    return {str(stack.headers[0].SeriesInstanceUID): stack.headers[0] for stack in stacks.values()}


def uid_of(stack: SeriesStack) -> str:
    return str(stack.headers[0].SeriesInstanceUID)


def rewritten(folder: Path, volume: Volume, axes: tuple[int, int, int], like: Path) -> Path:
    """Write a volume as a DICOM series whose columns, rows and slices run along other axes of it.

    `axes` are those axes, counted from 1; negative where they run backwards.
    """
    folder.mkdir()
    array, affine = volume.array_xyz, lps_affine(volume.grid)
    order = [abs(axis) - 1 for axis in axes]
    turned = array.transpose(order)
    directions, origin = affine[:3, :3][:, order].copy(), affine[:3, 3].copy()
    for axis, signed in enumerate(axes):
        if signed < 0:
            turned = np.flip(turned, axis)
            origin += directions[:, axis] * (turned.shape[axis] - 1)
            directions[:, axis] *= -1
    spacing = np.linalg.norm(directions, axis=0)
    series_uid = generate_uid()
    dataset = pydicom.dcmread(like)
    dataset.SeriesInstanceUID = series_uid
    dataset.Columns, dataset.Rows = turned.shape[:2]
    dataset.PixelSpacing = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"]
    dataset.ImageOrientationPatient = [f"{value:.10f}" for value in (directions / spacing)[:, :2].T.ravel()]
    for k in range(turned.shape[2]):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.ImagePositionPatient = [f"{value:.8f}" for value in origin + k * directions[:, 2]]
        dataset.PixelData = np.ascontiguousarray(turned[:, :, k].T.astype("<i2")).tobytes()
        dataset.save_as(folder / f"{k:04d}.dcm")
    return folder


def part_of(volume: Volume, window: tuple[slice, slice, slice]) -> Volume:
    affine = volume.grid.affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in window]
    array = volume.array_xyz[window]
    return Volume(array, Grid(array.shape, affine))


class TestChoosing:
    @pytest.mark.parametrize("reference", ["T1post", "FLAIR"])
    def test_each_may_be_the_reference_of_the_other(self, stacks: dict[str, SeriesStack], reference: str) -> None:
        chosen = choose_series(CHANNELS, uid_of(stacks[reference]), headers_of(stacks))
        assert [item.series_uid for item in chosen] == [uid_of(stacks["T1post"]), uid_of(stacks["FLAIR"])]
        assert [item.description for item in chosen] == ["T1post", "FLAIR_reg"]
        assert [item.sequence for item in chosen] == ["T1w contrast-enhanced", "FLAIR"]

    def test_any_of_their_slices_says_the_same(self, stacks: dict[str, SeriesStack]) -> None:
        for number in range(0, 22, 7):
            headers = {uid_of(stack): stack.headers[number] for stack in stacks.values()}
            assert len(choose_series(CHANNELS, uid_of(stacks["FLAIR"]), headers)) == 2

    def test_a_model_that_needs_more_says_what_is_missing(self, stacks: dict[str, SeriesStack]) -> None:
        channels = (Channel(name="T1"), *CHANNELS)
        with pytest.raises(ChannelError, match=r"channel 'T1': found no T1 series .*'T1post' \(T1w contrast-enhanced"):
            choose_series(channels, uid_of(stacks["FLAIR"]), headers_of(stacks))

    def test_a_series_of_another_frame_of_reference_is_refused(self, stacks: dict[str, SeriesStack]) -> None:
        headers = {uid: pydicom.Dataset(header) for uid, header in headers_of(stacks).items()}
        headers[uid_of(stacks["FLAIR"])].FrameOfReferenceUID = "1.2.3"
        with pytest.raises(ChannelError, match=r"'FLAIR': found 'FLAIR_reg' .* in the frame of reference 1\.2\.3"):
            choose_series(CHANNELS, uid_of(stacks["T1post"]), headers)


class TestOneGrid:
    def test_grids_that_agree_leave_the_voxels_as_they_are(self, volumes: dict[str, Volume]) -> None:
        flair, t1 = volumes["FLAIR"], volumes["T1post"]
        assert same_grid(flair.grid, t1.grid)
        assert resample_to(flair, t1.grid).array_xyz is flair.array_xyz

    @pytest.mark.parametrize(
        "axes",
        [(2, -1, 3), (-1, 2, -3), (2, 3, 1), (1, -3, 2)],
        ids=["turned in plane", "turned over", "sagittal", "coronal"],
    )
    def test_a_turned_flair_gets_its_voxels_back(
        self, tmp_path: Path, shared_data: Path, volumes: dict[str, Volume], axes: tuple[int, int, int]
    ) -> None:
        flair = part_of(volumes["FLAIR"], (slice(60, 450), slice(40, 470), slice(0, 22)))
        like = next((shared_data / "dicom_mr" / "FLAIR").iterdir())
        turned = read_series(rewritten(tmp_path / "turned", flair, axes, like))
        assert not same_grid(turned.grid, flair.grid)
        resampled = resample_to(turned, volumes["T1post"].grid)
        assert same_grid(resampled.grid, volumes["T1post"].grid)
        inside = resampled.array_xyz[60:450, 40:470]
        np.testing.assert_allclose(inside, flair.array_xyz, rtol=0, atol=0.5)  # values reach 4297
        outside = resampled.array_xyz.copy()
        outside[60:450, 40:470] = flair.array_xyz.min()
        assert np.all(outside == flair.array_xyz.min())

    def test_a_cropped_reference_sees_its_part(
        self, tmp_path: Path, shared_data: Path, volumes: dict[str, Volume]
    ) -> None:
        window = (slice(101, 401), slice(90, 350), slice(3, 19))
        like = next((shared_data / "dicom_mr" / "T1post").iterdir())
        reference = read_stack(rewritten(tmp_path / "t1", part_of(volumes["T1post"], window), (1, 2, 3), like))
        resampled = resample_to(volumes["FLAIR"], reference.grid)
        expected = volumes["FLAIR"].array_xyz[window]
        np.testing.assert_allclose(resampled.array_xyz, expected, rtol=0, atol=0.5)

    def test_a_finer_reference_is_interpolated(self, volumes: dict[str, Volume]) -> None:
        flair = volumes["FLAIR"]
        affine = flair.grid.affine_ras.copy()
        affine[:3, 3] += affine[:3, :3] @ [100, 100, 5]
        affine[:3, 2] /= 2
        finer = resample_to(flair, Grid((300, 300, 20), affine)).array_xyz
        part = flair.array_xyz[100:400, 100:400, 5:16].astype(np.float64)
        np.testing.assert_allclose(finer[:, :, ::2], part[:, :, :10], rtol=0, atol=0.5)
        np.testing.assert_allclose(finer[:, :, 1::2], (part[:, :, :10] + part[:, :, 1:]) / 2, rtol=0, atol=0.5)

    def test_a_flair_of_a_few_slices_is_refused(self, volumes: dict[str, Volume]) -> None:
        few = part_of(volumes["FLAIR"], (slice(0, 512), slice(0, 512), slice(9, 14)))
        assert overlap(few.grid, volumes["T1post"].grid) == pytest.approx(5 / 22, abs=0.02)
        with pytest.raises(GeometryError, match="covers 23% of the volume of the reference series"):
            resample_to(few, volumes["T1post"].grid)
