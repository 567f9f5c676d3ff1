"""Random keys for each image, so that any number of devices draws the same."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def image_keys(key: Array, images: int, first: int = 0) -> Key[Array, " images"]:
    """Folds the position of each image in the global batch into a key.

    Args:
        key: of the step and the purpose; a typed key, [].
        images: n, how many images.
        first: position of the first of them.
    """
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(first + jnp.arange(images))
