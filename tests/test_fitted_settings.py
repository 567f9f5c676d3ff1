"""What a run chose by itself is chosen once: later starts take it from the workdir."""

import json

import pytest
from ml_collections import ConfigDict

from configs import default
from semiseg_jax import fitted_settings, workdir
from tests.errors import raises_code

CHOSEN = {"data.scale": (0.25, 1.5), "train.steps": 120, "optim.student.learning_rate": 0.5}


@pytest.fixture
def config():
    return default.get_config()


def test_a_new_workdir_leaves_the_config_as_it_is(config, tmp_path):
    assert fitted_settings.restore(tmp_path, config).to_dict() == config.to_dict()
    assert not any(tmp_path.iterdir())


def test_later_starts_have_the_settings_of_the_first(config, tmp_path):
    first = fitted_settings.record(tmp_path, config, CHOSEN, "For a reason.")
    assert first.data.scale == (0.25, 1.5) and first.train.steps == 120
    assert config.train.steps == 20_000
    again = fitted_settings.restore(tmp_path, config)
    assert isinstance(again, ConfigDict) and again.is_locked
    assert again.to_dict() == first.to_dict()


def test_what_was_chosen_may_be_given(config, tmp_path):
    first = fitted_settings.record(tmp_path, config, CHOSEN, "For a reason.")
    assert fitted_settings.restore(tmp_path, first).to_dict() == first.to_dict()


def test_another_value_is_compared_with_config_json(config, tmp_path):
    first = fitted_settings.record(tmp_path, config, CHOSEN, "For a reason.")
    workdir.write_config(tmp_path, first)
    workdir.check_config(tmp_path, fitted_settings.restore(tmp_path, config))
    config.data.scale = (0.5, 1.0)
    with raises_code("workdir-of-another-config", "data.scale"):
        workdir.check_config(tmp_path, fitted_settings.restore(tmp_path, config))


def test_settings_chosen_in_two_parts_keep_what_the_config_gave(config, tmp_path):
    part = fitted_settings.record(tmp_path, config, {"train.steps": 500}, "For a reason.")
    fitted_settings.record(tmp_path, part, {"train.steps": 300, "rounds.count": 1}, "For a reason.")
    again = fitted_settings.restore(tmp_path, config)
    assert (again.train.steps, again.rounds.count) == (300, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"train.stepz": {"given": 1, "value": 2}},
        {"train.steps": {"given": 20_000, "value": "many"}},
        {"data.crop": {"given": [769, 769], "value": 3}},
        {"": {"given": 1, "value": 2}},
    ],
)
def test_settings_that_no_config_has_are_one_sentence(config, tmp_path, settings):
    (tmp_path / "fitted.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "round_0").mkdir()
    with raises_code("fitted-settings-damaged", "fitted.json"):
        fitted_settings.restore(tmp_path, config)
