"""The network inside the loss of a method: forward passes that thread the norm statistics."""

import itertools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Integer, Key, Shaped

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models.dsbn import Domain

# {"params": …, "batch_stats_weak": …, "batch_stats_strong": …}
Variables = dict[str, Any]


class Network:
    """The network while one loss is traced.

    Each forward pass in training mode normalises its images by their own moments, moves the running
    moments of their domain, and draws dropout of its own. Passes are counted as they are traced, so
    that the n-th pass of a step draws the same in every run.

    Attributes:
        norms: the norm statistics after the passes so far.

    Args:
        model: from `deeplab.build`.
        params: of the network; the loss is differentiated with respect to them.
        norms: its statistics collections before the step.
        key: of dropout, for this step.
        groups: number of devices; batches are joined in as many blocks.
    """

    def __init__(
        self, model: Any, params: Any, norms: dict[str, Any], key: Key[Array, ""], groups: int
    ):
        self.norms = norms
        self._model = model
        self._params = params
        self._key = key
        self._groups = groups
        self._passes = 0

    @property
    def mean_color(self) -> Float[np.ndarray, "3"]:
        """The mean of the network's input normalisation, for RGB values 0..255."""
        return np.asarray(self._model.mean, np.float32)

    def __call__(
        self, images: Integer[Array, "n h w 3"], domain: Domain
    ) -> Float[Array, "n h w classes"]:
        """Computes logits in training mode.

        Args:
            images: RGB, uint8.
            domain: "weak" or "strong", the norm that the images meet; networks with one norm have
                the same for both.
        """
        return self._train(images, domain, "__call__")

    def encode(self, images: Integer[Array, "n h w 3"], domain: Domain) -> Any:
        """Computes the backbone's features in training mode, a tree of arrays [n, ...]."""
        return self._train(images, domain, "encode")

    def decode(self, features: Any, domain: Domain) -> Float[Array, "n h w classes"]:
        """Computes logits from features in training mode."""
        return self._train(features, domain, "decode")

    def predict(
        self,
        images: Integer[Array, "n h w 3"],
        variables: Variables | None = None,
        train: bool = False,
    ) -> Float[Array, "n h w classes"]:
        """Computes logits with the weak norm, as deployed, without gradient.

        Args:
            images: RGB, uint8.
            variables: of the network that predicts, such as an average; None for the network that
                is trained, with its present statistics.
            train: normalise by the moments of the images, and drop features; no statistics move.
        """
        if variables is None:
            variables = {"params": self._params, **self.norms}
        variables = jax.lax.stop_gradient(variables)
        if not train:
            return self._model.apply(variables, images, domain="weak")
        logits, _ = self._model.apply(
            variables,
            images,
            domain="weak",
            train=True,
            mutable=list(self.norms),
            rngs={"dropout": self._next_key()},
        )
        return logits

    def predict_features(self, images: Integer[Array, "n h w 3"]) -> Any:
        """Computes the backbone's features with the weak norm, as deployed, without gradient.

        Args:
            images: RGB, uint8.
        """
        variables = jax.lax.stop_gradient({"params": self._params, **self.norms})
        return self._model.apply(variables, images, domain="weak", method="encode")

    def join(self, *batches: Any) -> Any:
        """Joins batches so that no image leaves its device: block by block, not end to end.

        Args:
            batches: trees of arrays [n, ...] of one structure; n may differ.
        """
        return mesh_lib.join_blocks(self._groups, *batches)

    def split(self, joined: Any, *like: Shaped[Array, "_n *_rest"]) -> tuple[Any, ...]:
        """Splits what `join` joined.

        Args:
            joined: tree of arrays [m, ...].
            like: an array of each batch that was joined, in the same order; only its length is
                read.
        """
        ends = [0]
        for array in like:
            ends.append(ends[-1] + array.shape[0] // self._groups)

        def take(leaf: Shaped[Array, "_m *_rest"], start: int, end: int) -> Array:
            blocks = leaf.reshape(self._groups, -1, *leaf.shape[1:])[:, start:end]
            return blocks.reshape(-1, *leaf.shape[1:])

        return tuple(
            jax.tree.map(lambda leaf, s=start, e=end: take(leaf, s, e), joined)
            for start, end in itertools.pairwise(ends)
        )

    def _train(self, inputs: Any, domain: Domain, method: str) -> Any:
        outputs, updated = self._model.apply(
            {"params": self._params, **self.norms},
            inputs,
            domain=domain,
            train=True,
            mutable=list(self.norms),
            rngs={"dropout": self._next_key()},
            method=method,
        )
        # A domain that took no part keeps its statistics.
        self.norms = {**self.norms, **updated}
        return outputs

    def _next_key(self) -> Key[Array, ""]:
        self._passes += 1
        return jax.random.fold_in(self._key, self._passes)
