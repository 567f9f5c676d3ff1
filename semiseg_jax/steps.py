"""The pure, jitted training step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.labels import IGNORE
from semiseg_jax.data.streams import Streams
from semiseg_jax.state import TrainState

Metrics = dict[str, Float[Array, ""]]


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


def batch_loss(
    logits: Float[Array, "n h w classes"],
    labels: Integer[Array, "n h w"],
    is_pseudo: Bool[Array, " n"],
    loss_config: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the labelled images plus the unlabelled loss of the pseudo-labelled.

    Each is the mean over its own valid pixels of the global batch (ICCV 2021, eq. 3). An image's
    loss follows from `is_pseudo` alone, whatever its stream.
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
    sums = jnp.sum(jnp.stack([c.sum(axis=(1, 2)) for c in columns], axis=1), axis=0)
    num_labeled, num_pseudo = jnp.maximum(sums[5], 1), jnp.maximum(sums[6], 1)
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


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_config: Any,
    streams: Streams,
    mesh: Mesh,
) -> Callable[[TrainState, dict[str, Array], Array], tuple[TrainState, Metrics]]:
    """The step of a stage: one pass of the network over both streams, loss, update.

    The batch is {"image": uint8 [n, h, w, 3], "label": uint8 [n, h, w], "is_pseudo": bool [n]},
    split by image over the mesh, in blocks as `pipeline.slots` joins them. The state is donated.
    Statistics and normalisers are those of the global batch, because the program is written for
    it.

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
    groups = mesh.size
    num_weak = streams.size("weak") // groups if streams.domain == "both" else None

    def step(state: TrainState, batch: dict[str, Array], key: Array) -> tuple[TrainState, Metrics]:
        def loss(params: Any) -> tuple[Float[Array, ""], tuple[Metrics, dict[str, Any]]]:
            logits, updated = model.apply(
                {"params": params, **state.norms},
                batch["image"],
                domain=streams.domain,
                groups=groups,
                num_weak=num_weak,
                train=True,
                mutable=list(state.norms),
                rngs={"dropout": jax.random.fold_in(key, state.step)},
            )
            value, metrics = batch_loss(logits, batch["label"], batch["is_pseudo"], loss_config)
            return value, (metrics, updated)

        gradients, (metrics, norms) = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A domain that took no part comes back as it went in.
        state = TrainState(state.step + 1, params, {**state.norms, **norms}, opt_state)
        return state, metrics | {"gradient_norm": optax.tree.norm(gradients)}

    whole, split = mesh_lib.replicated(mesh), mesh_lib.split_by_image(mesh)
    return jax.jit(
        step, in_shardings=(whole, split, whole), out_shardings=(whole, whole), donate_argnums=0
    )
