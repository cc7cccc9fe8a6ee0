"""Recipes: what clients may set, what is refused, and the learning rate of every step."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from mshub.errors import ConfigError
from mshub.recipe import FROM_SCRATCH, Recipe

EVERYTHING: dict[str, Any] = {
    "epochs": 7,
    "iterations": 3,
    "optimiser": "sgd",
    "learning_rate": 2e-4,
    "warm_up": 0.25,
    "weight_decay": 1e-2,
    "foreground": 0.75,
    "averaging": 0.0,
    "guard": "distil",
    "distillation": 1.5,
    "interpolation": 0.4,
    "folds": ("0", "3", "all"),
    "batch_size": 5,
    "seed": 42,
}
LIMITS = [
    ("epochs", 1, 10_000, 1),
    ("iterations", 1, 10_000, 1),
    ("learning_rate", 1e-9, 100.0, 1e-10),
    ("warm_up", 0.0, 0.9, 1e-6),
    ("weight_decay", 0.0, 1.0, 1e-6),
    ("foreground", 0.0, 1.0, 1e-6),
    ("averaging", 0.0, 1.0, 1e-6),
    ("distillation", 0.0, 100.0, 1e-6),
    ("interpolation", 0.0, 1.0, 1e-6),
    ("seed", 0, 2**31 - 1, 1),
]


# -- what clients may set -----------------------------------------------------------------------------------------


def test_without_options_the_defaults_are_taken() -> None:
    assert Recipe.from_options({}) == Recipe()


def test_every_option_can_be_set() -> None:
    assert set(EVERYTHING) == {field.name for field in fields(Recipe)}
    recipe = Recipe.from_options(EVERYTHING)
    for name, value in EVERYTHING.items():
        assert getattr(recipe, name) == value != getattr(Recipe(), name)


def test_text_of_clients_becomes_numbers() -> None:
    texts = {name: str(value) for name, value in EVERYTHING.items() if name != "folds"}
    recipe = Recipe.from_options({**texts, "folds": "0, 3,all"})
    assert recipe == Recipe(**EVERYTHING)
    assert [type(value) for value in (recipe.epochs, recipe.learning_rate, recipe.batch_size)] == [int, float, int]


@pytest.mark.parametrize("unset", [None, "", ()])
def test_none_and_empty_text_leave_what_there_was(unset: object) -> None:
    assert Recipe.from_options(dict.fromkeys(EVERYTHING, unset)) == Recipe()
    assert Recipe.from_options(dict.fromkeys(EVERYTHING, unset), Recipe(**EVERYTHING)) == Recipe(**EVERYTHING)


@pytest.mark.parametrize("zero", [0, "0", 0.0])
def test_zero_is_a_value_and_not_unset(zero: object) -> None:
    assert Recipe.from_options({"averaging": zero, "warm_up": zero}) == replace(Recipe(), averaging=0.0, warm_up=0.0)


def test_a_base_is_changed_only_where_it_was_asked_for() -> None:
    recipe = Recipe.from_options({"epochs": 3, "guard": ""}, FROM_SCRATCH)
    assert recipe == replace(FROM_SCRATCH, epochs=3)
    assert FROM_SCRATCH.epochs == 200


@pytest.mark.parametrize(
    ("given", "folds"),
    [
        ("0", ("0",)),
        ("0,1", ("0", "1")),
        (" 2 , all ,", ("2", "all")),
        ([0, 1], ("0", "1")),
        (["4"], ("4",)),
        ("1,0,1", ("1", "0")),
        ([], ()),
        (" , ", ()),
    ],
)
def test_folds_may_be_text_or_a_list(given: object, folds: tuple[str, ...]) -> None:
    assert Recipe.from_options({"folds": given}).folds == folds


def test_whole_numbers_may_come_as_floats() -> None:
    epochs = Recipe.from_options({"epochs": 4.0}).epochs
    assert (epochs, type(epochs)) == (4, int)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("epoch", "epochs"), ("learningrate", "learning_rate"), ("optimizer", "optimiser"), ("batchsize", "batch_size")],
)
def test_an_unknown_option_names_the_closest_known_one(key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=rf"no '{key}'\. Did you mean {suggestion}\? Known: averaging, batch_size"):
        Recipe.from_options({key: 1})


def test_an_option_like_no_other_is_refused_with_all_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no 'xyz'\. Known: ") as refused:
        Recipe.from_options({"xyz": 1})
    assert all(name in str(refused.value) for name in EVERYTHING)


def test_an_unknown_option_that_is_not_set_does_no_harm() -> None:
    assert Recipe.from_options({"xyz": None, "pretrained": ""}) == Recipe()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "many"),
        ("epochs", "2.5"),
        ("epochs", 2.5),
        ("epochs", math.nan),
        ("epochs", math.inf),
        ("epochs", True),
        ("epochs", [3]),
        ("learning_rate", "1e-3 or so"),
        ("learning_rate", "nan"),
        ("learning_rate", math.inf),
        ("learning_rate", 0),
        ("learning_rate", False),
        ("learning_rate", {"a": 1}),
        ("batch_size", "two"),
        ("batch_size", 0),
        ("batch_size", -1),
        ("guard", "distill"),
        ("guard", 1),
        ("guard", ["distil"]),
        ("optimiser", "SGD"),
        ("folds", 0),
        ("seed", "x"),
    ],
)
def test_an_impossible_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"The recipe's {key} is "):
        Recipe.from_options({key: value})


def test_a_choice_that_is_none_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"guard is 'hope': expected one of distil, interpolate, both, none"):
        Recipe.from_options({"guard": "hope"})


@pytest.mark.parametrize(("name", "low", "high", "step"), LIMITS, ids=[limit[0] for limit in LIMITS])
def test_values_at_their_limits_are_taken_and_those_beyond_refused(
    name: str, low: float, high: float, step: float
) -> None:
    for value in (low, high, str(low), str(high)):
        assert getattr(Recipe.from_options({name: value}), name) == float(value)
    for value in (low - step, high + step):
        with pytest.raises(ConfigError, match=rf"The recipe's {name} is .*; expected {low:g} to "):
            Recipe.from_options({name: value})


def test_every_number_has_a_limit() -> None:
    limited = {name for name, *_ in LIMITS}
    assert {field.name for field in fields(Recipe)} - limited == {"optimiser", "guard", "folds", "batch_size"}


def test_a_batch_may_be_of_one() -> None:
    assert Recipe.from_options({"batch_size": "1"}).batch_size == 1


def test_a_bad_value_in_the_base_is_found_too() -> None:
    with pytest.raises(ConfigError, match="epochs is 0"):
        Recipe.from_options({"seed": 1}, Recipe(epochs=0))


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().epochs = 3  # type: ignore[misc]


# -- what is written down -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), FROM_SCRATCH, Recipe(**EVERYTHING), Recipe(batch_size=None, folds=()), Recipe(folds=("all",))],
    ids=["defaults", "from scratch", "everything", "nothing", "one fold"],
)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    stored = json.loads(json.dumps(recipe.as_dict()))
    assert set(stored) == set(EVERYTHING)
    assert Recipe.from_options(stored) == recipe


# -- what follows from it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "distils", "interpolates"),
    [("distil", True, False), ("interpolate", False, True), ("both", True, True), ("none", False, False)],
)
def test_guards_are_what_their_names_say(guard: str, distils: bool, interpolates: bool) -> None:
    recipe = Recipe.from_options({"guard": guard})
    assert (recipe.distils, recipe.interpolates) == (distils, interpolates)


def test_a_guard_without_weight_is_none() -> None:
    recipe = Recipe(guard="both", distillation=0.0, interpolation=1.0)
    assert (recipe.distils, recipe.interpolates) == (False, False)
    recipe = Recipe(guard="both", distillation=0.01, interpolation=0.99)
    assert (recipe.distils, recipe.interpolates) == (True, True)


# -- the learning rate --------------------------------------------------------------------------------------------


def rates(recipe: Recipe) -> list[float]:
    return [recipe.learning_rate_at(step) for step in range(recipe.steps)]


def test_steps_are_epochs_times_iterations() -> None:
    assert Recipe(epochs=7, iterations=3).steps == 21


def test_the_learning_rate_rises_in_a_straight_line_to_its_peak() -> None:
    recipe = Recipe(epochs=10, iterations=20, warm_up=0.1, learning_rate=4e-3)
    assert rates(recipe)[:20] == pytest.approx([4e-3 * number / 20 for number in range(1, 21)])
    assert rates(recipe)[19] == rates(recipe)[20] == 4e-3
    assert rates(recipe)[21] < 4e-3


def test_then_it_falls_as_nnunets_own_schedule_does_over_what_is_left() -> None:
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
    from torch import nn, optim

    recipe = Recipe(epochs=10, iterations=20, warm_up=0.25, learning_rate=4e-3)
    optimiser = optim.SGD([nn.Parameter()], lr=4e-3)
    schedule = PolyLRScheduler(optimiser, 4e-3, max_steps=150)
    expected = []
    for step in range(150):
        schedule.step(step)
        expected.append(optimiser.param_groups[0]["lr"])
    assert rates(recipe)[50:] == pytest.approx(expected)


RECIPES = [
    Recipe(),
    FROM_SCRATCH,
    *(Recipe(epochs=1, iterations=1, warm_up=warm_up) for warm_up in (0.0, 0.1, 0.5, 0.9)),
    *(Recipe(epochs=epochs, iterations=3, warm_up=warm_up) for epochs in (1, 4) for warm_up in (0.0, 0.34, 0.9)),
    Recipe(epochs=2, iterations=1, warm_up=0.9),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.steps} steps, {recipe.warm_up} warm-up")
def test_the_learning_rate_is_above_0_never_above_its_peak_and_reaches_it(recipe: Recipe) -> None:
    found = rates(recipe)
    assert all(0 < rate <= recipe.learning_rate for rate in found)
    assert max(found) == recipe.learning_rate
    top = found.index(recipe.learning_rate)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_at_the_end_it_is_near_0() -> None:
    assert rates(Recipe())[-1] < Recipe().learning_rate * 0.003
    assert rates(FROM_SCRATCH)[-1] < FROM_SCRATCH.learning_rate * 0.001


def test_a_training_of_one_step_takes_the_peak() -> None:
    assert rates(Recipe(epochs=1, iterations=1, learning_rate=0.02)) == [0.02]
