"""The stages of a run and the files that mark them as finished."""

import dataclasses

import pytest

from configs import default
from semiseg_jax import stages
from tests.errors import raises_code


@pytest.mark.parametrize("seed", [0, 1, 2**31, -1])
def test_the_marker_of_any_stage_is_read_as_it_was_written(tmp_path, seed):
    config = default.get_config()
    config.seed, config.rounds.count = seed, 3
    schedule = stages.schedule(config, tmp_path)
    # Some are negative, and some positive.
    assert len({bool(number < 0) for stage in schedule for number in stage.seed}) == 2
    for stage in schedule:
        marker = stages.Marker(tuple(stage.seed.tolist()), "a" * 16, "b" * 16, "")
        stage.write_marker(marker)
        assert stage.read_marker() == marker
    assert dataclasses.replace(marker, seed=()).is_of_older_code


def method_config(**train):
    config = default.get_config()
    config.method.name = "unimatch"
    config.train.update(train)
    return config


def test_a_method_refuses_to_accumulate_by_name():
    with raises_code("accumulation-with-online-method", "train.accumulate is 2"):
        stages.check_method(method_config(accumulate=2, batch_unlabeled=8), 1)


# On 8 devices each of 8 images would be alone; 3 images on one device leave one without a partner.
@pytest.mark.parametrize(("images", "devices"), [(8, 8), (1, 1), (3, 1)])
def test_a_method_refuses_an_image_without_a_partner(images, devices):
    with raises_code("batch-not-in-mixing-groups", "train.batch_unlabeled"):
        stages.check_method(method_config(batch_unlabeled=images), devices)
    stages.check_method(method_config(batch_unlabeled=2 * devices), devices)
