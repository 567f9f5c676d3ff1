"""The blocks of CCT and PseudoSeg, all in one program: eight devices compute what one does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from semiseg_jax.methods import (
    auxiliary_consistency,
    auxiliary_decoder,
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
from semiseg_jax.models import dsbn

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
    keep = guided_cutout.keep_mask(boxes, objects.shape[1:], keys)
    perturbed = [
        perturbations.drop_attended(features, keys, valid=masks.resize_nearest(valid, (6, 5))),
        perturbations.add_noise(features, keys),
        perturbations.mask_context(features, objects),
        perturbations.mask_objects(features, objects),
        perturbations.cut_out(features, keep),
        virtual_adversarial.perturb(decode, features, keys, norm_floor=0.0, valid=valid),
    ]
    auxiliary = [decode(x) for x in perturbed]
    return auxiliary_consistency.auxiliary_consistency(auxiliary, main, valid)


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
    strong, kept = image_cutout.cut_square(features, small, keys, side=4)
    total, count = fusion.soft_cross_entropy(
        DECODER.apply(variables["main"], strong)[:, ::4, ::4], labels, kept
    )
    classification, images = image_classifier.sigmoid_cross_entropy(logits, present)
    return total / jnp.maximum(count, 1) + jnp.mean(refined**2) + classification / images


def compile_on(devices, loss, *batch):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("batch"))
    step = jax.jit(jax.value_and_grad(loss), in_shardings=(replicated, split, split, split))
    return step.lower(*batch).compile(), (replicated, split, split, split)


@pytest.mark.parametrize("loss", [cct_loss, pseudoseg_loss])
def test_eight_devices_compute_what_one_does_with_all_reduces_alone(loss):
    with jax.enable_x64(True):
        features = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(IMAGES, 6, 5, 4))))
        valid = jnp.ones((IMAGES, 24, 20), bool).at[3, 10:].set(False).at[7].set(False)
        keys = jax.random.split(jax.random.key(0), IMAGES)
        batch = (init_variables(features), features, valid, keys)
        results = []
        for devices in (1, 8):
            program, shardings = compile_on(devices, loss, *batch)
            results.append(jax.device_get(program(*jax.device_put(batch, shardings))))
        text = program.as_text()
    kinds = set(
        re.findall(
            r"= [^=]*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)", text
        )
    )
    assert kinds == {"all-reduce"}
    # Image 7 is padding alone.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    assert results[0][0] > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *results)
