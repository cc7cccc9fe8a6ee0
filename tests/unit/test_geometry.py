"""Grids and volumes: what is refused, what counts as the same place, and LPS against RAS, checked with SimpleITK."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from mshub.errors import CaseError, ChannelError, GeometryError
from mshub.geometry import (
    SAME_GRID_TOLERANCE_MM,
    Grid,
    Volume,
    check_channels,
    check_same_grid,
    from_sitk,
    grid_from_sitk,
    same_grid,
    to_sitk,
)
from mshub.image_limits import check_values, check_voxel_count

SHAPE = (5, 7, 9)
SPACING = (0.8, 1.1, 2.5)
ORIGIN = (-31.25, 12.5, 77.0)


def rotation(x_degrees: float, y_degrees: float, z_degrees: float) -> np.ndarray:
    turns = []
    for axis, degrees in enumerate((x_degrees, y_degrees, z_degrees)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        turns.append(turn)
    return turns[2] @ turns[1] @ turns[0]


def affine(directions: np.ndarray | None = None, spacing=SPACING, origin=ORIGIN) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = (rotation(10, 20, 30) if directions is None else directions) * np.array(spacing)
    matrix[:3, 3] = origin
    return matrix


def axis_aligned() -> list[np.ndarray]:
    """All 48 ways to name and flip three axes, half of them left-handed."""
    return [
        np.eye(3)[:, list(order)] * np.array(signs)
        for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3))
    ]


def oblique() -> list[np.ndarray]:
    turns = [rotation(10, 20, 30), rotation(-75, 3, 140), rotation(0, 45, 0), rotation(179.9, 0.2, -90.1)]
    return turns + [turn * np.array([1.0, 1.0, -1.0]) for turn in turns]


ALL_DIRECTIONS = axis_aligned() + oblique()


@pytest.fixture
def grid() -> Grid:
    return Grid(SHAPE, affine())


class TestGrid:
    def test_knows_its_spacing_along_x_y_z(self, grid):
        assert grid.spacing_xyz_mm == pytest.approx(SPACING)
        assert grid.voxels == 5 * 7 * 9

    @pytest.mark.parametrize("directions", ALL_DIRECTIONS)
    def test_names_its_orientation_as_nibabel_does(self, directions):
        matrix = affine(directions)
        assert Grid(SHAPE, matrix).orientation == "".join(nib.aff2axcodes(matrix))

    def test_of_a_dicom_axial_scan_is_lps(self):
        assert Grid(SHAPE, affine(np.diag([-1.0, -1.0, 1.0]))).orientation == "LPS"

    def test_corners_are_where_nibabel_puts_them(self, grid):
        expected = nib.affines.apply_affine(grid.affine_ras, [[0, 0, 0], [4, 0, 0], [4, 6, 8]])
        for corner in expected:
            assert np.linalg.norm(grid.corners_mm() - corner, axis=1).min() < 1e-12

    def test_keeps_its_own_read_only_copy_of_the_affine(self):
        matrix = affine()
        grid = Grid(SHAPE, matrix)
        matrix[0, 3] = 999
        assert grid.affine_ras[0, 3] == ORIGIN[0]
        with pytest.raises(ValueError, match="read-only"):
            grid.affine_ras[0, 3] = 1
        with pytest.raises(FrozenInstanceError):
            grid.shape_xyz = (2, 2, 2)

    def test_takes_numpy_integers_and_float32(self):
        grid = Grid(np.array(SHAPE, dtype=np.int16), affine().astype(np.float32))
        assert grid.shape_xyz == SHAPE
        assert type(grid.shape_xyz[0]) is int
        assert grid.affine_ras.dtype == np.float64

    @pytest.mark.parametrize("shape", [(1, 7, 9), (5, 1, 9), (5, 7, 1)])
    def test_refuses_a_single_slice(self, shape):
        with pytest.raises(GeometryError, match=r"a single slice is no volume.*at least 2.*whole series"):
            Grid(shape, affine())

    def test_refuses_two_dimensions(self):
        with pytest.raises(GeometryError, match="found a 2-D image of 5 x 7 voxels, expected a 3-D volume"):
            Grid((5, 7), affine())

    @pytest.mark.parametrize("points", [1, 12])
    def test_refuses_four_dimensions_and_counts_the_time_points(self, points):
        with pytest.raises(GeometryError, match=rf"5 x 7 x 9 x {points} voxels \({points} time points.*fslsplit"):
            Grid((*SHAPE, points), affine())

    @pytest.mark.parametrize("bad", [0.0, 9e-4, 101.0])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_refuses_absurd_spacings_and_shows_them(self, bad, axis):
        spacing = list(SPACING)
        spacing[axis] = bad
        with pytest.raises(GeometryError, match=r"voxel spacing of .* mm, expected 0.001 to 100 mm"):
            Grid(SHAPE, affine(spacing=spacing))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_refuses_an_affine_that_is_not_finite(self, bad):
        matrix = affine()
        matrix[1, 2] = bad
        with pytest.raises(GeometryError, match="expected a finite 4x4 matrix"):
            Grid(SHAPE, matrix)

    @pytest.mark.parametrize("matrix", [np.eye(3), np.diag([1.0, 1.0, 1.0, 2.0])])
    def test_refuses_what_is_no_affine(self, matrix):
        with pytest.raises(GeometryError, match="last row 0 0 0 1"):
            Grid(SHAPE, matrix)

    def test_refuses_axes_in_one_plane(self):
        flat = affine()
        flat[:3, 2] = flat[:3, 0] + flat[:3, 1]
        with pytest.raises(GeometryError, match="singular affine"):
            Grid(SHAPE, flat)

    def test_refuses_a_gantry_tilt_and_measures_it(self):
        tilted = rotation(10, 20, 30) @ np.array([[1, 0, 0], [0, 1, np.sin(np.radians(12))], [0, 0, 1]])
        tilted /= np.linalg.norm(tilted, axis=0)
        with pytest.raises(GeometryError, match=r"11\.\d\d degrees off a right angle .*tilted CT gantry.*resample"):
            Grid(SHAPE, affine(tilted))

    def test_accepts_the_rounding_of_a_float32_affine(self):
        Grid(SHAPE, affine(rotation(33, -21, 5)).astype(np.float32))


class TestSameGrid:
    @pytest.mark.parametrize("directions", ALL_DIRECTIONS[::5])
    def test_holds_after_rounding_to_float32(self, directions):
        exact = Grid((512, 400, 300), affine(directions, spacing=(0.71, 0.9, 2.5), origin=(-249.51, -437.3, -766.5)))
        assert same_grid(exact, Grid(exact.shape_xyz, exact.affine_ras.astype(np.float32)))

    def test_measures_the_farthest_corner_not_the_origin(self, grid):
        slightly = grid.affine_ras @ np.diag([1, 1, 1 + 2 * SAME_GRID_TOLERANCE_MM / (8 * 2.5), 1])
        assert not same_grid(grid, Grid(SHAPE, slightly))

    def test_refuses_another_shape(self, grid):
        with pytest.raises(GeometryError, match="shape 5 x 7 x 10 against 5 x 7 x 9 voxels"):
            check_same_grid(Grid((5, 7, 10), affine()), grid, "the label", "the image")

    def test_names_a_shift_and_its_size(self, grid):
        moved = Grid(SHAPE, affine(origin=(-31.25, 12.5, 80.2)))
        with pytest.raises(GeometryError) as raised:
            check_same_grid(moved, grid, "the label", "the image")
        message = str(raised.value)
        assert message.startswith("the label and the image are not on one grid")
        assert "origin differs by 3.2 mm" in message
        assert "corners up to 3.2 mm apart" in message
        assert "resample the label to the grid of the image" in message
        assert "spacing" not in message
        assert "direction" not in message

    def test_names_another_spacing(self, grid):
        other = Grid(SHAPE, affine(spacing=(0.8, 1.1, 3.0)))
        with pytest.raises(GeometryError, match=r"spacing 0.8 x 1.1 x 3 against 0.8 x 1.1 x 2.5 mm") as raised:
            check_same_grid(other, grid, "a", "b")
        assert "direction" not in str(raised.value)

    def test_names_another_direction_in_degrees(self, grid):
        turned = Grid(SHAPE, affine(rotation(0, 0, 5) @ rotation(10, 20, 30)))
        with pytest.raises(GeometryError, match=r"direction differs by 4.[5-9]\d* degrees"):
            check_same_grid(turned, grid, "a", "b")

    def test_names_a_flip_by_its_orientation(self):
        ras, las = Grid(SHAPE, affine(np.eye(3))), Grid(SHAPE, affine(np.diag([-1.0, 1.0, 1.0])))
        with pytest.raises(GeometryError, match="orientation LAS against RAS; direction differs by 180 degrees"):
            check_same_grid(las, ras, "a", "b")


class TestCheckChannels:
    def test_accepts_channels_on_one_grid(self, grid):
        check_channels([grid, Grid(SHAPE, affine())], ["T1", "FLAIR"])

    def test_names_the_channel_that_is_elsewhere(self, grid):
        with pytest.raises(GeometryError, match=r"channel 'FLAIR' and channel 'T1'.*origin differs"):
            check_channels([grid, grid, Grid(SHAPE, affine(origin=(0, 0, 0)))], ["T1", "T2", "FLAIR"])

    def test_refuses_a_missing_channel(self, grid):
        with pytest.raises(ChannelError, match=r"found 1 channels, expected 2 \(T1, FLAIR\)"):
            check_channels([grid], ["T1", "FLAIR"])

    def test_refuses_no_channel(self):
        with pytest.raises(ChannelError, match="found 0 channels"):
            check_channels([], [])


class TestVolume:
    def test_refuses_an_array_in_nnunet_order(self, grid):
        with pytest.raises(GeometryError, match=r"found an array of 9 x 7 x 5 voxels, expected 5 x 7 x 9.*z, y, x"):
            Volume(np.zeros(SHAPE[::-1]), grid)


class TestCheckValues:
    def test_counts_what_is_not_finite_and_says_where_it_starts(self):
        array = np.ones(SHAPE, dtype=np.float32)
        array[1, 2, 3] = np.nan
        array[4, 0, 0] = array[4, 6, 8] = -np.inf
        with pytest.raises(CaseError, match=r"3 of 315 voxels not finite \(1 NaN, 2 infinite\).*\(1, 2, 3\)"):
            check_values(array)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
    def test_refuses_a_constant_image_and_says_its_value(self, dtype):
        with pytest.raises(CaseError, match="the same value 7 in all 315 voxels"):
            check_values(np.full(SHAPE, 7, dtype=dtype))

    def test_lets_an_empty_label_pass(self):
        check_values(np.zeros(SHAPE, dtype=np.uint8), allow_constant=True)

    def test_refuses_nan_in_a_label_all_the_same(self):
        with pytest.raises(CaseError, match="not finite"):
            check_values(np.full(SHAPE, np.nan), allow_constant=True)


def test_the_voxel_limit_survives_numbers_beyond_64_bits():
    check_voxel_count(SHAPE, 315)
    with pytest.raises(CaseError, match="= 315 voxels, expected at most 314"):
        check_voxel_count(SHAPE, 314)
    with pytest.raises(CaseError, match="found"):
        check_voxel_count((2**40, 2**40, 2**40))


class TestSimpleItk:
    @pytest.mark.parametrize("directions", ALL_DIRECTIONS)
    def test_puts_every_voxel_at_the_ras_point_with_two_signs_changed(self, directions):
        grid = Grid(SHAPE, affine(directions))
        image = to_sitk(Volume(np.zeros(SHAPE, dtype=np.int16), grid))
        for index in [(0, 0, 0), (4, 0, 0), (0, 6, 0), (0, 0, 8), (3, 2, 7)]:
            ras = nib.affines.apply_affine(grid.affine_ras, index)
            lps = image.TransformIndexToPhysicalPoint(index)
            np.testing.assert_allclose(lps, ras * [-1, -1, 1], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
    def test_round_trip_keeps_values_dtype_and_grid(self, dtype, grid):
        array = np.arange(315).reshape(SHAPE).astype(dtype)
        image = to_sitk(Volume(array, grid))
        assert image.GetSize() == SHAPE
        assert image[3, 2, 7] == array[3, 2, 7]
        back = from_sitk(image)
        assert back.array_xyz.dtype == dtype
        np.testing.assert_array_equal(back.array_xyz, array)
        np.testing.assert_allclose(back.grid.affine_ras, grid.affine_ras, rtol=0, atol=1e-12)

    def test_takes_an_array_of_any_memory_order(self, grid):
        array = np.asfortranarray(np.arange(315, dtype=np.int16).reshape(SHAPE))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(to_sitk(Volume(array, grid))), array.transpose(2, 1, 0))

    def test_a_left_handed_image_stays_left_handed(self):
        grid = Grid(SHAPE, affine(np.diag([1.0, 1.0, -1.0])))
        direction = np.array(to_sitk(Volume(np.zeros(SHAPE), grid)).GetDirection()).reshape(3, 3)
        assert np.linalg.det(direction) == pytest.approx(-1)

    def test_a_picture_is_no_grid(self):
        with pytest.raises(GeometryError, match="2-D"):
            grid_from_sitk(sitk.Image(5, 7, sitk.sitkInt16))


class TestTurning:
    @pytest.mark.parametrize("directions", ALL_DIRECTIONS)
    @pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "SLA"])
    def test_every_voxel_stays_where_it_is_in_the_patient(self, directions, orientation):
        volume = Volume(np.arange(np.prod(SHAPE)).reshape(SHAPE), Grid(SHAPE, affine(directions)))
        turned = volume.turned(orientation)
        assert turned.grid.orientation == orientation
        assert sorted(turned.grid.spacing_xyz_mm) == pytest.approx(sorted(SPACING))
        for index in [(0, 0, 0), (4, 1, 7), (2, 6, 3)]:
            position = volume.grid.affine_ras @ (*index, 1)
            there = np.linalg.solve(turned.grid.affine_ras, position)[:3]
            assert turned.array_xyz[tuple(np.rint(there).astype(int))] == volume.array_xyz[index]
            np.testing.assert_allclose(there, np.rint(there), atol=1e-6)

    @pytest.mark.parametrize("directions", ALL_DIRECTIONS)
    def test_turning_back_gives_the_same_volume(self, directions):
        volume = Volume(np.arange(np.prod(SHAPE)).reshape(SHAPE), Grid(SHAPE, affine(directions)))
        back = volume.turned("PIR").turned(volume.grid.orientation)
        np.testing.assert_array_equal(back.array_xyz, volume.array_xyz)
        assert same_grid(back.grid, volume.grid)

    @pytest.mark.parametrize("directions", ALL_DIRECTIONS)
    def test_simpleitk_turns_to_lps_in_the_same_way(self, directions):
        volume = Volume(np.arange(np.prod(SHAPE)).reshape(SHAPE), Grid(SHAPE, affine(directions)))
        expected = from_sitk(sitk.DICOMOrient(to_sitk(volume), "LPS"))
        found = volume.turned("LPS")
        np.testing.assert_array_equal(found.array_xyz, expected.array_xyz)
        assert same_grid(found.grid, expected.grid)
