"""Reading and writing volumes: every refusal, and agreement with nibabel, SimpleITK and pynrrd on what is accepted."""

from __future__ import annotations

import gzip
import logging
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from mshub.errors import CaseError, GeometryError
from mshub.geometry import Grid, Volume, grid_from_sitk, same_grid, to_sitk
from mshub.volume_io import read_grid, read_volume, write_nifti, write_nrrd, write_volume

SHAPE = (5, 7, 9)
SPACING = (0.8, 1.1, 2.5)
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

# byte offsets in the NIfTI-1 header
DIM, DATATYPE, PIXDIM, VOX_OFFSET, SCL_SLOPE, XYZT_UNITS, QFORM_CODE, SROW_X = 40, 70, 76, 108, 112, 123, 252, 280


def rotation(degrees_xyz) -> np.ndarray:
    turn = np.eye(4)
    x, y, z = np.radians(degrees_xyz)
    turn[:3, :3] = nib.eulerangles.euler2mat(z, y, x)
    return turn


def affine(directions=None, spacing=SPACING, origin=(-31.25, 12.5, 77.0)) -> np.ndarray:
    matrix = rotation((10, 20, 30)) if directions is None else np.array(directions)
    matrix = matrix @ np.diag([*spacing, 1.0])
    matrix[:3, 3] = origin
    return matrix


def every_orientation() -> list[np.ndarray]:
    """All 48 axis permutations and flips, and eight oblique grids, half of everything left-handed."""
    straight = []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        matrix = np.eye(4)
        matrix[:3, :3] = np.eye(3)[:, list(order)] * np.array(signs)
        straight.append(matrix)
    turned = [rotation(angles) for angles in ((10, 20, 30), (-75, 3, 140), (0, 45, 0), (179.9, 0.2, -90.1))]
    return straight + turned + [turn @ np.diag([1, -1, 1, 1]) for turn in turned]


def ramp(dtype=np.int16) -> np.ndarray:
    return np.arange(5 * 7 * 9).reshape(SHAPE).astype(dtype)


def save_nifti(path: Path, array=None, matrix=None, **header) -> Path:
    image = nib.Nifti1Image(ramp() if array is None else array, affine() if matrix is None else matrix)
    image.set_qform(image.affine, header.get("qform", 1))
    image.set_sform(image.affine, header.get("sform", 1))
    nib.save(image, path)
    return path


def patch(path: Path, offset: int, value, dtype: str) -> Path:
    """Overwrite header bytes of an uncompressed NIfTI behind nibabel's back."""
    data = bytearray(path.read_bytes())
    new = np.array(value, dtype=dtype).tobytes()
    data[offset : offset + len(new)] = new
    path.write_bytes(data)
    return path


@pytest.fixture
def nii(tmp_path) -> Path:
    return save_nifti(tmp_path / "case.nii")


@pytest.fixture
def grid() -> Grid:
    return Grid(SHAPE, affine())


def real_image(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real image {name} is not here (shared test data, not part of the repository)")
    return path


class TestReadingNifti:
    @pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".NII.GZ"])
    def test_gives_nibabels_array_and_affine(self, tmp_path, extension):
        path = save_nifti(tmp_path / f"case{extension.lower()}").rename(tmp_path / f"case{extension}")
        volume, expected = read_volume(path), nib.load(path)
        np.testing.assert_array_equal(volume.array_xyz, np.asanyarray(expected.dataobj))
        np.testing.assert_array_equal(volume.grid.affine_ras, expected.affine)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32])
    def test_keeps_the_files_dtype(self, tmp_path, dtype):
        assert read_volume(save_nifti(tmp_path / "a.nii.gz", ramp(dtype))).array_xyz.dtype == dtype

    def test_makes_float64_float32(self, tmp_path):
        assert read_volume(save_nifti(tmp_path / "a.nii.gz", ramp(np.float64))).array_xyz.dtype == np.float32

    def test_applies_slope_and_intercept_as_get_fdata_does(self, nii):
        patch(nii, SCL_SLOPE, [0.5, -1024.0], "<f4")
        volume = read_volume(nii)
        assert volume.array_xyz.dtype == np.float32
        np.testing.assert_array_equal(volume.array_xyz, nib.load(nii).get_fdata(dtype=np.float32))

    @pytest.mark.parametrize("scaling", [[0.0, 0.0], [1.0, 0.0], [np.nan, np.nan]])
    def test_takes_scaling_that_says_nothing_for_none(self, nii, scaling):
        assert read_volume(patch(nii, SCL_SLOPE, scaling, "<f4")).array_xyz.dtype == np.int16

    def test_reads_big_endian_into_native_order(self, tmp_path):
        image = nib.Nifti1Image(ramp(), affine(), header=nib.Nifti1Header(endianness=">"))
        nib.save(image, tmp_path / "big.nii.gz")
        array = read_volume(tmp_path / "big.nii.gz").array_xyz
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, ramp())

    def test_reads_nifti_2(self, tmp_path):
        nib.save(nib.Nifti2Image(ramp(), affine()), tmp_path / "two.nii.gz")
        volume = read_volume(tmp_path / "two.nii.gz")
        np.testing.assert_array_equal(volume.array_xyz, ramp())
        np.testing.assert_array_equal(volume.grid.affine_ras, affine())

    def test_skips_header_extensions(self, tmp_path):
        image = nib.Nifti1Image(ramp(), affine())
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a note" * 50))
        nib.save(image, tmp_path / "noted.nii.gz")
        np.testing.assert_array_equal(read_volume(tmp_path / "noted.nii.gz").array_xyz, ramp())
        assert read_grid(tmp_path / "noted.nii.gz").shape_xyz == SHAPE

    @pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 1), (0, 2), (1, 4)])
    def test_takes_the_form_that_is_there(self, tmp_path, qform, sform):
        path = save_nifti(tmp_path / "a.nii.gz", qform=qform, sform=sform)
        np.testing.assert_allclose(read_grid(path).affine_ras, affine(), rtol=0, atol=1e-5)

    def test_without_any_form_warns_and_lies_where_itk_and_so_slicer_puts_it(self, nii, caplog):
        patch(nii, QFORM_CODE, [0, 0], "<i2")
        with caplog.at_level(logging.WARNING, "mshub"):
            volume = read_volume(nii)
        assert "neither qform nor sform" in caplog.text
        expected = grid_from_sitk(sitk.ReadImage(str(nii)))
        np.testing.assert_allclose(volume.grid.affine_ras, expected.affine_ras, rtol=0, atol=1e-5)
        assert volume.grid.orientation == "LPS"  # nibabel's is LAS


class TestRefusingNifti:
    def test_that_is_missing(self, tmp_path):
        with pytest.raises(CaseError, match=r"^gone.nii.gz: no such file or folder"):
            read_volume(tmp_path / "gone.nii.gz")

    def test_that_is_empty(self, tmp_path):
        (tmp_path / "empty.nii.gz").touch()
        with pytest.raises(CaseError, match=r"^empty.nii.gz: the file is empty \(0 bytes\)"):
            read_volume(tmp_path / "empty.nii.gz")

    @pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, -8, -4, -1])
    def test_that_is_a_cut_gzip_stream_even_if_only_the_checksum_is_missing(self, tmp_path, keep):
        noise = np.random.default_rng(0).integers(0, 1000, SHAPE, dtype=np.int16)
        path = save_nifti(tmp_path / "cut.nii.gz", noise)
        data = path.read_bytes()
        path.write_bytes(data[:keep] if keep < 0 else data[: int(len(data) * keep)])
        with pytest.raises(CaseError, match=r"^cut.nii.gz: .*(truncated|damaged)"):
            read_volume(path)

    def test_that_has_a_wrong_checksum(self, tmp_path):
        path = save_nifti(tmp_path / "crc.nii.gz")
        data = bytearray(path.read_bytes())
        data[-6] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(CaseError, match="CRC check failed"):
            read_volume(path)

    @pytest.mark.parametrize("keep", [3, 100, 347, 352, 500])
    def test_that_is_cut_and_not_compressed(self, nii, keep):
        nii.write_bytes(nii.read_bytes()[:keep])
        with pytest.raises(CaseError, match=r"truncated|no NIfTI"):
            read_volume(nii)

    def test_that_is_text(self, tmp_path):
        (tmp_path / "text.nii").write_text("this is no image, " * 40)
        with pytest.raises(CaseError, match=r"^text.nii: this is no NIfTI file in spite of its name"):
            read_volume(tmp_path / "text.nii")

    def test_that_is_text_with_a_gzip_name(self, tmp_path):
        (tmp_path / "text.nii.gz").write_text("this is no image, " * 40)
        with pytest.raises(CaseError, match=r"^text.nii.gz: .*Not a gzipped file"):
            read_volume(tmp_path / "text.nii.gz")

    @pytest.mark.parametrize("name", ["scan.png", "scan.dcm", "scan", "scan.img", "scan.gz"])
    def test_and_anything_else_by_its_extension_with_the_list_of_what_is_read(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CaseError, match=r"expected one of .nii, .nii.gz, .nrrd, .mha, .mhd, or a folder"):
            read_volume(tmp_path / name)

    def test_never_names_the_folder(self, tmp_path):
        for name, content in (("a.nii", b"x"), ("a.nii.gz", b"x"), ("a.nrrd", b"NRRD0004\n\n"), ("a.mha", b"x")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CaseError) as raised:
                read_volume(tmp_path / name)
            assert str(raised.value).startswith(f"{name}: ")
            assert str(tmp_path) not in str(raised.value)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((5, 7), "2-D image of 5 x 7"),
            ((5, 7, 1), "a single slice"),
            ((1, 7, 9), "a single slice"),
            ((5, 7, 9, 4), "4 time points or channels"),
            ((5, 7, 9, 1), "4-D image of 5 x 7 x 9 x 1"),
            ((5, 7, 9, 1, 3), "5-D image"),
        ],
    )
    def test_that_is_not_three_dimensional(self, tmp_path, shape, message):
        array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        path = save_nifti(tmp_path / "a.nii.gz", array)
        for read in (read_volume, read_grid):
            with pytest.raises(GeometryError, match=message):
                read(path)

    def test_that_is_rgb(self, tmp_path):
        rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
        with pytest.raises(CaseError, match=r"colour voxels \(R, G, B\), expected one grey value"):
            read_volume(save_nifti(tmp_path / "a.nii.gz", rgb))

    def test_that_is_complex(self, tmp_path):
        with pytest.raises(CaseError, match=r"complex voxels.*magnitude"):
            read_volume(save_nifti(tmp_path / "a.nii.gz", ramp(np.complex64)))

    def test_that_has_an_unknown_data_type(self, nii):
        with pytest.raises(CaseError, match=r"^case.nii: "):
            read_volume(patch(nii, DATATYPE, 12345, "<i2"))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_that_is_not_finite(self, tmp_path, value):
        array = ramp(np.float32)
        array[1, 2, 3] = value
        with pytest.raises(CaseError, match=r"1 of 315 voxels not finite.*\(1, 2, 3\)"):
            read_volume(save_nifti(tmp_path / "a.nii.gz", array))

    def test_that_overflows_float32(self, tmp_path):
        array = ramp(np.float64)
        array[0, 0, 1] = 1e300
        with pytest.raises(CaseError, match="1 infinite"):
            read_volume(save_nifti(tmp_path / "a.nii.gz", array))

    def test_that_is_constant_unless_it_is_a_label(self, tmp_path):
        path = save_nifti(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype=np.uint8))
        with pytest.raises(CaseError, match=r"^a.nii.gz: found the same value 0 in all 315 voxels"):
            read_volume(path)
        assert not read_volume(path, allow_constant=True).array_xyz.any()

    @pytest.mark.parametrize("value", [0.0, -1.1, np.nan, np.inf, 1e-4, 1000.0])
    @pytest.mark.parametrize("axis", [1, 2, 3])
    def test_whose_raw_spacing_is_absurd_although_nibabel_mends_it(self, nii, value, axis):
        patch(nii, PIXDIM + 4 * axis, value, "<f4")
        for read in (read_volume, read_grid):
            with pytest.raises(GeometryError, match=r"found a voxel spacing of .* expected 0.001 to 100 mm"):
                read(nii)

    def test_whose_sform_is_singular(self, nii):
        patch(nii, SROW_X, np.zeros(12), "<f4")
        with pytest.raises(GeometryError, match="spacing of 0 x 0 x 0"):
            read_volume(nii)

    def test_that_is_sheared(self, tmp_path):
        matrix = affine() @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        with pytest.raises(GeometryError, match="off a right angle"):
            read_volume(save_nifti(tmp_path / "a.nii.gz", matrix=matrix, qform=0))

    def test_whose_two_affines_contradict_each_other(self, tmp_path):
        image = nib.Nifti1Image(ramp(), affine())
        image.set_sform(affine(), 2)
        image.set_qform(affine(origin=(0, 0, 0)), 1)
        nib.save(image, tmp_path / "a.nii.gz")
        # the reason to refuse: the two libraries put the image at different places
        assert sitk.ReadImage(str(tmp_path / "a.nii.gz")).GetOrigin() == (0, 0, 0)
        assert nib.load(tmp_path / "a.nii.gz").affine[0, 3] == -31.25
        with pytest.raises(GeometryError, match=r"qform and an sform that are 84 mm apart, .* at most 0.4 mm"):
            read_volume(tmp_path / "a.nii.gz")

    def test_whose_pixdim_contradicts_the_sform(self, tmp_path):
        nii = save_nifti(tmp_path / "a.nii", qform=0)
        patch(nii, PIXDIM + 4, [1.0, 1.0, 1.0], "<f4")
        assert sitk.ReadImage(str(nii)).GetSpacing() == (1, 1, 1)
        with pytest.raises(GeometryError, match=r"1 x 1 x 1 in pixdim and 0.8 x 1.1 x 2.5 mm in the sform"):
            read_volume(nii)

    @pytest.mark.parametrize(("code", "name"), [(1, "metre"), (3, "micrometre")])
    def test_that_is_not_in_millimetres(self, nii, code, name):
        with pytest.raises(GeometryError, match=f"found the unit {name} in the header, expected mm"):
            read_volume(patch(nii, XYZT_UNITS, code, "u1"))

    def test_that_is_larger_than_allowed_before_it_is_decompressed(self, tmp_path):
        path = save_nifti(tmp_path / "a.nii.gz")
        path.write_bytes(path.read_bytes()[:-8])  # decompressing it to the end would say "truncated"
        with pytest.raises(CaseError, match="5 x 7 x 9 = 315 voxels, expected at most 314"):
            read_volume(path, max_voxels=314)

    def test_that_announces_voxels_it_cannot_hold(self, nii):
        packed = nii.with_suffix(".nii.gz")
        packed.write_bytes(gzip.compress(patch(nii, DIM + 2, [1200, 1200, 1200], "<i2").read_bytes()))
        with pytest.raises(CaseError, match=r"bytes cannot hold the 3456000352 bytes that the header announces"):
            read_volume(packed)

    def test_that_unpacks_to_more_than_it_announces(self, nii):
        packed = nii.with_suffix(".nii.gz")
        packed.write_bytes(gzip.compress(nii.read_bytes() + bytes(50_000_000)))
        with pytest.raises(CaseError, match="more data than the 630 bytes that the header announces"):
            read_volume(packed)

    def test_that_is_an_analyze_header(self, nii):
        with pytest.raises(CaseError, match="Analyze or two-file"):
            read_volume(patch(nii, 344, [0], "<i4"))

    @pytest.mark.parametrize("sizes", [[3, -5, 7, 9], [3, 0, 7, 9], [0, 5, 7, 9], [99, 5, 7, 9]])
    def test_whose_size_is_nonsense(self, nii, sizes):
        with pytest.raises(CaseError, match=r"^case.nii: "):
            read_volume(patch(nii, DIM, sizes, "<i2"))

    @pytest.mark.parametrize("offset", [-1000.0, np.nan, 1e30, 100.0])
    def test_whose_data_offset_is_nonsense(self, nii, offset):
        with pytest.raises(CaseError, match=r"^case.nii: "):
            read_volume(patch(nii, VOX_OFFSET, offset, "<f4"))


class TestReadingWithItk:
    @pytest.mark.parametrize("extension", [".nrrd", ".mha", ".mhd"])
    @pytest.mark.parametrize("compress", [False, True])
    def test_gives_the_voxels_and_grid_of_what_itk_wrote(self, tmp_path, grid, extension, compress):
        path = tmp_path / f"a{extension}"
        sitk.WriteImage(to_sitk(Volume(ramp(), grid)), str(path), compress)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array_xyz, ramp())
        assert volume.array_xyz.dtype == np.int16
        assert same_grid(volume.grid, grid)
        assert same_grid(read_grid(path), grid)

    def test_understands_a_nrrd_in_ras(self, tmp_path, grid):
        header = {
            "space": "right-anterior-superior",
            "space directions": grid.affine_ras[:3, :3].T,
            "space origin": grid.affine_ras[:3, 3],
        }
        nrrd.write(str(tmp_path / "a.nrrd"), ramp(), header)
        assert same_grid(read_volume(tmp_path / "a.nrrd").grid, grid)

    def test_makes_float64_float32(self, tmp_path):
        nrrd.write(str(tmp_path / "a.nrrd"), ramp(np.float64), {"space": "LPS", "space directions": np.eye(3)})
        assert read_volume(tmp_path / "a.nrrd").array_xyz.dtype == np.float32

    def test_warns_about_a_nrrd_without_a_space(self, tmp_path, caplog):
        nrrd.write(str(tmp_path / "a.nrrd"), ramp(), {"spacings": SPACING})
        with caplog.at_level(logging.WARNING, "mshub"):
            assert read_volume(tmp_path / "a.nrrd").grid.spacing_xyz_mm == SPACING
        assert "names no space" in caplog.text

    @pytest.mark.parametrize("extension", [".nrrd", ".mha", ".mhd"])
    @pytest.mark.parametrize("compress", [False, True])
    def test_refuses_half_a_file(self, tmp_path, grid, extension, compress):
        path = tmp_path / f"a{extension}"
        noise = np.random.default_rng(0).integers(0, 1000, SHAPE, dtype=np.int16)
        sitk.WriteImage(to_sitk(Volume(noise, grid)), str(path), compress)
        data = path if extension != ".mhd" else path.with_suffix(".zraw" if compress else ".raw")
        data.write_bytes(data.read_bytes()[:-200])
        with pytest.raises(CaseError, match=rf"^a{extension}: .*damaged"):
            read_volume(path)

    @pytest.mark.parametrize("extension", [".mha", ".mhd"])
    def test_refuses_a_metaimage_that_itk_would_decompress_to_garbage(self, tmp_path, grid, extension):
        path = tmp_path / f"a{extension}"
        noise = np.random.default_rng(0).integers(0, 1000, SHAPE, dtype=np.int16)
        sitk.WriteImage(to_sitk(Volume(noise, grid)), str(path), True)
        data = path if extension == ".mha" else path.with_suffix(".zraw")
        content = bytearray(data.read_bytes())
        content[-200] ^= 0xFF
        data.write_bytes(content)
        sitk.ReadImage(str(path))  # no error from ITK: the reason for our own check
        with pytest.raises(CaseError, match="damaged"):
            read_volume(path)

    @pytest.mark.parametrize(
        ("pixel", "message"),
        [(sitk.sitkVectorUInt8, "3 components per voxel"), (sitk.sitkVectorFloat32, "3 components per voxel")],
    )
    @pytest.mark.parametrize("extension", [".nrrd", ".mha"])
    def test_refuses_colour(self, tmp_path, pixel, message, extension):
        sitk.WriteImage(sitk.Image(SHAPE, pixel, 3), str(tmp_path / f"a{extension}"))
        with pytest.raises(CaseError, match=message):
            read_volume(tmp_path / f"a{extension}")

    @pytest.mark.parametrize("extension", [".nrrd", ".mha"])
    def test_refuses_pictures_and_films(self, tmp_path, extension):
        path = tmp_path / f"a{extension}"
        for size, message in (((5, 7), "2-D"), ((5, 7, 9, 3), r"3 time points"), ((5, 7, 1), "single slice")):
            sitk.WriteImage(sitk.Image(size, sitk.sitkInt16), str(path))
            with pytest.raises(GeometryError, match=message):
                read_volume(path)

    def test_refuses_a_sheared_nrrd(self, tmp_path):
        header = {"space": "LPS", "space directions": [[1, 0, 0], [0.3, 1, 0], [0, 0, 2]], "space origin": [0, 0, 0]}
        nrrd.write(str(tmp_path / "a.nrrd"), ramp(), header)
        with pytest.raises(GeometryError, match="off a right angle"):
            read_volume(tmp_path / "a.nrrd")

    def test_refuses_a_spacing_of_zero(self, tmp_path):
        header = {"space": "LPS", "space directions": [[1, 0, 0], [0, 0, 0], [0, 0, 2]], "space origin": [0, 0, 0]}
        nrrd.write(str(tmp_path / "a.nrrd"), ramp(), header)
        for read in (read_volume, read_grid):
            with pytest.raises(CaseError, match="spacing of 1 x 0 x 2 mm"):
                read(tmp_path / "a.nrrd")

    @pytest.mark.parametrize("extension", [".nrrd", ".mha", ".mhd"])
    def test_refuses_text_in_disguise(self, tmp_path, extension):
        (tmp_path / f"a{extension}").write_text("hello")
        with pytest.raises(CaseError, match=rf"^a{extension}: "):
            read_volume(tmp_path / f"a{extension}")

    def test_refuses_a_nrrd_that_points_to_another_file(self, tmp_path):
        nrrd.write(str(tmp_path / "a.nhdr"), ramp(), {"space": "LPS", "space directions": np.eye(3)})
        path = (tmp_path / "a.nhdr").rename(tmp_path / "a.nrrd")
        with pytest.raises(CaseError, match=r"voxels are in 'a.raw.gz', expected them in the file itself"):
            read_volume(path)

    @pytest.mark.parametrize("extension", [".mha", ".mhd"])
    @pytest.mark.parametrize("named", ["../other/a.raw", "LIST", "slice%03d.raw 1 9 1"])
    def test_refuses_a_metaimage_that_points_elsewhere(self, tmp_path, grid, extension, named):
        path = tmp_path / "here" / f"a{extension}"
        path.parent.mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.raw").write_bytes(ramp().tobytes())
        sitk.WriteImage(to_sitk(Volume(ramp(), grid)), str(tmp_path / "a.mhd"))
        header = (tmp_path / "a.mhd").read_text()
        path.write_text(header.replace("a.raw", named))
        with pytest.raises(CaseError, match="expected them in the file itself"):
            read_volume(path)

    def test_is_not_fooled_by_a_blank_line_or_another_case_before_the_real_pointer(self, tmp_path, grid):
        (tmp_path / "secret").write_bytes(ramp().tobytes())
        sitk.WriteImage(to_sitk(Volume(ramp(), grid)), str(tmp_path / "a.mhd"))
        header = (tmp_path / "a.mhd").read_text()
        (tmp_path / "b.mha").write_text("\nelementdatafile = LOCAL\n" + header.replace("a.raw", "secret"))
        with pytest.raises(CaseError, match=r"voxels are in 'secret'"):
            read_volume(tmp_path / "b.mha")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("DimSize = 5 7 9", "DimSize = 5 7"),
            ("DimSize = 5 7 9", "DimSize = 5 7 nine"),
            ("NDims = 3", "NDims = 9"),
            ("NDims = 3\n", ""),
            ("Offset = ", "Offset = 1 "),
            ("TransformMatrix = ", "TransformMatrix = \x01"),
            ("ElementType = MET_SHORT", "ElementType = " + "X" * 500),
            ("CompressedDataSize = ", "CompressedDataSize = x"),
        ],
    )
    def test_refuses_malformed_metaimage_headers_that_could_crash_itk(self, tmp_path, grid, old, new):
        path = tmp_path / "a.mha"
        sitk.WriteImage(to_sitk(Volume(ramp(), grid)), str(path), True)
        data = path.read_bytes()
        assert old.encode() in data
        path.write_bytes(data.replace(old.encode(), new.encode(), 1))
        with pytest.raises(CaseError, match=r"^a.mha: .*(header|2-D|damaged)"):
            read_volume(path)

    def test_reads_a_metaimage_header_written_by_hand(self, tmp_path):
        lines = ["NDims = 3", "DimSize = 5 7 9", "ElementSpacing = 0.8 1.1 2.5", "Offset = 1 2 3"]
        lines += ["ElementType = MET_SHORT", "ElementByteOrderMSB = False", "ElementDataFile = a.raw", ""]
        (tmp_path / "a.mhd").write_text("\r\n".join(lines), newline="")
        (tmp_path / "a.raw").write_bytes(ramp().tobytes(order="F"))
        volume = read_volume(tmp_path / "a.mhd")
        np.testing.assert_array_equal(volume.array_xyz, ramp())
        assert volume.grid.affine_ras[:3, 3].tolist() == [-1, -2, 3]

    def test_limits_the_number_of_voxels(self, tmp_path, grid):
        write_nrrd(tmp_path / "a.nrrd", ramp(), grid)
        with pytest.raises(CaseError, match="expected at most 100"):
            read_volume(tmp_path / "a.nrrd", max_voxels=100)


class TestWriting:
    @pytest.mark.parametrize("directions", every_orientation())
    def test_a_nifti_read_and_written_as_nrrd_keeps_every_point_for_simpleitk(self, tmp_path, directions):
        source = save_nifti(tmp_path / "a.nii.gz", matrix=affine(directions))
        volume = read_volume(source)
        write_nrrd(tmp_path / "a.nrrd", volume.array_xyz, volume.grid)
        image = sitk.ReadImage(str(tmp_path / "a.nrrd"))
        for index in [(0, 0, 0), (4, 0, 0), (0, 6, 0), (0, 0, 8), (3, 2, 7)]:
            ras = nib.affines.apply_affine(nib.load(source).affine, index)
            lps = image.TransformIndexToPhysicalPoint(index)
            np.testing.assert_allclose(lps, ras * [-1, -1, 1], rtol=0, atol=1e-4)
            assert image[index] == ramp()[index]

    @pytest.mark.parametrize("directions", every_orientation())
    def test_nifti_is_at_one_place_for_nibabel_and_simpleitk(self, tmp_path, directions):
        grid = Grid(SHAPE, affine(directions))
        write_nifti(tmp_path / "a.nii.gz", ramp(np.uint8), grid)
        loaded, image = nib.load(tmp_path / "a.nii.gz"), sitk.ReadImage(str(tmp_path / "a.nii.gz"))
        np.testing.assert_allclose(loaded.affine, grid.affine_ras, rtol=0, atol=1e-5)
        np.testing.assert_allclose(loaded.get_qform(), grid.affine_ras, rtol=0, atol=1e-2)
        assert (loaded.header["qform_code"], loaded.header["sform_code"]) == (1, 1)
        ras = nib.affines.apply_affine(grid.affine_ras, (3, 2, 7))
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((3, 2, 7)), ras * [-1, -1, 1], atol=1e-4)
        assert image[3, 2, 7] == ramp(np.uint8)[3, 2, 7]
        assert same_grid(read_grid(tmp_path / "a.nii.gz"), grid)

    @pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".nrrd"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32])
    def test_keeps_dtype_values_and_grid(self, tmp_path, grid, extension, dtype):
        path = tmp_path / f"a{extension}"
        write_volume(path, ramp(dtype), grid)
        image = sitk.ReadImage(str(path))
        array_zyx = sitk.GetArrayFromImage(image)
        assert array_zyx.dtype == dtype
        np.testing.assert_array_equal(array_zyx, ramp(dtype).transpose(2, 1, 0))
        assert same_grid(read_volume(path).grid, grid)

    @pytest.mark.parametrize("compress", [False, True])
    def test_nrrd_reads_back_with_pynrrd(self, tmp_path, grid, compress):
        write_volume(tmp_path / "a.nrrd", ramp(np.uint16), grid, compress=compress)
        array, header = nrrd.read(str(tmp_path / "a.nrrd"))
        np.testing.assert_array_equal(array, ramp(np.uint16))
        assert header["space"] == "left-posterior-superior"
        assert header["kinds"] == ["domain"] * 3
        assert header["encoding"] == ("gzip" if compress else "raw")
        np.testing.assert_array_equal(header["space directions"].T * [[-1], [-1], [1]], grid.affine_ras[:3, :3])
        np.testing.assert_array_equal(header["space origin"] * [-1, -1, 1], grid.affine_ras[:3, 3])

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_raw_nrrd_is_bytes_with_x_fastest_for_a_client_that_ignores_the_header(self, tmp_path, grid, order):
        array = np.array(ramp(np.uint8), order=order)
        write_nrrd(tmp_path / "a.nrrd", array, grid, compress=False)
        header, data = (tmp_path / "a.nrrd").read_bytes().split(b"\n\n", 1)
        assert header.startswith(b"NRRD000")
        assert b"\ntype: unsigned char\n" in header
        assert len(data) == 5 * 7 * 9
        assert list(data[:6]) == [*array[:, 0, 0], array[0, 1, 0]]

    def test_big_endian_arrays_become_little_endian(self, tmp_path, grid):
        write_nrrd(tmp_path / "a.nrrd", ramp(np.dtype(">i2")), grid)
        np.testing.assert_array_equal(nrrd.read(str(tmp_path / "a.nrrd"))[0], ramp())

    @pytest.mark.parametrize("extension", [".nii.gz", ".nrrd"])
    def test_boolean_masks_become_uint8(self, tmp_path, grid, extension):
        write_volume(tmp_path / f"a{extension}", ramp() > 100, grid)
        assert read_volume(tmp_path / f"a{extension}").array_xyz.dtype == np.uint8

    @pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".nrrd"])
    def test_is_reproducible_and_leaves_nothing_beside(self, tmp_path, grid, extension):
        written = []
        for _ in range(2):
            write_volume(tmp_path / f"a{extension}", ramp(), grid)
            written.append((tmp_path / f"a{extension}").read_bytes())
        assert written[0] == written[1]
        assert [entry.name for entry in tmp_path.iterdir()] == [f"a{extension}"]

    @pytest.mark.parametrize("extension", [".nii.gz", ".nrrd"])
    def test_keeps_the_old_file_when_it_fails_half_way(self, tmp_path, grid, extension, monkeypatch):
        path = tmp_path / f"a{extension}"
        write_volume(path, ramp(), grid)
        before = path.read_bytes()

        def disk_full(_):
            raise OSError("no space left on device")

        monkeypatch.setattr("os.fsync", disk_full)
        with pytest.raises(OSError, match="no space left"):
            write_volume(path, ramp(np.uint8), grid)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_refuses_an_array_of_another_shape(self, tmp_path, grid):
        for extension in (".nii.gz", ".nrrd"):
            with pytest.raises(GeometryError, match="found an array of 9 x 7 x 5"):
                write_volume(tmp_path / f"a{extension}", ramp().T, grid)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("dtype", [np.float16, np.complex64])
    def test_refuses_a_dtype_that_readers_do_not_take(self, tmp_path, grid, dtype):
        with pytest.raises(CaseError, match="cannot write"):
            write_volume(tmp_path / "a.nrrd", ramp(dtype), grid)

    def test_refuses_other_extensions(self, tmp_path, grid):
        with pytest.raises(CaseError, match=r"a.mha: cannot write .mha, expected one of .nii, .nii.gz, .nrrd"):
            write_volume(tmp_path / "a.mha", ramp(), grid)


class TestRealImages:
    @pytest.mark.parametrize("name", ["example_ct", "example_ct_sm", "example_mr_sm", "example_seg"])
    def test_torso_agrees_with_nibabel_and_simpleitk(self, name):
        path = real_image(f"ct_torso/{name}.nii.gz")
        volume, expected = read_volume(path), nib.load(path)
        np.testing.assert_array_equal(volume.array_xyz, np.asanyarray(expected.dataobj))
        np.testing.assert_array_equal(volume.grid.affine_ras, expected.affine)
        image = sitk.ReadImage(str(path))
        ours = to_sitk(volume)
        last = tuple(size - 1 for size in image.GetSize())
        np.testing.assert_allclose(
            ours.TransformIndexToPhysicalPoint(last), image.TransformIndexToPhysicalPoint(last), rtol=0, atol=1e-3
        )

    def test_every_hippocampus_scan_and_label_is_accepted_and_on_one_grid(self):
        folder = real_image("hippocampus/imagesTr")
        scans = sorted(folder.glob("*.nii.gz"))
        assert len(scans) > 100
        for scan in scans:
            label = folder.parent / "labelsTr" / scan.name.replace("_0000", "")
            assert same_grid(read_volume(scan).grid, read_volume(label).grid)
