"""The building blocks together, on a batch that is split over devices by image."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from semiseg_jax import labeled_losses, losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.methods import (
    channel_dropout,
    confidence,
    consistency,
    ema,
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
        mixing.box_masks(draw(keys[i], SIZE), SIZE)
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
            labeled_losses.ohem_cross_entropy(image @ params, batch["label"]),
            labeled_losses.focal_loss(image @ params, batch["label"]),
            labeled_losses.weighted_cross_entropy(
                image @ params, batch["label"], jnp.arange(1.0, 1 + CLASSES)
            ),
        ]
        shares = [confidence.confident_share(m["labels"], 0.8) for m in mixed]
        terms = [total / jnp.maximum(count, 1) for total, count in parts]
        terms.append(labeled_losses.ce_dice_loss(image @ params, batch["label"]))
        return sum(terms) + sum(shares) * terms[0], (terms, shares)

    gradient, (terms, shares) = jax.grad(loss, has_aux=True)(params)
    params = params - 0.1 * gradient
    average = ema.update_average(average, params, ema.update_weight(3, 0.99))
    counts = [jnp.sum(mask, axis=(1, 2)) for mask in (*boxes, classes)]
    return params, average, jnp.stack(terms + shares), counts


@functools.cache
def compiled(devices):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    replicated, by_image = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    batch = jax.device_put(make_batch(), by_image)
    inputs = *jax.device_put((make_params(1), make_params(2)), replicated), batch, KEY
    program = jax.jit(step, out_shardings=(*(replicated,) * 3, by_image)).lower(*inputs).compile()
    return program, inputs


def test_eight_devices_compute_what_one_does_by_all_reduces_alone():
    with jax.enable_x64(True):
        results = {}
        for devices in (1, 8):
            program, inputs = compiled(devices)
            results[devices] = jax.device_get(program(*inputs))
    one, eight = (jax.tree.leaves(results[devices]) for devices in (1, 8))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10)
    terms, counts = results[1][2], results[1][3]
    assert np.all(terms > 0)
    assert all(len(np.unique(count)) > 3 for count in counts)
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", compiled(8)[0].as_text())
    assert set(found) == {"all-reduce"}
