"""The pure, jitted training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer, Shaped

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.labels import IGNORE
from semiseg_jax.data.streams import Streams
from semiseg_jax.state import TrainState

Metrics = dict[str, Float[Array, ""]]
Batch = dict[str, Array]


def pseudo_loss_map(terms: losses.PixelTerms, loss_config: Any) -> Float[Array, "*pixels"]:
    """The loss that `config.loss` gives to pseudo-labelled pixels."""
    knobs = loss_config.scl
    match loss_config.unlabeled:
        case "ce":
            return terms.cross_entropy
        case "sce":
            return losses.symmetric_cross_entropy_map(
                terms, knobs.label_floor, knobs.alpha, knobs.beta
            )
        case kind:
            return losses.self_correction_map(
                terms,
                direction="official" if kind == "scl_official" else "paper",
                stop_gradient=knobs.stop_gradient,
                label_floor=knobs.label_floor,
                saturate=knobs.saturate,
                alpha=knobs.alpha,
                beta=knobs.beta,
            )


def loss_sums(
    logits: Float[Array, "n h w classes"],
    labels: Integer[Array, "n h w"],
    is_pseudo: Bool[Array, " n"],
    loss_config: Any,
) -> Float[Array, "7"]:
    """Sums over the valid pixels, for `from_sums`; those of parts of a batch add up.

    An image's loss follows from `is_pseudo` alone, whatever its stream.

    Returns:
        Cross-entropy of the labelled pixels; loss and largest softmax value (w before
        `loss.scl.saturate`) of the pseudo-labelled ones; how many of these, and how many of the
        labelled ones, are predicted as their label says; how many labelled ones there are, and how
        many pseudo-labelled ones.
    """
    terms = losses.pixel_terms(logits, labels, IGNORE)
    pseudo = is_pseudo[:, None, None] & terms.valid
    labeled = ~is_pseudo[:, None, None] & terms.valid
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(terms.miss.dtype)
    per_pixel = [
        (terms.cross_entropy, labeled),
        (pseudo_loss_map(terms, loss_config), pseudo),
        (terms.confidence, pseudo),
        (correct, pseudo),
        (correct, labeled),
    ]
    # Sums by image first, then over the batch in one array: one all-reduce for all of them.
    columns = [jnp.where(mask, value, 0) for value, mask in per_pixel] + [
        mask.astype(terms.miss.dtype) for mask in (labeled, pseudo)
    ]
    return jnp.sum(jnp.stack([c.sum(axis=(1, 2)) for c in columns], axis=1), axis=0)


def from_sums(
    sums: Float[Array, "7"], loss_config: Any, counts: Float[Array, "2"] | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the labelled images plus the unlabelled loss of the pseudo-labelled.

    Each is the mean over its own valid pixels of the global batch (ICCV 2021, eq. 3).

    Args:
        sums: from `loss_sums`.
        loss_config: `config.loss`.
        counts: valid pixels with true and with pseudo-labels to divide by, where `sums` are those
            of a part of the batch.
    """
    num_labeled, num_pseudo = jnp.maximum(sums[5:] if counts is None else counts, 1)
    supervised = sums[0] / num_labeled
    unsupervised = sums[1] / num_pseudo
    total = supervised + loss_config.unlabeled_weight * unsupervised
    return total, {
        "loss": total,
        "loss_labeled": supervised,
        "loss_pseudo": unsupervised,
        "mean_w": sums[2] / num_pseudo,
        "agreement": sums[3] / num_pseudo,
        "accuracy_labeled": sums[4] / num_labeled,
    }


def valid_pixels(batch: Batch, dtype: Any) -> Float[Array, "2"]:
    """How many pixels of a batch have true labels, and how many pseudo-labels."""
    valid = jnp.sum(batch["label"] != IGNORE, axis=(1, 2), dtype=dtype)
    return jnp.stack([jnp.sum(valid * of) for of in (~batch["is_pseudo"], batch["is_pseudo"])])


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_config: Any,
    streams: Streams,
    mesh: Mesh,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """The step of a stage: one pass of the network over both streams, loss, update.

    The batch is {"image": uint8 [n, h, w, 3], "label": uint8 [n, h, w], "is_pseudo": bool [n]},
    split by image over the mesh, in blocks as `streams.slots` joins them. The state is donated.
    Statistics and normalisers are those of the global batch, because the program is written for
    it.

    With `streams.parts` the network sees a micro-batch at a time, which needs memory for that one
    alone, and the gradients add up to one update. The loss is that of the whole batch, normalisers
    included; batch norm normalises each micro-batch by its own moments, and the running ones move
    with each in turn.

    Args:
        model: from `deeplab.build`.
        tx: the optimiser.
        loss_config: `config.loss`.
        streams: what a batch holds.
        mesh: to run on.

    Returns:
        step(state, batch, key) -> (state, metrics); `key` is the stage's dropout key, and the
        step folds its number into it.
    """
    passes = _Passes(model, loss_config, streams, mesh.size)

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        whole_or_parts = passes.one if streams.parts == 1 else passes.parts
        gradients, sums, norms = whole_or_parts(state.params, state.norms, batch, key)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, norms, opt_state)
        metrics = from_sums(sums, loss_config)[1] | {"gradient_norm": optax.tree.norm(gradients)}
        return state, metrics

    whole, split = mesh_lib.replicated(mesh), mesh_lib.split_by_image(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, split, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
        compiler_options=mesh_lib.compiler_options(mesh),
    )


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Forward and backward through the network: of a batch at once, or part by part.

    Attributes:
        model: from `deeplab.build`.
        loss_config: `config.loss`.
        streams: what a batch holds.
        groups: blocks of the joined batch, one a device.
    """

    model: nn.Module
    loss_config: Any
    streams: Streams
    groups: int

    def one(
        self,
        params: Any,
        norms: dict[str, Any],
        batch: Batch,
        key: Array,
        counts: Float[Array, "2"] | None = None,
    ) -> tuple[Any, Float[Array, "7"], dict[str, Any]]:
        """Gradients, `loss_sums`, and the norms' new statistics.

        Args:
            params: of the network.
            norms: its statistics collections.
            batch: a whole one or a part.
            key: of dropout.
            counts: see `from_sums`; given for a part.
        """
        blocks = self.groups * self.streams.parts
        both = self.streams.domain == "both"

        def loss(params: Any) -> tuple[Float[Array, ""], tuple[Array, dict[str, Any]]]:
            logits, updated = self.model.apply(
                {"params": params, **norms},
                batch["image"],
                domain=self.streams.domain,
                groups=self.groups,
                num_weak=self.streams.size("weak") // blocks if both else None,
                train=True,
                mutable=list(norms),
                rngs={"dropout": key},
            )
            sums = loss_sums(logits, batch["label"], batch["is_pseudo"], self.loss_config)
            return from_sums(sums, self.loss_config, counts)[0], (sums, updated)

        gradients, (sums, updated) = jax.grad(loss, has_aux=True)(params)
        # A domain that took no part comes back as it went in.
        return gradients, sums, {**norms, **updated}

    def parts(
        self, params: Any, norms: dict[str, Any], batch: Batch, key: Array
    ) -> tuple[Any, Float[Array, "7"], dict[str, Any]]:
        """As `one`, a micro-batch after the other; the loss is divided by the whole batch's pixels,
        so that the gradients add up to those of the whole."""
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        counts = valid_pixels(batch, dtype)

        def add(carry: Any, turn: Any) -> tuple[Any, None]:
            (norms, *before), (number, part) = carry, turn
            *added, norms = self.one(params, norms, part, jax.random.fold_in(key, number), counts)
            return (norms, *jax.tree.map(jnp.add, before, added)), None

        nothing = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(7, dtype))
        turns = (jnp.arange(self.streams.parts), jax.tree.map(self._turns, batch))
        (norms, gradients, sums), _ = jax.lax.scan(add, (norms, *nothing), turns)
        return gradients, sums, norms

    def _turns(self, leaf: Shaped[Array, "n *rest"]) -> Shaped[Array, "parts m *rest"]:
        """A batch as its micro-batches; what a device holds of each is in its own block already."""
        blocks = leaf.reshape(self.groups, self.streams.parts, -1, *leaf.shape[1:]).swapaxes(0, 1)
        return blocks.reshape(self.streams.parts, -1, *leaf.shape[1:])
