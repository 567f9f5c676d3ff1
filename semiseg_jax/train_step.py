"""The pure, jitted training step: forward pass, loss, gradients, update."""

import dataclasses
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
from semiseg_jax.losses import IGNORE, supervised_loss
from semiseg_jax.methods import method as method_lib
from semiseg_jax.methods.adversarial_method import AdversarialMethod
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.methods.network import Network
from semiseg_jax.models.segmenter import Features
from semiseg_jax.train_state import TrainState

# Scalars, and of methods arrays [classes] too.
Metrics = dict[str, Float[Array, "*classes"]]
# {"image": uint8 [n, h, w, 3], "label": uint8 [n, h, w], "is_pseudo": bool [n]}, and with cached
# features {"features": segmenter.Features of the weak images}.
Batch = dict[str, Any]
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
        loss_config: `config.loss`, from `supervised_loss.resolve`.
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
        params, opt_state = _update(tx, grads, state.opt_state, state.params)
        state = TrainState(state.step + 1, params, norms, opt_state)
        return state, sums.metrics(loss_config) | {"gradient_norm": optax.tree.norm(grads)}

    return _compile(step, mesh)


def make_method_step(
    method: OnlineMethod,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_config: Any,
    mesh: Mesh,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """Compiles the step of a stage whose method labels images inside the step.

    As `make_train_step`; the batch has the views of the unlabelled images too (see
    `input_pipeline.TrainBatch`). The method's own state is updated after the parameters. A
    discriminator is updated from the same forward pass, by its own loss and optimiser; neither
    update sees the other's.

    Args:
        method: of the stage.
        model, tx, loss_config, mesh: as for `make_train_step`; the optimiser also updates the
            auxiliary networks of the method.
    """

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        dropout_key, method_key = jax.random.split(jax.random.fold_in(key, state.step))
        images = method_batch(batch, method)
        beside: method_lib.State = state.method

        def loss(params: Any, auxiliary: Any) -> tuple[Float[Array, ""], tuple[Any, Any, Any]]:
            network = Network(model, params, state.norms, dropout_key, mesh.size)
            labeled_metrics: dict[str, Array] = {}

            def labeled_loss(logits: Array, labels: Array) -> Array:
                value, metrics = supervised_loss.mean_loss(logits, labels, loss_config)
                # Those of the network: methods may have the loss of other logits too, after it.
                labeled_metrics.update(metrics | labeled_metrics)
                return value

            given = dataclasses.replace(beside, auxiliary=beside.auxiliary | auxiliary)
            outcome = method.loss(network, labeled_loss, given, images, state.step, method_key)
            return outcome.loss, (outcome, network.norms, labeled_metrics)

        trained = {k: v for k, v in beside.auxiliary.items() if k == "params"}
        grads, (outcome, norms, labeled_metrics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
            state.params, trained
        )
        params, opt_state = _update(tx, grads[0], state.opt_state, state.params)
        auxiliary, auxiliary_opt_state = beside.auxiliary, beside.opt_state
        if trained:
            updated, auxiliary_opt_state = _update(
                tx, grads[1]["params"], beside.opt_state, trained["params"]
            )
            auxiliary = auxiliary | outcome.statistics | {"params": updated}
        own = method.update_state(beside.own, {"params": params, **norms}, state.step)
        metrics = outcome.metrics() | labeled_metrics | {"gradient_norm": optax.tree.norm(grads)}
        discriminator = beside.discriminator
        if isinstance(method, AdversarialMethod):
            discriminator, found = method.update_discriminator(
                discriminator, outcome.examples, method_key
            )
            metrics |= found
        beside = method_lib.State(own, auxiliary, auxiliary_opt_state, discriminator)
        return TrainState(state.step + 1, params, norms, opt_state, beside), metrics

    return _compile(step, mesh)


def method_batch(batch: Batch, method: OnlineMethod) -> method_lib.Batch:
    """Returns the batch of a step as methods take it; without a weak view that part is empty.

    Args:
        batch: as `make_method_step` takes it.
        method: of the stage.
    """
    weak, views = method.views.weak, batch["views"]
    return method_lib.Batch(
        image=batch["image"],
        label=batch["label"],
        weak=views[:, 0] if weak else views[:, :0].reshape(0, *views.shape[2:]),
        strong=views[:, weak:],
        valid=batch["valid"],
    )


def _update(
    tx: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """The parameters and the state of the optimiser after an update."""
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _compile(step: Callable, mesh: Mesh) -> Callable:
    """Jits a step with its state replicated, and donated, and its batch split by image."""
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
    num_weak = spec.size("weak") // (groups * spec.accum_steps) if both else None
    inputs = batch["image"]
    if spec.cache_features:
        inputs = _join_cached(model, groups, num_weak, {"params": params, **norms}, batch)
    logits, updated = model.apply(
        {"params": params, **norms},
        inputs,
        domain=spec.domain,
        groups=groups,
        num_weak=num_weak,
        train=True,
        mutable=list(norms),
        rngs={"dropout": key},
        method="decode" if spec.cache_features else None,
    )
    # A domain that took no part keeps its statistics.
    return logits, {**norms, **updated}


def _join_cached(
    model: nn.Module, groups: int, num_weak: int | None, variables: Any, batch: Batch
) -> Features:
    """The frozen backbone's features of a batch: those of its weak images are in it already.

    Args:
        model: from `deeplab.build`.
        groups: blocks of the joined batch.
        num_weak: weak images in each block, which strong ones follow; None if all are weak.
        variables: of the network.
        batch: a whole batch, or a micro-batch.
    """
    if num_weak is None:
        return batch["features"]
    images = batch["image"]
    blocks = images.reshape(groups, -1, *images.shape[1:])[:, num_weak:]
    strong = model.apply(
        variables, blocks.reshape(-1, *images.shape[1:]), domain="strong", method="encode"
    )
    return mesh_lib.join_blocks(groups, batch["features"], strong)


class LossSums(NamedTuple):
    """Sums over the valid pixels of a batch; the sums of micro-batches add up. Each a scalar.

    Attributes:
        loss_labeled: loss of the labelled pixels, times their class weights.
        loss_pseudo: loss of the pseudo-labelled pixels.
        confidence_pseudo: their largest softmax values, w of equation 5 before
            `loss.scl.saturate`.
        correct_pseudo: how many of them are predicted as their label says.
        correct_labeled: how many of the labelled pixels are.
        num_labeled: labelled pixels.
        num_pseudo: pseudo-labelled pixels.
        weight_labeled: what `loss_labeled` is divided by: class weights of the labelled pixels that
            have a loss, which is their number without class weights.
        kept_labeled: labelled pixels that have a loss; OHEM leaves some out.
        dice_labeled: Dice loss of the labelled pixels, 0 without one. It is no sum over pixels, and
            `supervised_loss.check` refuses micro-batches for it.
    """

    loss_labeled: Float[Array, ""]
    loss_pseudo: Float[Array, ""]
    confidence_pseudo: Float[Array, ""]
    correct_pseudo: Float[Array, ""]
    correct_labeled: Float[Array, ""]
    num_labeled: Float[Array, ""]
    num_pseudo: Float[Array, ""]
    weight_labeled: Float[Array, ""]
    kept_labeled: Float[Array, ""]
    dice_labeled: Float[Array, ""]

    @classmethod
    def compute(
        cls,
        logits: Float[Array, "n h w classes"],
        labels: Integer[Array, "n h w"],
        is_pseudo: Bool[Array, " n"],
        loss_config: Any,
    ) -> "LossSums":
        """The sums of a batch; the loss of an image follows from `is_pseudo`, not its stream.

        Args:
            logits: of the global batch, or of a micro-batch of it.
            labels: class ids, or IGNORE.
            is_pseudo: whether the label of an image is a pseudo-label.
            loss_config: `config.loss`, from `supervised_loss.resolve`.
        """
        terms = losses.pixel_terms(logits, labels, IGNORE)
        pseudo = is_pseudo[:, None, None] & terms.valid
        labeled = ~is_pseudo[:, None, None] & terms.valid
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(terms.miss.dtype)
        supervised = supervised_loss.supervised_pixels(terms, labels, labeled, loss_config)
        columns = {
            "loss_labeled": jnp.where(supervised.kept, supervised.loss, 0),
            "loss_pseudo": jnp.where(pseudo, pseudo_loss_map(terms, loss_config), 0),
            "confidence_pseudo": jnp.where(pseudo, terms.confidence, 0),
            "correct_pseudo": jnp.where(pseudo, correct, 0),
            "correct_labeled": jnp.where(labeled, correct, 0),
            "num_labeled": labeled.astype(terms.miss.dtype),
            "num_pseudo": pseudo.astype(terms.miss.dtype),
        }
        if not supervised_loss.is_plain_mean(loss_config):
            columns["weight_labeled"] = jnp.where(supervised.kept, supervised.weight, 0)
            columns["kept_labeled"] = supervised.kept.astype(terms.miss.dtype)
        # Sums by image first, then over the batch in one array: one all-reduce for all of them.
        by_image = jnp.stack([column.sum(axis=(1, 2)) for column in columns.values()], axis=1)
        sums = dict(zip(columns, jnp.sum(by_image, axis=0), strict=True))
        plain = dict.fromkeys(("weight_labeled", "kept_labeled"), sums["num_labeled"])
        dice = supervised_loss.dice_loss(logits, labels, labeled, loss_config)
        return cls(**(plain | sums), dice_labeled=dice)

    def loss(
        self, loss_config: Any, divisors: tuple[Array, Array] | None = None
    ) -> Float[Array, ""]:
        """Loss of the labelled pixels plus the weighted loss of the pseudo-labelled.

        Each is the mean over its own valid pixels of the global batch (ICCV 2021, Algorithm 1);
        `supervised_loss` has the means that a config may select for labelled pixels instead.

        Args:
            loss_config: `config.loss`.
            divisors: what to divide the two losses by, from `loss_divisors`, where these are the
                sums of a micro-batch.
        """
        weight_labeled, num_pseudo = divisors or (self.weight_labeled, self.num_pseudo)
        unsupervised = self.loss_pseudo / jnp.maximum(num_pseudo, 1)
        supervised = self._supervised(weight_labeled)
        return supervised + loss_config.unlabeled_weight * unsupervised

    def _supervised(self, weight_labeled: Float[Array, ""]) -> Float[Array, ""]:
        """Loss of the labelled pixels, divided by the given weight; 0 without labelled pixels."""
        return supervised_loss.divided(self.loss_labeled, weight_labeled) + self.dice_labeled

    def metrics(self, loss_config: Any) -> Metrics:
        """The metrics of a step, from the sums of its whole batch."""
        num_labeled = jnp.maximum(self.num_labeled, 1)
        num_pseudo = jnp.maximum(self.num_pseudo, 1)
        kept = {"kept_labeled": self.kept_labeled / num_labeled}
        return {
            "loss": self.loss(loss_config),
            "loss_labeled": self._supervised(self.weight_labeled),
            "loss_pseudo": self.loss_pseudo / num_pseudo,
            "mean_w": self.confidence_pseudo / num_pseudo,
            "agreement": self.correct_pseudo / num_pseudo,
            "accuracy_labeled": self.correct_labeled / num_labeled,
        } | (kept if loss_config.labeled == "ohem" else {})


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
    divisors: tuple[Array, Array] | None = None,
) -> tuple[Any, LossSums, dict[str, Any]]:
    """Gradients of the loss of a batch, its sums, and the new norm statistics.

    Args:
        forward: the network.
        loss_config: `config.loss`.
        params: of the network.
        norms: its statistics collections.
        batch: a whole batch, or a micro-batch.
        key: of dropout.
        divisors: see `LossSums.loss`; given for a micro-batch.
    """

    def loss(params: Any) -> tuple[Float[Array, ""], tuple[LossSums, dict[str, Any]]]:
        logits, updated = forward(params, norms, batch, key)
        sums = LossSums.compute(logits, batch["label"], batch["is_pseudo"], loss_config)
        return sums.loss(loss_config, divisors), (sums, updated)

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

    The losses of each are divided by `loss_divisors` of the whole batch, so that the gradients add
    up to those of the whole batch.

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
    divisors = loss_divisors(batch, loss_config, dtype)

    def add(carry: Any, numbered: Any) -> tuple[Any, None]:
        (norms, *totals), (number, micro_batch) = carry, numbered
        folded = jax.random.fold_in(key, number)
        *added, norms = gradients(
            forward, loss_config, params, norms, micro_batch, folded, divisors
        )
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


def loss_divisors(
    batch: Batch, loss_config: Any, dtype: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What the losses of a batch are divided by: the labelled and the pseudo-labelled loss.

    That is the number of valid pixels, or the sum of the class weights of the labelled ones.
    Losses whose divisor depends on the network's output are in `supervised_loss.WHOLE_BATCH_KINDS`.
    """
    valid, is_pseudo = batch["label"] != IGNORE, batch["is_pseudo"]
    count = jnp.sum(valid, axis=(1, 2), dtype=dtype)
    weight = count
    if supervised_loss.has_weights(loss_config):
        weights = supervised_loss.pixel_weights(batch["label"], loss_config, dtype)
        weight = jnp.sum(jnp.where(valid, weights, 0), axis=(1, 2))
    return jnp.sum(weight * ~is_pseudo), jnp.sum(count * is_pseudo)
