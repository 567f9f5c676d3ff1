"""The stages of a run and the files that mark them as finished."""

import dataclasses

import pytest

from configs import default
from semiseg_jax import stages


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
