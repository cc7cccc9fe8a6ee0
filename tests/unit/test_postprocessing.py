"""What nnU-Net v1 keeps of a finished label map: the rules in its file, and what it itself made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mshub.errors import ModelFolderError
from mshub.nnunet.folder import ModelFolder
from mshub.nnunet.network_cache import NetworkCache
from mshub.nnunet.postprocessing import KEEP_LARGEST, keep_largest, read_v1_rules
from mshub.nnunet.predictor import NNUNetPredictor, PredictOptions
from mshub.nnunet.v1_conversion import convert_v1_folder
from v1_components import CLASSES, SETTINGS, SPACING_ZYX_MM, component_map, write_postprocessing
from v1_models import MODELS, write_v1_folder, write_v1_images

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "v1_golden.npz"
VOXEL_MM3 = float(np.prod(SPACING_ZYX_MM))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_components_v1_keeps_are_kept(setting: str, tmp_path: Path) -> None:
    rules = read_v1_rules(write_postprocessing(tmp_path / "postprocessing.json", setting), CLASSES)
    before = component_map()
    with np.load(RECORDED) as golden:
        expected = golden[f"components_{setting}"]
    np.testing.assert_array_equal(keep_largest(before, rules, VOXEL_MM3), expected)
    np.testing.assert_array_equal(before, component_map(), "the input is left as it was")


def test_the_settings_differ_from_each_other_or_they_prove_little() -> None:
    with np.load(RECORDED) as golden:
        results = {golden[f"components_{setting}"].tobytes() for setting in SETTINGS}
    assert len(results) >= len(SETTINGS) - 2, "two pairs are one in v1: each and all, nothing and one size"


def test_a_label_map_without_the_structure_is_left_as_it_is() -> None:
    empty = np.zeros((3, 4, 5), np.uint8)
    np.testing.assert_array_equal(keep_largest(empty, [{"classes": [1], "minimum_mm3": None}], 1.0), empty)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"for_which_classes": 3}',
        '{"for_which_classes": [0]}',
        '{"for_which_classes": [[]]}',
        '{"for_which_classes": [5]}',
        '{"for_which_classes": ["1"]}',
        '{"for_which_classes": [1], "min_valid_object_sizes": "{2: 3.0}"}',
        '{"for_which_classes": [1], "min_valid_object_sizes": "__import__(\'os\')"}',
        '{"for_which_classes": [1], "min_valid_object_sizes": 4}',
    ],
)
def test_a_file_v1_did_not_write_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text(text)
    with pytest.raises(ModelFolderError, match=r"postprocessing\.json is not as nnU-Net v1 writes it"):
        read_v1_rules(path, CLASSES)


def test_a_converted_release_keeps_to_it_and_predicts_with_it(tmp_path: Path) -> None:
    model = MODELS["sagittal"]
    release = write_v1_folder(tmp_path / "v1", model)
    images = write_v1_images(tmp_path, "sagittal", model)
    plain = _predicted(release, tmp_path / "plain", images)
    content: dict[str, Any] = {"for_which_classes": [1, 2]}
    (release / "postprocessing.json").write_text(str(content).replace("'", '"'))
    kept = _predicted(release, tmp_path / "kept", images)
    rules = ModelFolder.open(tmp_path / "kept").keeps_largest
    assert rules == [{"classes": [1], "minimum_mm3": None}, {"classes": [2], "minimum_mm3": None}]
    assert KEEP_LARGEST not in ModelFolder.open(tmp_path / "plain").plans
    np.testing.assert_array_equal(kept, keep_largest(plain, rules, 1.0))
    assert np.count_nonzero(kept != plain) > 0


def _predicted(release: Path, target: Path, images: list[Path]) -> np.ndarray[Any, Any]:
    convert_v1_folder(release, target)
    predictor = NNUNetPredictor(ModelFolder.open(target), NetworkCache())
    return predictor.predict(images, PredictOptions(device="cpu")).labels.array_xyz
