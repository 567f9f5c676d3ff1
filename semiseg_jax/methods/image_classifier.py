"""The image-level classifier of PseudoSeg: which classes an image contains.

Source: Zou et al., ICLR 2021, section 3.2; googleinterns/wss, train_wss.py and
core/data_generator.py. With a background class the classifier has C - 1 outputs, the classes from
1, so that its labels are `masks.classes_in_labels(...)[:, 1:]`; for data without one it has C
outputs (this project's rule, the authors ran VOC and COCO alone).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from semiseg_jax.methods.precision import at_least_float32
from semiseg_jax.models import layers
from semiseg_jax.models.dsbn import DomainLayout


class ImageClassifier(nn.Module):
    """Global mean of the last features, dropout, and one linear layer.

    Attributes:
        outputs: C - 1 with a background class, else C.
        dropout: rate of the dropout in training; published: .5 for Xception, 0 for ResNet.
        dtype: of the linear layer; None to promote the dtypes of input and parameters.
    """

    outputs: int
    dropout: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "n h w c"],
        layout: DomainLayout,
        valid: Bool[Array, "n h w"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Computes a logit for each class.

        Args:
            features: the last ones of the backbone.
            layout: of the batch.
            valid: positions that are not padding; the mean is over them. None for all, as
                published.
        """
        features = at_least_float32(features)
        if valid is None:
            mean = jnp.mean(features, axis=(1, 2), keepdims=True)
        else:
            weights = valid[..., None].astype(features.dtype)
            total = jnp.sum(features * weights, axis=(1, 2), keepdims=True)
            mean = total / jnp.maximum(jnp.sum(weights, axis=(1, 2), keepdims=True), 1)
        mean = layers.Dropout(self.dropout)(mean, layout)
        logits = layers.Conv(
            self.outputs,
            use_bias=True,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            name="classifier",
        )(mean)
        return logits[:, 0, 0]


def predicted_classes(
    logits: Float[Array, "n outputs"], threshold: float = 0.5
) -> Bool[Array, "n outputs"]:
    """Returns which classes an image is predicted to contain: probability at least `threshold`."""
    return jax.nn.sigmoid(at_least_float32(logits)) >= threshold


def sigmoid_cross_entropy(
    logits: Float[Array, "n outputs"],
    present: Bool[Array, "n outputs"],
    labeled: Bool[Array, " n"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sigmoid cross-entropy, as (sum in nats over the images, number of images).

    The loss of an image is the mean over the classes.

    Args:
        logits: of `ImageClassifier`.
        present: from `masks.classes_in_labels`, as `predicted_classes` has them.
        labeled: images that count. An image whose pixels are all ignored says nothing about its
            classes and should not count.
    """
    logits = at_least_float32(logits)
    terms = optax.sigmoid_binary_cross_entropy(logits, present.astype(logits.dtype))
    by_image = jnp.mean(terms, axis=-1)
    if labeled is None:
        labeled = jnp.ones(by_image.shape, bool)
    return jnp.sum(jnp.where(labeled, by_image, 0)), jnp.sum(labeled, dtype=by_image.dtype)
