"""How sure a model was, as it is kept and read back."""

from __future__ import annotations

import json

import pytest

from mshub.uncertainty import StructureUncertainty, Uncertainty

LIVER = StructureUncertainty(1500.123456, mirror_dice=0.9, soft_dice=0.95, entropy=0.05)
LESION = StructureUncertainty(3.0, mirror_dice=0.4, fold_dice=0.3, soft_dice=0.8, entropy=0.3)
ABSENT = StructureUncertainty(0.0)
FOUND = Uncertainty({"liver": LIVER, "lesion": LESION, "spleen": ABSENT}, 0.1, 0.4, (0.25, -1.5))


def test_it_comes_back_from_json_as_it_was() -> None:
    stored = json.loads(json.dumps(FOUND.as_dict()))
    again = Uncertainty.from_dict(stored)
    assert again.as_dict() == FOUND.as_dict()
    assert again.structures["lesion"] == LESION
    assert again.embedding == FOUND.embedding


def test_without_its_embedding_it_is_small() -> None:
    stored = FOUND.as_dict(embedding=False)
    assert "embedding" not in stored
    assert Uncertainty.from_dict(stored).embedding == ()


def test_means_are_over_the_structures_that_were_measured() -> None:
    assert FOUND.mirror_dice == pytest.approx(0.65)
    assert FOUND.fold_dice == pytest.approx(0.3)
    assert FOUND.soft_dice == pytest.approx(0.875)
    assert FOUND.agreement == pytest.approx((0.9 + 0.35) / 2), "folds and copies count alike"
    assert FOUND.empty == ("spleen",)


def test_where_nothing_was_found_nothing_agrees() -> None:
    nothing = Uncertainty({"liver": ABSENT, "spleen": ABSENT})
    assert (nothing.agreement, nothing.mirror_dice, nothing.soft_dice) == (0.0, None, None)
    assert nothing.empty == ("liver", "spleen")


def test_numbers_are_rounded_not_the_names() -> None:
    assert FOUND.as_dict()["structures"]["liver"]["volume_ml"] == 1500.12346
