"""Images kept ready for the network: never read or prepared twice, never another image's, never more than allowed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from factories import make_image, make_model_folder
from mshub.card_tables import InputRules
from mshub.errors import CaseError
from mshub.geometry import Grid
from mshub.nnunet import predictor as predictor_module
from mshub.nnunet.engine import Engine
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.image_cache import ImageCache, PreparedImage, image_key
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.predictor import PROFILES, NNUNetPredictor, PredictOptions

SHAPE = (29, 23, 14)
CPU = PredictOptions(PROFILES["balanced"], device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    parent = tmp_path_factory.mktemp("models")
    options = {"one": {}, "same plans": {"seed": 5}, "other spacing": {"spacing_zyx_mm": (2.5, 2, 2)}}
    return {name: ModelFolder.open(make_model_folder(parent / name, **more)) for name, more in options.items()}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "image.nii.gz", SHAPE)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often something was read and prepared."""
    counts = {"read": 0, "preprocess": 0}

    def counted(owner: object, name: str, what: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def call(*arguments: object) -> object:
            counts[what] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    counted(predictor_module, "read_channels", "read")
    counted(Engine, "preprocess", "preprocess")
    return counts


def prepared(megabytes: float = 1) -> PreparedImage:
    data = np.zeros(int(megabytes * 2**20), np.uint8)
    return PreparedImage(data, {}, Grid((4, 5, 6), np.eye(4)))


def test_a_second_request_neither_reads_nor_prepares(
    folders: dict[str, ModelFolder], image: Path, work: dict[str, int]
) -> None:
    networks, images = NetworkCache(), ImageCache(2**30)
    alone = NNUNetPredictor(folders["one"], NetworkCache()).predict([image], CPU)
    first = NNUNetPredictor(folders["one"], networks, images).predict([image], CPU)
    assert work == {"read": 2, "preprocess": 2}
    again = NNUNetPredictor(folders["one"], networks, images).predict([image], CPU)
    assert work == {"read": 2, "preprocess": 2}
    for prediction in (first, again):
        np.testing.assert_array_equal(prediction.labels.array_xyz, alone.labels.array_xyz)
        np.testing.assert_array_equal(prediction.labels.grid.affine_ras, alone.labels.grid.affine_ras)
    NNUNetPredictor(folders["one"], networks, images).measure([image], CPU)
    assert work["preprocess"] == 2


def test_a_model_of_the_same_plans_shares_it_and_another_does_not(
    folders: dict[str, ModelFolder], image: Path, work: dict[str, int]
) -> None:
    networks, images = NetworkCache(), ImageCache(2**30)
    for name, times in (("one", 1), ("same plans", 1), ("other spacing", 2), ("one", 2)):
        found = NNUNetPredictor(folders[name], networks, images).predict([image], CPU)
        assert work["preprocess"] == times
        expected = NNUNetPredictor(folders[name], NetworkCache()).predict([image], CPU)
        work["preprocess"] -= 1
        np.testing.assert_array_equal(found.labels.array_xyz, expected.labels.array_xyz)


def test_an_image_that_was_replaced_is_another(
    folders: dict[str, ModelFolder], image: Path, tmp_path: Path, work: dict[str, int]
) -> None:
    predictor = NNUNetPredictor(folders["one"], NetworkCache(), ImageCache(2**30))
    before = predictor.predict([image], CPU)
    nib.save(nib.load(make_image(tmp_path / "other.nii.gz", SHAPE, seed=3)), image)
    after = predictor.predict([image], CPU)
    assert work["preprocess"] == 2
    assert (before.labels.array_xyz != after.labels.array_xyz).any()


def test_what_is_done_before_the_network_sees_it_is_part_of_the_key(
    folders: dict[str, ModelFolder], image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "copy.nii.gz"
    shutil.copy(image, other)
    keys = [
        image_key([image], InputRules(), folders["one"]),
        image_key([image], InputRules(clip=(-100.0, 100.0)), folders["one"]),
        image_key([image], InputRules(orientation="RAS"), folders["one"]),
        image_key([image], InputRules(), folders["other spacing"]),
        image_key([other], InputRules(), folders["one"]),
        image_key([image, other], InputRules(), folders["one"]),
        image_key([other, image], InputRules(), folders["one"]),
    ]
    assert len(set(keys)) == len(keys)
    assert image_key([image], InputRules(), folders["same plans"]) == keys[0]


def test_a_file_added_to_a_series_makes_it_another(folders: dict[str, ModelFolder], tmp_path: Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"slice")
    before = image_key([series], InputRules(), folders["one"])
    assert image_key([series], InputRules(), folders["one"]) == before
    (series / "2.dcm").write_bytes(b"slice")
    assert image_key([series], InputRules(), folders["one"]) != before


def test_the_one_used_longest_ago_is_dropped_first() -> None:
    cache = ImageCache(int(2.5 * 2**20))
    for name in "ab":
        cache.get_or_make(name, prepared)
    assert cache.get("a")
    cache.get_or_make("c", prepared)
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]
    assert cache.get_or_make("huge", lambda: prepared(3)).data.nbytes == 3 * 2**20
    assert cache.get("huge") is None


def test_images_that_are_gone_or_changed_are_forgotten(folders: dict[str, ModelFolder], tmp_path: Path) -> None:
    cache, rules = ImageCache(2**24), InputRules()
    paths = {name: make_image(tmp_path / f"{name}.nii.gz", (5, 6, 7)) for name in ("kept", "gone", "changed")}
    keys = {name: image_key([path], rules, folders["one"]) for name, path in paths.items()}
    for key in keys.values():
        cache.get_or_make(key, prepared)
    assert cache.forget_gone() == ""
    paths["gone"].unlink()
    make_image(paths["changed"], (5, 6, 8))
    assert cache.forget_gone() == "2 prepared image(s) of files that are gone"
    assert [name for name, key in keys.items() if cache.get(key) is not None] == ["kept"]


def test_nothing_is_kept_without_memory_for_it() -> None:
    cache = ImageCache(0)
    assert cache.get_or_make("a", prepared)
    assert cache.get("a") is None


def test_many_threads_never_keep_more_than_allowed() -> None:
    cache = ImageCache(4 * 2**20)

    def use(first: int) -> None:
        for number in range(200):
            cache.get_or_make(str((first * 7 + number * 3) % 20), prepared)

    threads = [threading.Thread(target=use, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < sum(cache.get(str(number)) is not None for number in range(20)) <= 4


def test_a_missing_image_is_refused_as_ever(folders: dict[str, ModelFolder], tmp_path: Path) -> None:
    predictor = NNUNetPredictor(folders["one"], NetworkCache(), ImageCache(2**30))
    for _ in range(2):
        with pytest.raises(CaseError, match="no such file"):
            predictor.predict([tmp_path / "missing.nii.gz"], CPU)
