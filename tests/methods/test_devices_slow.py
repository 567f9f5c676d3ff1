"""The building blocks on a batch that is split over devices by image, and under x64.

Two programs hold every block that draws random numbers or sums over the batch.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.methods import (
    auxiliary_decoder,
    channel_dropout,
    confidence,
    consistency,
    ema,
    fusion,
    grad_cam,
    guided_cutout,
    image_classifier,
    image_cutout,
    masks,
    mixing,
    perturbations,
    self_attention,
    virtual_adversarial,
)
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.models import dsbn

pytestmark = pytest.mark.slow

IMAGES, SIZE, CLASSES, CHANNELS = 16, (13, 18), 4, 6
KEY = jax.random.key(5)


def make_batch():
    """Two images for each of eight devices."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, (IMAGES, *SIZE)).astype(np.uint8)
    label[:, :, -3:] = losses.IGNORE
    return {
        "image": rng.normal(size=(IMAGES, *SIZE, CHANNELS)),
        "label": label,
        "valid": np.broadcast_to(np.arange(SIZE[1]) < 15, label.shape).copy(),
    }


def make_params(seed):
    return 3 * np.random.default_rng(seed).normal(size=(CHANNELS, CLASSES))


def step(params, average, batch, key):
    """A step of a method that has every building block; the network is a linear layer."""
    keys = [image_keys(jax.random.fold_in(key, i), IMAGES) for i in range(4)]
    image, valid = batch["image"], batch["valid"]
    labels = confidence.teacher_labels(image @ average, valid)
    view = {"image": image, "labels": labels}
    partner = mixing.partners(view)
    boxes = [
        masks.box_masks(draw(keys[i], SIZE), SIZE)
        for i, draw in enumerate((mixing.unimatch_boxes, mixing.half_area_boxes))
    ]
    classes = mixing.class_masks(jax.random.fold_in(key, 2), labels.label, CLASSES)
    mixed = [mixing.mix(box, partner, view) for box in boxes]
    mixed.append(mixing.mix(classes, view, partner))
    even, odd = mixing.split_pairs(view)

    def loss(params):
        first, second = channel_dropout.complementary_dropout(
            keys[3][0], mixed[0]["image"], mixed[1]["image"]
        )
        dropped = channel_dropout.channel_dropout(keys[3], image)
        parts = [
            consistency.hard_cross_entropy(first @ params, mixed[0]["labels"], 0.8),
            consistency.hard_cross_entropy(second @ params, mixed[1]["labels"], 0.8),
            consistency.hard_cross_entropy(dropped @ params, labels, 0.8),
            consistency.hard_cross_entropy(mixed[2]["image"] @ params, mixed[2]["labels"]),
            consistency.squared_difference(
                even["image"] @ params, odd["image"] @ average, odd["labels"].valid
            ),
            losses.ohem_cross_entropy(image @ params, batch["label"]),
            losses.focal_loss(image @ params, batch["label"]),
            losses.weighted_cross_entropy(
                image @ params, batch["label"], jnp.arange(1.0, 1 + CLASSES)
            ),
        ]
        shares = [confidence.confident_share(m["labels"], 0.8) for m in mixed]
        terms = [total / jnp.maximum(count, 1) for total, count in parts]
        terms.append(losses.ce_dice_loss(image @ params, batch["label"]))
        return sum(terms) + sum(shares) * terms[0], (terms, shares)

    gradient, (terms, shares) = jax.grad(loss, has_aux=True)(params)
    params = params - 0.1 * gradient
    average = ema.update_average(average, params, ema.update_weight(3, 0.99))
    counts = [jnp.sum(mask, axis=(1, 2)) for mask in (*boxes, classes)]
    return params, average, jnp.stack(terms + shares), counts


OBJECT_CLASSES = 3
NORM = functools.partial(dsbn.DomainNorm, kind="shared", momentum=0.9, epsilon=1e-3)
LAYOUT = dsbn.DomainLayout("weak", train=True)
DECODER = auxiliary_decoder.AuxiliaryDecoder(OBJECT_CLASSES, upscale=4)
CLASSIFIER = image_classifier.ImageClassifier(OBJECT_CLASSES - 1)
ATTENTION = self_attention.SelfAttention(OBJECT_CLASSES, NORM, dim=8)


def init_variables(features):
    key = jax.random.key(0)
    scores = jnp.zeros((*features.shape[:3], OBJECT_CLASSES - 1))
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


# ---- devices


def compile_on(devices, function, inputs, by_image, out_by_image=None):
    """Compiles a function of which some inputs, and outputs, are split over devices by image.

    Args:
        devices: how many.
        function: to compile.
        inputs: a tuple of its arguments.
        by_image: for each argument whether it is split.
        out_by_image: likewise for each part of the result; None for a result on each device.

    Returns:
        The compiled program, and the inputs on the devices.
    """
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    sharding = {False: mesh_lib.replicated(mesh), True: mesh_lib.batch_sharding(mesh)}
    inputs = [jax.device_put(x, sharding[s]) for x, s in zip(inputs, by_image, strict=True)]
    outputs = sharding[False] if out_by_image is None else tuple(sharding[s] for s in out_by_image)
    return jax.jit(function, out_shardings=outputs).lower(*inputs).compile(), inputs


def assert_all_reduces_alone(program):
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", program.as_text())
    assert set(found) == {"all-reduce"}


def test_eight_devices_mix_and_average_as_one_does_by_all_reduces_alone():
    results = {}
    with jax.enable_x64(True):
        for devices in (1, 8):
            program, inputs = compile_on(
                *(devices, step, (make_params(1), make_params(2), make_batch(), KEY)),
                by_image=(False, False, True, False),
                out_by_image=(False, False, False, True),
            )
            results[devices] = jax.device_get(program(*inputs))
    assert_all_reduces_alone(program)
    one, eight = (jax.tree.leaves(results[devices]) for devices in (1, 8))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10)
    terms, counts = results[1][2], results[1][3]
    assert np.all(terms > 0)
    assert all(len(np.unique(count)) > 3 for count in counts)


@pytest.mark.parametrize("loss", [cct_loss, pseudoseg_loss])
def test_eight_devices_perturb_and_fuse_as_one_does_by_all_reduces_alone(loss):
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


# ---- x64


@jax.jit
def draw(key):
    """What each block draws, as masks, whole numbers or factors."""
    images, size = 4, (37, 45)
    keys = [image_keys(jax.random.fold_in(key, i), images) for i in range(6)]
    labels = jnp.arange(images * size[0] * size[1]).reshape(images, *size) % 5
    box = jnp.full((images, 1), 20, jnp.int32)
    boxes = guided_cutout.ObjectBoxes(box > 0, *(jnp.zeros_like(box),) * 2, box, box)
    spared = channel_dropout.spared_pairs(key, images)
    return {
        "half_area_boxes": mixing.half_area_boxes(keys[0], size),
        "unimatch_boxes": mixing.unimatch_boxes(keys[1], size, probability=1.0),
        "class_masks": mixing.class_masks(jax.random.fold_in(key, 2), labels, 5),
        "complementary_masks": channel_dropout.complementary_masks(keys[3], spared, 8),
        "keep_mask": guided_cutout.keep_mask(keys[4], boxes, size),
        "cut_square": image_cutout.cut_square(keys[5], labels[..., None], labels >= 0, side=8)[1],
        "add_noise": perturbations.add_noise(keys[0], jnp.ones((images, 3, 2, 4), jnp.float32)),
    }


def test_draws_are_the_same_under_x64():
    single = jax.device_get(draw(KEY))
    with jax.enable_x64(True):
        double = jax.device_get(draw(KEY))
    for name, drawn in single.items():
        np.testing.assert_array_equal(drawn, double[name], err_msg=name)
