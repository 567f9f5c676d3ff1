"""Networks with loaded weights against the PyTorch reference networks of those weights.

make_fixtures.py writes the expected values. Weights, images and the bound on the error are the same
for all networks: max |difference| / max |reference| is at most 1e-4.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.models.dsbn import DomainLayout
from semiseg_jax.train_state import copy_weak_to_strong, variable_shapes
from tests.conftest import tiny_config
from tests.models import reference_weights

FIXTURES = Path(__file__).parent / "fixtures"
BOUND = 1e-4


@functools.cache
def fixture(name):
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return json.loads(arrays.pop("about").tobytes()) | {"arrays": arrays}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function that writes the weights of a reference in its layout and returns the path."""
    folder = tmp_path_factory.mktemp("weights")

    def path_of(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            shapes = fixture(name)["shapes"]
            tensors = {k: reference_weights.drawn(k, tuple(v)) for k, v in shapes.items()}
            safetensors.numpy.save_file(tensors, path)
        return path

    return path_of


def build(name, **changes):
    """Builds our network for the weights of a reference."""
    config = tiny_config(model__backbone=name.partition("_")[2], **changes).model
    if name.startswith("smp"):
        config.head = "v3plus_smp"
        config.head_features, config.low_level_features, config.aspp_rates = 256, 48, ()
    return deeplab.build(config, 5)


def network(name, path, stride, **changes):
    """Builds the network and loads the weights: (model, variables, report)."""
    model = build(name, model__pretrained=str(path), model__output_stride=stride, **changes)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variable_shapes(model))
    variables, report = pretrained.load(path, zeros)
    return model, variables, report


def outputs(model, variables, images, whole):
    """Computes the outputs of the whole network, or of the backbone alone."""
    if whole:
        return {"logits": jax.jit(model.apply)(variables, images)}
    stats = "batch_stats_weak"
    backbone = {
        "params": variables["params"]["backbone"],
        stats: variables[stats]["backbone"],
    }
    return jax.jit(lambda v, x: model.backbone.apply(v, x, DomainLayout("weak", train=False)))(
        backbone, images
    )


def check(name, stride, weights):
    expected = fixture(name)["arrays"]
    keys = [key for key in expected if key.startswith(f"{stride}/") and key.endswith("/shape")]
    assert keys
    size = tuple(int(n) for n in keys[0].split("/")[1].split("x"))
    model, variables, _ = network(name, weights(name), stride)
    results = outputs(model, variables, reference_weights.image(*size), name.startswith("smp"))
    for key in (key.removesuffix("/shape") for key in keys):
        result = np.asarray(results[key.rpartition("/")[2]])
        assert result.shape == tuple(expected[f"{key}/shape"]), key
        error = np.abs(reference_weights.sampled(result) - expected[key]).max()
        assert error <= BOUND * expected[f"{key}/max"], key


FAST = [
    ("torchvision_resnet18", 32),
    ("timm_resnet18", 8),
    ("torchvision_resnet50", 16),
    ("timm_xception65", 16),
    ("smp_resnet18", 8),
    *((f"original_efficientnet_lite{n}", 32) for n in range(3)),
]
SLOW = [
    *(("torchvision_resnet50", stride) for stride in (8, 32)),
    *(("torchvision_resnet101", stride) for stride in (8, 16, 32)),
    *(("timm_xception65", stride) for stride in (8, 32)),
    ("timm_resnet50c", 16),
    ("timm_resnet50s", 16),
    ("smp_resnet18", 16),
    ("smp_resnet50", 8),
    ("smp_resnet50", 16),
]


@pytest.mark.parametrize(("name", "stride"), FAST)
def test_outputs_equal_those_of_the_reference(name, stride, weights):
    check(name, stride, weights)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), SLOW)
def test_outputs_equal_those_of_the_reference_at_every_stride(name, stride, weights):
    check(name, stride, weights)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("torchvision_resnet18", 11_689_512),
        ("torchvision_resnet50", 25_557_032),
        ("torchvision_resnet101", 44_549_160),
        ("timm_resnet50c", 25_576_264),
        ("timm_resnet50s", 25_680_808),
        ("timm_xception65", 39_916_312),
        ("smp_resnet18", 12_330_325),
        ("original_efficientnet_lite0", 4_652_008),
        ("original_efficientnet_lite1", 5_416_680),
        ("original_efficientnet_lite2", 6_092_072),
    ],
)
def test_number_of_parameters(name, published):
    """Published backbones have a classifier of 1000 ImageNet classes, which ours lack.

    In EfficientNet, the last convolution belongs to the classifier.
    """
    about = fixture(name)
    assert about["parameters"] == published
    whole = name.startswith("smp")
    params = variable_shapes(build(name, model__norm="shared"))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params if whole else params["backbone"]))
    features = next((v[1] for k, v in about["shapes"].items() if k.endswith("fc.weight")), None)
    head = sum(
        int(np.prod(shape))
        for name, shape in about["shapes"].items()
        if name in ("_conv_head.weight", "_bn1.weight", "_bn1.bias")
    )
    assert count == published - head - (0 if whole else 1000 * features + 1000)


def test_dsbn_and_a_first_student_predict_like_the_loaded_network(weights):
    """One norm, DSBN, and a student's copy of the weak norm, in both domains."""
    name = "smp_resnet18"
    images = reference_weights.image(64, 64)
    shared, shared_variables, _ = network(name, weights(name), 16, model__norm="shared")
    model, variables, report = network(name, weights(name), 16)
    assert report.unused == report.initial == ()
    run = jax.jit(lambda v, domain: model.apply(v, images, domain=domain), static_argnums=1)
    expected = jax.jit(shared.apply)(shared_variables, images)
    np.testing.assert_allclose(run(variables, "weak"), expected, atol=1e-5)
    np.testing.assert_array_equal(run(variables, "strong"), run(variables, "weak"))
    trained = variables | {
        "batch_stats_strong": jax.tree.map(lambda v: v + 1, variables["batch_stats_strong"])
    }
    assert not np.allclose(run(trained, "strong"), expected, atol=1e-2)
    student = copy_weak_to_strong(trained)
    np.testing.assert_array_equal(run(student, "strong"), run(variables, "weak"))
