"""The pure, jitted training step: forward pass, loss, gradients, update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer, Shaped

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.losses import IGNORE
from semiseg_jax.train_state import TrainState

Metrics = dict[str, Float[Array, ""]]
# {"image": uint8 [n, h, w, 3], "label": uint8 [n, h, w], "is_pseudo": bool [n]}
Batch = dict[str, Array]
# (params, norm statistics, batch, dropout key) -> (logits, new norm statistics)
Forward = Callable[[Any, dict[str, Any], Batch, Array], tuple[Array, dict[str, Any]]]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_config: Any,
    spec: BatchSpec,
    mesh: Mesh,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """Compiles the step of a stage: one pass of the network over both streams, loss, update.

    The batch is split by image over the mesh, in blocks as `lay_out_batch` joins them. The state is
    donated. Statistics and normalisers are those of the global batch, because the program is
    written for the global batch.

    With `spec.accum_steps` > 1 the network processes one micro-batch at a time, which needs memory
    for that micro-batch alone, and the gradients add up to one update. The loss is that of the
    whole batch, normalisers included; batch norm normalises each micro-batch by its own moments,
    and the running moments move with each micro-batch in turn.

    Args:
        model: from `deeplab.build`.
        tx: the optimiser.
        loss_config: `config.loss`.
        spec: the images of a batch.
        mesh: to run on.

    Returns:
        step(state, batch, key) -> (state, metrics); `key` is the dropout key of the stage, into
        which the step folds its number.
    """
    forward = functools.partial(_forward, model, spec, mesh.size)

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if spec.accum_steps == 1:
            grads, sums, norms = gradients(
                forward, loss_config, state.params, state.norms, batch, key
            )
        else:
            micro_batches = split_microbatches(batch, mesh.size, spec.accum_steps)
            grads, sums, norms = accumulated_gradients(
                forward, loss_config, state.params, state.norms, batch, micro_batches, key
            )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, norms, opt_state)
        return state, sums.metrics(loss_config) | {"gradient_norm": optax.tree.norm(grads)}

    replicated, by_image = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(replicated, by_image, replicated),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
        compiler_options=mesh_lib.compiler_options(mesh),
    )


def _forward(
    model: nn.Module,
    spec: BatchSpec,
    groups: int,
    params: Any,
    norms: dict[str, Any],
    batch: Batch,
    key: Array,
) -> tuple[Float[Array, "n h w classes"], dict[str, Any]]:
    """Logits of a batch or micro-batch in training mode, and the new norm statistics.

    Args:
        model: from `deeplab.build`.
        spec: the images of a batch.
        groups: blocks of the joined batch, one for each device.
        params: of the network.
        norms: its statistics collections.
        batch: a whole batch, or a micro-batch.
        key: of dropout.
    """
    both = spec.domain == "both"
    logits, updated = model.apply(
        {"params": params, **norms},
        batch["image"],
        domain=spec.domain,
        groups=groups,
        num_weak=spec.size("weak") // (groups * spec.accum_steps) if both else None,
        train=True,
        mutable=list(norms),
        rngs={"dropout": key},
    )
    # A domain that took no part keeps its statistics.
    return logits, {**norms, **updated}


class LossSums(NamedTuple):
    """Sums over the valid pixels of a batch; the sums of micro-batches add up. Each a scalar.

    Attributes:
        loss_labeled: cross-entropy of the labelled pixels.
        loss_pseudo: loss of the pseudo-labelled pixels.
        confidence_pseudo: their largest softmax values, w of equation 5 before
            `loss.scl.saturate`.
        correct_pseudo: how many of them are predicted as their label says.
        correct_labeled: how many of the labelled pixels are.
        num_labeled: labelled pixels.
        num_pseudo: pseudo-labelled pixels.
    """

    loss_labeled: Float[Array, ""]
    loss_pseudo: Float[Array, ""]
    confidence_pseudo: Float[Array, ""]
    correct_pseudo: Float[Array, ""]
    correct_labeled: Float[Array, ""]
    num_labeled: Float[Array, ""]
    num_pseudo: Float[Array, ""]

    @classmethod
    def compute(
        cls,
        logits: Float[Array, "n h w classes"],
        labels: Integer[Array, "n h w"],
        is_pseudo: Bool[Array, " n"],
        loss_config: Any,
    ) -> "LossSums":
        """The sums of a batch; the loss of an image follows from `is_pseudo`, not its stream."""
        terms = losses.pixel_terms(logits, labels, IGNORE)
        pseudo = is_pseudo[:, None, None] & terms.valid
        labeled = ~is_pseudo[:, None, None] & terms.valid
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(terms.miss.dtype)
        masked_values = [
            (terms.cross_entropy, labeled),
            (pseudo_loss_map(terms, loss_config), pseudo),
            (terms.confidence, pseudo),
            (correct, pseudo),
            (correct, labeled),
        ]
        # Sums by image first, then over the batch in one array: one all-reduce for all of them.
        columns = [jnp.where(mask, value, 0) for value, mask in masked_values] + [
            mask.astype(terms.miss.dtype) for mask in (labeled, pseudo)
        ]
        by_image = jnp.stack([column.sum(axis=(1, 2)) for column in columns], axis=1)
        return cls(*jnp.sum(by_image, axis=0))

    def loss(self, loss_config: Any, counts: tuple[Array, Array] | None = None) -> Float[Array, ""]:
        """Cross-entropy of the labelled pixels plus the weighted loss of the pseudo-labelled.

        Each is the mean over its own valid pixels of the global batch (ICCV 2021, Algorithm 1).

        Args:
            loss_config: `config.loss`.
            counts: (labelled, pseudo-labelled) valid pixels to divide by, where these are the sums
                of a micro-batch.
        """
        num_labeled, num_pseudo = counts or (self.num_labeled, self.num_pseudo)
        supervised = self.loss_labeled / jnp.maximum(num_labeled, 1)
        unsupervised = self.loss_pseudo / jnp.maximum(num_pseudo, 1)
        return supervised + loss_config.unlabeled_weight * unsupervised

    def metrics(self, loss_config: Any) -> Metrics:
        """The metrics of a step, from the sums of its whole batch."""
        num_labeled = jnp.maximum(self.num_labeled, 1)
        num_pseudo = jnp.maximum(self.num_pseudo, 1)
        return {
            "loss": self.loss(loss_config),
            "loss_labeled": self.loss_labeled / num_labeled,
            "loss_pseudo": self.loss_pseudo / num_pseudo,
            "mean_w": self.confidence_pseudo / num_pseudo,
            "agreement": self.correct_pseudo / num_pseudo,
            "accuracy_labeled": self.correct_labeled / num_labeled,
        }


def pseudo_loss_map(terms: losses.PixelTerms, loss_config: Any) -> Float[Array, "*pixels"]:
    """The loss of pseudo-labelled pixels by `config.loss`; self-correction is equation 5."""
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


def gradients(
    forward: Forward,
    loss_config: Any,
    params: Any,
    norms: dict[str, Any],
    batch: Batch,
    key: Array,
    counts: tuple[Array, Array] | None = None,
) -> tuple[Any, LossSums, dict[str, Any]]:
    """Gradients of the loss of a batch, its sums, and the new norm statistics.

    Args:
        forward: the network.
        loss_config: `config.loss`.
        params: of the network.
        norms: its statistics collections.
        batch: a whole batch, or a micro-batch.
        key: of dropout.
        counts: see `LossSums.loss`; given for a micro-batch.
    """

    def loss(params: Any) -> tuple[Float[Array, ""], tuple[LossSums, dict[str, Any]]]:
        logits, updated = forward(params, norms, batch, key)
        sums = LossSums.compute(logits, batch["label"], batch["is_pseudo"], loss_config)
        return sums.loss(loss_config, counts), (sums, updated)

    grads, (sums, updated) = jax.grad(loss, has_aux=True)(params)
    return grads, sums, updated


def accumulated_gradients(
    forward: Forward,
    loss_config: Any,
    params: Any,
    norms: dict[str, Any],
    batch: Batch,
    micro_batches: Batch,
    key: Array,
) -> tuple[Any, LossSums, dict[str, Any]]:
    """As `gradients`, one micro-batch after the other.

    The loss of each is divided by the valid pixels of the whole batch, so that the gradients add up
    to those of the whole batch.

    Args:
        forward: the network.
        loss_config: `config.loss`.
        params: of the network.
        norms: its statistics collections.
        batch: the whole batch.
        micro_batches: the same images, from `split_microbatches`.
        key: of dropout; the number of the micro-batch is folded into it.
    """
    dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
    counts = valid_pixels(batch, dtype)

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        (norms, *totals), (number, micro_batch) = carry, numbered
        folded = jax.random.fold_in(key, number)
        *added, norms = gradients(forward, loss_config, params, norms, micro_batch, folded, counts)
        return (norms, *jax.tree.map(jnp.add, totals, added)), None

    zero = jnp.zeros((), dtype)
    zeros = (jax.tree.map(jnp.zeros_like, params), LossSums(*[zero] * len(LossSums._fields)))
    numbered = (jnp.arange(len(micro_batches["is_pseudo"])), micro_batches)
    (norms, grads, sums), _ = jax.lax.scan(add, (norms, *zeros), numbered)
    return grads, sums, norms


def split_microbatches(batch: Batch, groups: int, accum_steps: int) -> Batch:
    """A batch [n, ...] as its micro-batches [accum_steps, n / accum_steps, ...].

    A device already holds its images of each micro-batch in its own block, so nothing moves.

    Args:
        batch: in blocks as `lay_out_batch` joins them.
        groups: blocks, one for each device.
        accum_steps: micro-batches.
    """

    def split(leaf: Shaped[Array, "n *rest"]) -> Shaped[Array, "micro m *rest"]:
        blocks = leaf.reshape(groups, accum_steps, -1, *leaf.shape[1:]).swapaxes(0, 1)
        return blocks.reshape(accum_steps, -1, *leaf.shape[1:])

    return jax.tree.map(split, batch)


def valid_pixels(batch: Batch, dtype: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many valid pixels of a batch have true labels, and how many pseudo-labels."""
    valid = jnp.sum(batch["label"] != IGNORE, axis=(1, 2), dtype=dtype)
    is_pseudo = batch["is_pseudo"]
    return jnp.sum(valid * ~is_pseudo), jnp.sum(valid * is_pseudo)
