"""Networks that are built from equal settings are equal, so that their programs are shared."""

import jax
import pytest

from semiseg_jax import compiled_model, inference, mesh
from semiseg_jax.methods import registry
from semiseg_jax.models import deeplab, vit
from tests.conftest import tiny_config


def build(backbone, **changes):
    config = tiny_config(model__backbone=backbone, **changes)
    if backbone in vit.BACKBONES:
        config.model.head = "dpt"
    return deeplab.build(deeplab.resolve(config.model), 3)


@pytest.mark.parametrize("backbone", sorted(deeplab.BACKBONES))
def test_networks_of_equal_settings_are_equal_and_hashed_alike(backbone):
    one, other = build(backbone), build(backbone)
    assert one == other and hash(one) == hash(other)
    assert one != build(backbone, model__compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"seed": 1, "data__name": "streets", "rounds__count": 3}, True),
        ({"optim__student__learning_rate": 0.5}, False),
        ({"loss__unlabeled": "ce"}, False),
        ({"train__batch_unlabeled": 16}, False),
        ({"train__batch_labeled": 16, "optim__reference_batch": 8}, False),
        ({"model__norm": "shared"}, False),
    ],
)
def test_a_step_is_shared_by_runs_that_differ_in_nothing_that_it_depends_on(changes, is_same):
    def program(**changes):
        config = tiny_config(**changes)
        network = deeplab.build(deeplab.resolve(config.model), 3)
        return compiled_model.make_program(config, "student", 4, network, mesh.make_mesh())

    assert (program() is program(**changes)) == is_same


def test_a_method_that_cannot_be_hashed_has_a_step_of_its_own(monkeypatch):
    """As one that a user writes may be."""
    own = type("Own", (registry.METHODS["fixmatch"],), {"__hash__": None})
    monkeypatch.setitem(registry.METHODS, "fixmatch", own)
    config = tiny_config(method__name="fixmatch")
    programs = [
        compiled_model.make_program(config, "student", 4, build("tiny"), mesh.make_mesh())
        for _ in range(2)
    ]
    assert programs[0] is not programs[1] and isinstance(programs[0].method, own)


def test_labelling_and_evaluation_share_the_program_of_a_scale():
    devices = mesh.make_mesh(jax.devices()[:1])
    one, other = (inference.Predictor(build("tiny"), devices, s) for s in ((1.0,), (0.5, 1.0)))
    assert one.add_scale is other.add_scale
    flipped = inference.Predictor(build("tiny"), devices, flip=True)
    assert flipped.add_scale is not one.add_scale
