"""The blocks of CCT and PseudoSeg, all in one program: eight devices compute what one does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.methods import (
    auxiliary_decoder,
    consistency,
    fusion,
    grad_cam,
    guided_cutout,
    image_classifier,
    image_cutout,
    masks,
    perturbations,
    self_attention,
    virtual_adversarial,
)
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.models import dsbn
from tests.methods.test_devices import KEY, assert_all_reduces_alone, compile_on

pytestmark = pytest.mark.slow

IMAGES, CLASSES = 16, 3
NORM = functools.partial(dsbn.DomainNorm, kind="shared", momentum=0.9, epsilon=1e-3)
LAYOUT = dsbn.DomainLayout("weak", train=True)
DECODER = auxiliary_decoder.AuxiliaryDecoder(CLASSES, upscale=4)
CLASSIFIER = image_classifier.ImageClassifier(CLASSES - 1)
ATTENTION = self_attention.SelfAttention(CLASSES, NORM, dim=8)


def init_variables(features):
    key = jax.random.key(0)
    scores = jnp.zeros((*features.shape[:3], CLASSES - 1))
    variables = {
        # Weights above 0: no ReLU of so few channels ends the gradient.
        "main": jax.tree.map(jnp.abs, DECODER.init(key, features)),
        "auxiliary": jax.tree.map(jnp.abs, DECODER.init(jax.random.key(1), features)),
        "classifier": CLASSIFIER.init(key, features, LAYOUT),
        "attention": ATTENTION.init(key, [features], scores, LAYOUT),
    }
    return jax.tree.map(lambda leaf: leaf.astype(features.dtype), variables)


def cct_loss(variables, features, valid, keys):
    decode = functools.partial(DECODER.apply, variables["auxiliary"])
    main = DECODER.apply(variables["main"], features)
    objects = masks.predicted_objects(main, valid=valid)
    boxes = guided_cutout.find_objects(objects, min_points=6)
    keep = guided_cutout.keep_mask(keys, boxes, objects.shape[1:])
    perturbed = [
        perturbations.drop_attended(keys, features, valid=masks.resize_nearest(valid, (6, 5))),
        perturbations.add_noise(keys, features),
        perturbations.keep_positions(features, objects),
        perturbations.keep_positions(features, ~objects),
        perturbations.keep_positions(features, keep),
        virtual_adversarial.perturb(keys, decode, features, valid=valid),
    ]
    auxiliary = [decode(x) for x in perturbed]
    total, count = consistency.auxiliary_consistency(auxiliary, main, valid)
    return total / jnp.maximum(count, 1)


def pseudoseg_loss(variables, features, valid, keys):
    small = masks.resize_nearest(valid, features.shape[1:3])
    classify = functools.partial(CLASSIFIER.apply, variables["classifier"], layout=LAYOUT)
    logits = classify(features, valid=small)
    present = image_classifier.predicted_classes(logits)
    maps = grad_cam.grad_cam(lambda x: classify(x, valid=small), features, present, small)
    refined, _ = ATTENTION.apply(
        variables["attention"], [features], maps, LAYOUT, small, mutable=["batch_stats_weak"]
    )
    main = DECODER.apply(variables["main"], features)[:, ::4, ::4]
    labels = fusion.calibrated_fusion(main, refined, small)
    strong, kept = image_cutout.cut_square(keys, features, small, side=4)
    total, count = consistency.soft_cross_entropy(
        DECODER.apply(variables["main"], strong)[:, ::4, ::4], labels, kept
    )
    classification, images = image_classifier.sigmoid_cross_entropy(logits, present)
    return total / jnp.maximum(count, 1) + jnp.mean(refined**2) + classification / images


@pytest.mark.parametrize("loss", [cct_loss, pseudoseg_loss])
def test_eight_devices_compute_what_one_does_by_all_reduces_alone(loss):
    with jax.enable_x64(True):
        features = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(IMAGES, 6, 5, 4))))
        valid = jnp.ones((IMAGES, 24, 20), bool).at[3, 10:].set(False).at[7].set(False)
        inputs = (init_variables(features), features, valid, image_keys(KEY, IMAGES))
        results = []
        for devices in (1, 8):
            program, placed = compile_on(
                devices, jax.value_and_grad(loss), inputs, by_image=(False, True, True, True)
            )
            results.append(jax.device_get(program(*placed)))
    assert_all_reduces_alone(program)
    # Image 7 is padding alone.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    assert results[0][0] > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *results)
