"""Optimisers with a state of two means: restarts, and the memory that a plan predicts."""

import jax
import pytest

from semiseg_jax import self_training, train_state
from semiseg_jax.models import deeplab
from semiseg_jax.planning import chips, programs
from tests import conftest, workdirs
from tests.test_self_training import Killed, kill_at

pytestmark = pytest.mark.slow

RECIPE = {
    "optim.kind": "adam",
    "optim.teacher.learning_rate": 1e-3,
    "loss.labeled": "ohem",
    "loss.class_weights": "balanced",
    "rounds.count": 0,
}


@pytest.mark.usefixtures("without_report", "one_device")
def test_a_kill_changes_no_bit_with_adam_and_hard_pixels(config_of_pairs, tmp_path, monkeypatch):
    config = config_of_pairs
    config.update_from_flattened_dict(RECIPE)
    self_training.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, "teacher", 4)  # After the checkpoint of step 2.
        with pytest.raises(Killed):
            self_training.run(config, tmp_path / "killed")
    self_training.run(config, tmp_path / "killed")
    workdirs.same(tmp_path / "whole", tmp_path / "killed")
    metrics = workdirs.metrics(tmp_path / "killed")
    assert metrics == workdirs.metrics(tmp_path / "whole")
    assert all(0 < line["kept_labeled"] <= 1 for lines in metrics.values() for line in lines)


def test_a_plan_counts_the_state_of_adamw():
    """Parameters and the two means; the images of a step are few beside them."""
    config = conftest.tiny_config(optim__kind="adamw", loss__class_weights="balanced")
    cost = programs.step_program(config, "teacher", 3, chips.topology("cpu")).cost
    assert isinstance(cost, programs.Cost)
    params = train_state.variable_shapes(deeplab.build(config.model, 3))["params"]
    copies = cost.memory.arguments / sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert 3 < copies < 4, copies
