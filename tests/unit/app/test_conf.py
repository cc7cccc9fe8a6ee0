"""The app's configuration: who wins, what is refused, and what the message suggests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lib.conf import Config
from lib.server.launch import check_models
from mshub.errors import CatalogueError, ConfigError
from mshub.store import ModelStore


def test_without_options_everything_installed_is_served_accurately(home: Path) -> None:
    config = Config.parse({}, {"MSHUB_HOME": str(home)})
    assert config == Config(home=home, models=(), device="auto", profile="accurate", cache_gb=8.0, engine="auto")


def test_conf_wins_over_the_environment_and_that_over_the_defaults() -> None:
    environment = {"MSHUB_HOME": "/srv/models", "MSHUB_DEVICE": "cuda:1", "MSHUB_PROFILE": "balanced", "PATH": "/bin"}
    config = Config.parse({"device": "cpu", "cache_gb": "2.5"}, environment)
    assert config == Config(home=Path("/srv/models"), device="cpu", profile="balanced", cache_gb=2.5)


def test_an_empty_value_means_not_set(home: Path) -> None:
    config = Config.parse({"device": "", "profile": "", "cache_gb": "", "models": "", "home": ""}, {})
    assert (config.device, config.profile, config.cache_gb, config.models) == ("auto", "accurate", 8.0, ())
    assert config.home == home


def test_models_are_separated_by_commas() -> None:
    assert Config.parse({"models": " starter, liver-lesion-ct ,,"}, {}).models == ("starter", "liver-lesion-ct")


def test_a_home_may_begin_with_a_tilde() -> None:
    assert Config.parse({"home": "~/models"}, {}).home == Path.home() / "models"


@pytest.mark.parametrize(
    ("conf", "environment", "message"),
    [
        ({"modles": "starter"}, {}, r"Unknown option modles \(--conf modles or MSHUB_MODLES\)\. Did you mean models\?"),
        ({"device": "tpu"}, {}, "device .tpu. is unknown"),
        ({}, {"MSHUB_DEVCE": "cpu"}, r"MSHUB_DEVCE\)\. Did you mean device\?"),
        ({"colour": "blue"}, {}, "Known: home, models, device, profile, cache_gb"),
        ({"Device": "cpu"}, {}, "Unknown option Device"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(
    conf: dict[str, str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(conf, environment)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"profile": "turbo"}, "profile is 'turbo'; expected one of accurate, balanced, fast"),
        ({"engine": "tensorrt"}, "engine is 'tensorrt'; expected one of auto, torch, openvino"),
        ({"images_gb": "-1"}, "images_gb is '-1'; expected a number of gigabytes from 0"),
        ({"cache_gb": "lots"}, "cache_gb is 'lots'; expected a positive number of gigabytes"),
        ({"cache_gb": "0"}, "positive"),
        ({"cache_gb": "-4"}, "positive"),
        ({"cache_gb": "inf"}, "positive"),
        ({"cache_gb": "nan"}, "positive"),
        ({"lease_minutes": "0"}, "lease_minutes is '0'; expected a positive number of minutes"),
        ({"idle_minutes": "61"}, "expected a number of minutes from 0 to 60"),
        ({"idle_minutes": "-1"}, "from 0"),
        ({"audit_every": "often"}, "expected a number of choices from 0"),
        ({"queue": "1.9"}, "queue is '1.9'; expected a whole number of predictions from 0"),
    ],
)
def test_an_impossible_value_is_refused(conf: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse(conf, {})


def test_what_monailabel_itself_reads_is_let_through() -> None:
    assert Config.parse({"server_mode": "true"}, {"MSHUB_HOME": "/srv"}).home == Path("/srv")


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config.parse({}, {}).device = "cpu"  # type: ignore[misc]


def test_active_learning_can_be_switched_off_and_on() -> None:
    config = Config.parse({"idle_minutes": "0", "audit_every": "0", "idle_cases": "5", "lease_minutes": "1.5"}, {})
    assert (config.idle_minutes, config.audit_every, config.idle_cases, config.lease_minutes) == (0, 0, 5, 1.5)
    assert (Config.parse({}, {}).idle_minutes, Config.parse({}, {}).audit_every) == (30, 5)


def test_a_model_nobody_knows_is_refused_at_the_start_and_one_to_be_installed_is_not(home: Path) -> None:
    store = ModelStore()
    check_models(Config.parse({"models": "starter,liver-lesion-ct"}), store)
    with pytest.raises(CatalogueError, match=r"called 'startr'\. Did you mean 'starter'\?"):
        check_models(Config.parse({"models": "starter,startr"}), store)
