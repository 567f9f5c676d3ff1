"""Distribution-specific batch normalisation (DSBN): separate norms for weak and strong images.

Source: Yuan et al., ICCV 2021, section 2.2, equations 1 to 3. Running moments are stored in two
variable collections, `batch_stats_weak` and `batch_stats_strong`, affine parameters in `params`
under `weak` and `strong`. The assignment of images to norms is static: it is part of the compiled
program.
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

# Name of a batch's moments for checkpoint policies. Rematerialised blocks save the moments, because
# computing them again would cost another all-reduce.
MOMENTS = "batch_moments"


def stats_collection(domain: str) -> str:
    """Returns the name of the variable collection with the running moments of a domain."""
    return f"batch_stats_{domain}"


@dataclasses.dataclass(frozen=True)
class DomainLayout:
    """How a batch divides into domains, and whether to train on it.

    It is a static argument of the compiled program, and therefore hashable.

    Attributes:
        domain: "weak", "strong", or "both".
        train: normalise with the batch's moments, update the running moments, apply dropout.
        groups: with "both", the number of equal blocks in the batch. Each block consists of weak
            images followed by strong images. With one block per device, joining the weak and the
            strong stream moves no image between devices.
        num_weak: with "both", the number of weak images in each block; None for half of the block.
    """

    domain: Domain
    train: bool
    groups: int = 1
    num_weak: int | None = None

    def domains(self) -> tuple[str, ...]:
        """Returns the domains of the batch, in the order of the columns of `membership`."""
        return DOMAINS if self.domain == "both" else (self.domain,)

    def membership(self, batch_size: int) -> Float[np.ndarray, "groups block domains"]:
        """Returns 1 where an image, by block and position in it, belongs to the domain, else 0.

        Raises:
            ValueError: the batch does not divide as described.
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

    def rng_ids(self, batch_size: int) -> Int[np.ndarray, " b"]:
        """Returns an id for each image, to fold into the random key of the image.

        The id encodes the domain and the position among the images of that domain, and therefore
        does not depend on the number of groups.
        """
        if self.domain != "both":
            return np.arange(batch_size) * 2 + (self.domain == "strong")
        is_strong = self.membership(batch_size)[..., 1].ravel() == 1
        position = np.where(is_strong, np.cumsum(is_strong), np.cumsum(~is_strong)) - 1
        return position * 2 + is_strong


class DomainNorm(nn.Module):
    """Batch normalisation over [batch, height, width], with a separate norm for each domain.

    Moments are computed per image in float32, combined per domain, and applied as one scale and
    one shift per image. Activations are therefore never sliced or concatenated by domain, and on a
    mesh one all-reduce carries the moments of both domains, as it does for a single domain.

    Attributes:
        kind: "dsbn"; "dsbn_shared_affine" (separate moments, one affine pair: Split-BN); "shared"
            (one norm for all images); "frozen" (one norm with the running moments of the loaded
            weights, which training does not update; the affine parameters are trained).
        momentum: weight of the old running moment in an update (flax's convention; alpha in
            equation 3).
        epsilon: added to the variance.
        dtype: of the result; None to promote the dtypes of input and parameters. Moments and
            parameters are float32 (moments are float64 for float64 input).
    """

    kind: NormKind
    momentum: float
    epsilon: float
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: DomainLayout, scale_init=nn.initializers.ones
    ) -> Float[Array, "b h w c"]:
        """Normalises x; in training, updates the running moments of the batch's domains.

        The running variance is the biased estimate (flax's convention).
        """
        channels = x.shape[-1]
        if self.kind in ("shared", "frozen"):
            layout = dataclasses.replace(layout, domain="weak")
        domains = layout.domains()
        affine = self._affine_parameters(domains, channels, scale_init)
        running = self._running_moments(domains, channels)

        membership = layout.membership(x.shape[0])
        if layout.train and self.kind != "frozen":
            mean, variance = _batch_moments(x, membership)
            if not self.is_initializing():
                for i, domain in enumerate(domains):
                    self._update_running(running[domain], mean[i], variance[i])
        else:
            mean = jnp.stack([running[d]["mean"].value for d in domains])
            variance = jnp.stack([running[d]["var"].value for d in domains])

        # Equation 2, with the mean folded into the shift.
        gamma = jnp.stack([affine[d][0] for d in domains])
        beta = jnp.stack([affine[d][1] for d in domains])
        scale = gamma * jax.lax.rsqrt(variance + self.epsilon)
        shift = beta - mean * scale
        y = _apply_per_image(x, scale, shift, membership)
        return y if self.dtype is None else y.astype(self.dtype)

    def _affine_parameters(self, domains: Sequence[str], channels: int, scale_init):
        """Returns {domain: (gamma [c], beta [c])}; one shared pair unless `kind` is "dsbn"."""
        if self.kind != "dsbn":
            pair = Affine(channels, scale_init, name="weak")()
            return dict.fromkeys(DOMAINS, pair)
        return {d: Affine(channels, scale_init, name=d)() for d in domains}

    def _running_moments(self, domains: Sequence[str], channels: int):
        """Returns {domain: {"mean": variable [c], "var": variable [c]}}; creates them in `init`."""
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

    def _update_running(
        self, moments, mean: Float[Array, " c"], variance: Float[Array, " c"]
    ) -> None:
        """Moves the running moments towards the batch's (equation 3, for the variance)."""
        for variable, new in ((moments["mean"], mean), (moments["var"], variance)):
            old = variable.value
            variable.value = (self.momentum * old + (1 - self.momentum) * new).astype(old.dtype)


@dataclasses.dataclass(frozen=True)
class DomainNormFactory:
    """Makes the norms of a network, which differ in their names alone; see `DomainNorm`.

    Two networks with equal factories are equal, which two partial functions are not: programs of
    equal networks are compiled once.
    """

    kind: NormKind
    momentum: float
    epsilon: float
    dtype: DTypeLike | None = None

    def __call__(self, name: str | None = None) -> DomainNorm:
        """Returns the norm with this name in its parent."""
        return DomainNorm(self.kind, self.momentum, self.epsilon, self.dtype, name=name)


class Affine(nn.Module):
    """The affine parameters of one domain."""

    channels: int
    scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Returns (scale, bias), both [channels] float32."""
        scale = self.param("scale", self.scale_init, (self.channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        return scale, bias


def _batch_moments(
    x: Float[Array, "b h w c"], membership: Float[np.ndarray, "groups block domains"]
) -> tuple[Float[Array, "domains c"], Float[Array, "domains c"]]:
    """Mean and biased variance of each domain over its images and pixels (equation 1)."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # E[x^2] - E[x]^2 reads the activations once; both moments are in one array, so that one
    # all-reduce carries them for every domain.
    per_image = jnp.stack([jnp.mean(x, axis=(1, 2)), jnp.mean(x * x, axis=(1, 2))], axis=1)
    blocks = per_image.reshape(*membership.shape[:2], 1, 2, x.shape[-1])
    share = jnp.asarray(membership / membership.sum(axis=(0, 1)), x.dtype)
    moments = jnp.sum(blocks * share[..., None, None], axis=(0, 1))
    moments = checkpoint_name(moments, MOMENTS)
    mean, square = moments[:, 0], moments[:, 1]
    # Rounding can make the variance of a constant channel slightly negative.
    return mean, jnp.maximum(square - mean * mean, 0)


def _apply_per_image(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "domains c"],
    shift: Float[Array, "domains c"],
    membership: Float[np.ndarray, "groups block domains"],
) -> Float[Array, "b h w c"]:
    """Returns x * scale + shift, with the scale and shift of each image's domain."""
    pair = jnp.stack([scale, shift], axis=1)
    # A product with the mask instead of a gather or a slice: its transpose is one sum over the
    # images, so one all-reduce brings the gradients of scale and shift for both domains.
    mask = jnp.asarray(membership, pair.dtype)[..., None, None]
    images = jnp.sum(mask * pair, axis=2).reshape(x.shape[0], 2, -1)
    return x * images[:, 0, None, None] + images[:, 1, None, None]
