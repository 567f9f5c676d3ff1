"""The building blocks together, on a batch that is split over devices by image."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.methods import (
    channel_dropout,
    confidence,
    consistency,
    ema,
    masks,
    mixing,
)
from semiseg_jax.methods.image_keys import image_keys

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
    classes = mixing.class_masks(keys[2], labels.label, CLASSES)
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


def test_eight_devices_compute_what_one_does_by_all_reduces_alone():
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
