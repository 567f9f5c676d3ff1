"""Distribution-specific batch normalisation (DSBN): weak and strong images, each their own norm.

Source: Yuan et al., ICCV 2021, section 3.3. Statistics live in two variable collections,
`batch_stats_weak` and `batch_stats_strong`; affine parameters in `params` under `weak` and
`strong`. Which of them an image meets is static: it is compiled into the program.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Domain = Literal["weak", "strong", "both"]
NormKind = Literal["dsbn", "dsbn_shared_affine", "shared", "frozen"]

DOMAINS = ("weak", "strong")
NORM_KINDS = ("dsbn", "dsbn_shared_affine", "shared", "frozen")

# The name of a batch's moments, for rematerialised blocks to keep: to make them again would be
# another all-reduce.
MOMENTS = "batch_moments"


def stats_collection(domain: str) -> str:
    """Name of the variable collection that holds the statistics of `domain`."""
    return f"batch_stats_{domain}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """How the images of a batch divide into domains; static, so hashable.

    Attributes:
        domain: "weak", "strong", or "both".
        train: normalise by the batch's moments and update the running ones.
        groups: with "both", the number of equal blocks that the batch consists of, each with
            its weak images first and its strong ones after. With as many groups as the mesh has
            devices, every device holds one whole block and nothing moves to join the streams.
        num_weak: with "both", weak images in each block; None for half of it.
    """

    domain: Domain
    train: bool
    groups: int = 1
    num_weak: int | None = None

    def domains(self) -> tuple[str, ...]:
        """The domains that take part, in the order of the columns of `membership`."""
        return DOMAINS if self.domain == "both" else (self.domain,)

    def membership(self, batch_size: int) -> Float[np.ndarray, "groups block domains"]:
        """1 where an image, by block and place in the block, belongs to the domain.

        Raises:
            ValueError: when the batch does not divide as described.
        """
        if self.domain != "both":
            return np.ones((1, batch_size, 1), np.float32)
        block, rest = divmod(batch_size, self.groups)
        num_weak = block // 2 if self.num_weak is None else self.num_weak
        if rest or not 0 < num_weak < block or (self.num_weak is None and block % 2):
            raise ValueError(
                f"A batch of {batch_size} images does not divide into {self.groups} equal blocks "
                f"with {'half' if self.num_weak is None else num_weak} of each block weak and the "
                "rest strong: choose another batch size, groups or num_weak."
            )
        weak = np.arange(block) < num_weak
        return np.tile(np.stack([weak, ~weak], axis=1).astype(np.float32), (self.groups, 1, 1))

    def places(self, batch_size: int) -> Int[np.ndarray, " b"]:
        """A number for each image that says its domain and its place among the images of it.

        The same for every number of groups: what is random by image is drawn by it.
        """
        strong = self.domain == "strong"
        if self.domain != "both":
            return np.arange(batch_size) * 2 + strong
        is_strong = self.membership(batch_size)[..., 1].ravel() == 1
        order = np.where(is_strong, np.cumsum(is_strong), np.cumsum(~is_strong)) - 1
        return order * 2 + is_strong


class DomainNorm(nn.Module):
    """Batch normalisation over [batch, height, width], one norm for each domain of the batch.

    Moments are formed per image in float32, combined per domain, and applied as one scale and
    one shift per image. So activations are never sliced or joined by domain, and on a mesh the
    moments of both domains travel in one all-reduce, as those of one domain do.

    Attributes:
        kind: "dsbn"; "dsbn_shared_affine" (own statistics, one affine: Split-BN); "shared" (one
            norm for all images); "frozen" (one norm, statistics stay as loaded, affine trained).
        momentum: share of the old running moment that is kept in a step (flax's convention).
        epsilon: added to the variance.
        dtype: of the result; None for that of the input and the parameters together. Moments
            and parameters are float32 (moments of float64 input float64).
    """

    kind: NormKind
    momentum: float
    epsilon: float
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], batch: Batch, scale_init=nn.initializers.ones
    ) -> Float[Array, "b h w c"]:
        """Normalises x; updates the running moments of the batch's domains when training.

        The running variance is the biased one (flax's convention).
        """
        channels = x.shape[-1]
        if self.kind in ("shared", "frozen"):
            batch = dataclasses.replace(batch, domain="weak")
        domains = batch.domains()
        affine = self._affine_parameters(domains, channels, scale_init)
        running = self._running_moments(domains, channels)

        membership = batch.membership(x.shape[0])
        if batch.train and self.kind != "frozen":
            mean, variance = _batch_moments(x, membership)
            if not self.is_initializing():
                for i, domain in enumerate(domains):
                    self._update(running[domain], mean[i], variance[i])
        else:
            mean = jnp.stack([running[d]["mean"].value for d in domains])
            variance = jnp.stack([running[d]["var"].value for d in domains])

        gamma = jnp.stack([affine[d][0] for d in domains])
        beta = jnp.stack([affine[d][1] for d in domains])
        scale = gamma * jax.lax.rsqrt(variance + self.epsilon)
        shift = beta - mean * scale
        y = _apply_per_image(x, scale, shift, membership)
        return y if self.dtype is None else y.astype(self.dtype)

    def _affine_parameters(self, domains: Sequence[str], channels: int, scale_init):
        """{domain: (gamma [c], beta [c])}; both domains share one pair unless kind is "dsbn"."""
        if self.kind != "dsbn":
            pair = Affine(channels, scale_init, name="weak")()
            return dict.fromkeys(DOMAINS, pair)
        return {d: Affine(channels, scale_init, name=d)() for d in domains}

    def _running_moments(self, domains: Sequence[str], channels: int):
        """{domain: {"mean": variable [c], "var": variable [c]}}, created when initialising."""
        return {
            d: {
                "mean": self.variable(
                    stats_collection(d), "mean", jnp.zeros, (channels,), jnp.float32
                ),
                "var": self.variable(
                    stats_collection(d), "var", jnp.ones, (channels,), jnp.float32
                ),
            }
            for d in domains
        }

    def _update(self, moments, mean: Float[Array, " c"], variance: Float[Array, " c"]) -> None:
        for variable, new in ((moments["mean"], mean), (moments["var"], variance)):
            old = variable.value
            variable.value = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)


class Affine(nn.Module):
    """Scale and bias of one domain."""

    channels: int
    scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """(scale, bias), both [channels] float32."""
        scale = self.param("scale", self.scale_init, (self.channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        return scale, bias


def _batch_moments(
    x: Float[Array, "b h w c"], membership: Float[np.ndarray, "groups block domains"]
) -> tuple[Float[Array, "domains c"], Float[Array, "domains c"]]:
    """Mean and biased variance of each domain over its images and their pixels."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # E[x^2] - E[x]^2 reads the activations once; both moments leave in one array so that one
    # all-reduce carries them for every domain.
    per_image = jnp.stack([jnp.mean(x, axis=(1, 2)), jnp.mean(x * x, axis=(1, 2))], axis=1)
    blocks = per_image.reshape(*membership.shape[:2], 1, 2, x.shape[-1])
    share = jnp.asarray(membership / membership.sum(axis=(0, 1)), x.dtype)
    moments = jnp.sum(blocks * share[..., None, None], axis=(0, 1))
    moments = checkpoint_name(moments, MOMENTS)
    mean, square = moments[:, 0], moments[:, 1]
    # Rounding can leave a constant channel a little below zero.
    return mean, jnp.maximum(square - mean * mean, 0)


def _apply_per_image(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "domains c"],
    shift: Float[Array, "domains c"],
    membership: Float[np.ndarray, "groups block domains"],
) -> Float[Array, "b h w c"]:
    """x * scale + shift, each image with the pair of its domain."""
    pair = jnp.stack([scale, shift], axis=1)
    # A product with the mask instead of a gather or a slice: its transpose is one sum over the
    # images, so one all-reduce brings the gradients of scale and shift for both domains.
    mask = jnp.asarray(membership, pair.dtype)[..., None, None]
    images = jnp.sum(mask * pair, axis=2).reshape(x.shape[0], 2, -1)
    return x * images[:, 0, None, None] + images[:, 1, None, None]
