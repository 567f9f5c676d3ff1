"""The weak and strong views of an image: one geometry, and for each strong view its own colours."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from semiseg_jax.data import color_jitter, sda, weak_augment
from semiseg_jax.data.image_io import IGNORE
from semiseg_jax.data.views import Views
from semiseg_jax.runtime.quiet_tensorflow import tf

# Values of `method.views.kind`: jitter, greyscale and blur; the operations of `config.sda`.
KINDS = ("jitter", "sda")


@tf.autograph.experimental.do_not_convert
def augment_views(
    image: tf.Tensor,
    views: Views,
    geometry_seed: tf.Tensor,
    color_seed: tf.Tensor,
    config: Any,
    pad_value: UInt8[np.ndarray, "3"],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the views of an image and which of their pixels are not padding.

    Scale, crop and mirror are drawn once. Each strong view draws its colours from `color_seed` and
    its number. No colour augmentation sees or changes the padding, and none moves a pixel or makes
    it invalid, not even coarse_dropout of SDA.

    Args:
        image: uint8 [h, w, 3].
        views: how many.
        geometry_seed, color_seed: int [2].
        config: the whole config; `data`, `sda` and `method.views` are read.
        pad_value: RGB of the padding.

    Returns:
        The views, uint8 [v, crop, 3], the weak one first; and a mask, bool [crop], which all views
        share: False in the padding.
    """
    shape = tuple(config.data.crop)
    # A label without IGNORE, which only its padding gets.
    label = tf.zeros(tf.shape(image)[:2], tf.uint8)
    crop, cropped_label, offset = weak_augment.random_crop(image, label, geometry_seed, config.data)

    def pad(view: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return weak_augment.pad(view, cropped_label, offset, shape, pad_value)

    def strong_view(number: tf.Tensor) -> tf.Tensor:
        seed = tf.random.experimental.stateless_fold_in(color_seed, number)
        if config.method.views.kind == "jitter":
            return pad(color_jitter.color_augment(crop, seed, config.method.views))[0]
        if not config.sda.before_geometry:
            return pad(sda.strong_augment(crop, seed, config.sda))[0]
        whole = sda.strong_augment(image, seed, config.sda)
        return pad(weak_augment.random_crop(whole, label, geometry_seed, config.data)[0])[0]

    weak, padded_label = pad(crop)
    stacks = [weak[None]] * views.weak
    if views.strong:
        numbers = tf.range(views.strong, dtype=tf.int64)
        # The map is in the graph, so that the operations are traced once and not once per view.
        signature = tf.TensorSpec((*shape, 3), tf.uint8)
        strong = tf.map_fn(
            strong_view, numbers, fn_output_signature=signature, parallel_iterations=1
        )
        stacks.append(tf.ensure_shape(strong, (views.strong, *shape, 3)))
    return tf.concat(stacks, axis=0), padded_label != IGNORE
