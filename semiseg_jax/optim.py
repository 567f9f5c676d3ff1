"""Optimisers, the poly schedule, and the parameter groups: learning-rate factor and weight decay.

A parameter belongs to a named group by the first rule that matches its path. An optimiser reads
the factor on the learning rate and the weight decay of a parameter from its group alone. The
optimisers have PyTorch's order of operations.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

Schedule = Callable[[jax.Array], jax.Array]
# (pattern of the parameter's path, name of the group, decayed)
Rules = Sequence[tuple[str, str, bool]]

# First match wins; every parameter must match.
RULES = (
    (r"^backbone/.*/kernel$", "backbone", True),
    (r"^backbone/.*/(scale|bias)$", "backbone", False),
    # Of vision transformers and ConvNeXt: layer scale, and the tokens that are learned.
    (r"^backbone/(.*/)?(gamma|cls_token|storage_tokens|pos_embed)$", "backbone", False),
    (r".*/kernel$", "head", True),
    (r".*/(scale|bias)$", "head", False),
)


class ParameterGroup(NamedTuple):
    """Parameters that an optimiser treats alike.

    Attributes:
        name: selects the factor on the learning rate.
        decayed: whether weight decay applies.
    """

    name: str
    decayed: bool


def group_of(path: str, rules: Rules = RULES) -> ParameterGroup:
    """Returns the group of the parameter at a path such as "backbone/stem/conv/kernel".

    Raises:
        ValueError: no rule covers the path.
    """
    for pattern, name, decayed in rules:
        if re.match(pattern, path):
            return ParameterGroup(name, decayed)
    raise ValueError(f"No rule of optim.RULES covers the parameter {path}: add one.")


def map_groups(value: Callable[[ParameterGroup], Any], params: Any, rules: Rules = RULES) -> Any:
    """Returns a tree of the structure of `params` with value(group of the parameter) as leaves."""
    paths = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {path: value(group_of(path, rules)) for path in paths}, sep="/"
    )


def table(params: Any, decay_all: bool = False, freeze_backbone: bool = False) -> str:
    """Returns a table for the log: the number of tensors and of parameters in each group.

    Args:
        params: of the network.
        decay_all: `config.optim.decay_all`.
        freeze_backbone: `config.model.freeze_backbone`.
    """

    def treatment(group: ParameterGroup) -> str:
        if freeze_backbone and group.name == "backbone":
            return "frozen"
        return "decayed" if group.decayed else "not decayed"

    totals: dict[ParameterGroup, list[int]] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        group = group_of(path)
        total = totals.setdefault(group._replace(decayed=group.decayed or decay_all), [0, 0])
        total[0] += 1
        total[1] += leaf.size
    return "\n".join(
        f"  {group.name:8s} {treatment(group):11s} {tensors:4d} tensors {numbers:12,d} numbers"
        for group, (tensors, numbers) in sorted(totals.items())
    )


def poly(learning_rate: float, steps: int, power: float) -> Schedule:
    """Returns the schedule learning_rate * (1 - step / steps) ^ power, 0 from the last step on.

    Source: DeepLab (Chen et al., 2017), section 4.1.
    """
    return optax.polynomial_schedule(learning_rate, 0.0, power, steps)


def rate_factor(config: Any) -> float:
    """Returns the factor on all learning rates for a batch other than `optim.reference_batch`.

    Source: the linear scaling rule, Goyal et al., 2017, section 2.1.
    """
    reference = config.optim.reference_batch
    return config.train.batch_labeled / reference if reference else 1.0


def decay_weights(
    weight_decay: float, rules: Rules = RULES, decay_all: bool = False
) -> optax.GradientTransformation:
    """Adds weight_decay * parameter to the updates of the decayed groups.

    Args:
        weight_decay: at least 0.
        rules: see `RULES`.
        decay_all: decay every group.
    """

    def is_decayed(group: ParameterGroup) -> bool:
        return group.decayed or decay_all

    return optax.add_decayed_weights(
        weight_decay, mask=lambda params: map_groups(is_decayed, params, rules)
    )


def scale_by_group(
    factors: Mapping[str, float], rules: Rules = RULES
) -> optax.GradientTransformation:
    """Multiplies the updates of each group by the group's factor on the learning rate.

    Args:
        factors: by name of the group, for every group of the rules.
        rules: see `RULES`.

    Raises:
        ValueError: a group of the rules has no factor.
    """
    if missing := {name for _, name, _ in rules} - factors.keys():
        raise ValueError(
            f"The parameter groups {', '.join(sorted(missing))} have no factor on the learning "
            f"rate; there are factors for {', '.join(factors)}."
        )

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        by_leaf = map_groups(lambda group: factors[group.name], updates, rules)
        return jax.tree.map(jnp.multiply, updates, by_leaf)

    return optax.stateless(scale)


_EMBEDDINGS = re.compile(r"^backbone/(patch_embed/|cls_token|storage_tokens|pos_embed)")
_BLOCK = re.compile(r"^backbone/block_(\d+)/")


def layers_behind(paths: Iterable[str]) -> dict[str, int]:
    """Returns for each parameter of a vision transformer how many layers lie behind its own.

    0 for the head and the final norm, 1 for the last block, and so on; the embeddings, class and
    storage tokens are the first layer.

    Source: `get_num_layer_for_vit` of BEiT (Bao et al., ICLR 2022).
    """
    blocks = {path: int(match[1]) for path in paths if (match := _BLOCK.match(path))}
    depth = max(blocks.values(), default=-1) + 1
    behind = {path: depth - number for path, number in blocks.items()}
    return {path: behind.get(path, depth + 1 if _EMBEDDINGS.match(path) else 0) for path in paths}


def scale_by_layer(layer_decay: float) -> optax.GradientTransformation:
    """Multiplies the updates of each parameter by layer_decay ^ `layers_behind`."""

    def scale(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        flat = traverse_util.flatten_dict(updates, sep="/")
        behind = layers_behind(tuple(flat))
        scaled = {path: update * layer_decay ** behind[path] for path, update in flat.items()}
        return traverse_util.unflatten_dict(scaled, sep="/")

    return optax.stateless(scale)


def freeze(tx: optax.GradientTransformation, name: str) -> optax.GradientTransformation:
    """Applies an optimiser to all parameters but those of one module, which stay as they are.

    It has no state for them: neither momentum nor weight decay can move them.

    Args:
        tx: the optimiser.
        name: of the module, a key of the parameters.
    """

    def others(tree: Any) -> Any:
        return {key: value for key, value in tree.items() if key != name}

    def init(params: optax.Params) -> optax.OptState:
        return tx.init(others(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        given = None if params is None else others(params)
        trained, state = tx.update(others(updates), state, given)
        # Adding -0.0 changes no bit of any number; 0.0 would make 0.0 of -0.0.
        still = {
            key: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), value)
            for key, value in updates.items()
            if key == name
        }
        return {**trained, **still}, state

    return optax.GradientTransformation(init, update)


def sgd(
    optim_config: Any, schedule: Schedule, factors: Mapping[str, float], rules: Rules = RULES
) -> optax.GradientTransformation:
    """SGD with momentum, in PyTorch's order of operations.

    Decay is added to the gradient before the momentum, the learning rate is applied after it.
    Checkpoints hold the state of this chain by position: a reordered or longer chain cannot
    restore them.

    Args:
        optim_config: `config.optim`.
        schedule: learning rate of a group with factor 1.
        factors: on the learning rate, by name of the group.
        rules: see `RULES`.
    """
    return optax.chain(
        decay_weights(optim_config.weight_decay, rules, optim_config.decay_all),
        optax.trace(optim_config.momentum),
        scale_by_group(factors, rules),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_adam(betas: tuple[float, float], epsilon: float) -> optax.GradientTransformation:
    """Replaces gradients by m / (sqrt(v) + epsilon), with m and v corrected for their start at 0.

    As optax.scale_by_adam, but 1 - beta^t is computed to float32 rounding: there, powers of a
    float32 .999 make the first updates wrong by 1e-5 of their size.

    Args:
        betas: weights of the former m, the mean of gradients, and v, the mean of their squares.
        epsilon: above 0.
    """
    log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
    b1, b2 = betas

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = [jax.tree.map(jnp.zeros_like, params) for _ in betas]
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = state.count + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            steps = count.astype(m.dtype)
            start1, start2 = (-jnp.expm1(steps * log_beta) for log_beta in log_betas)
            return m / start1 / (jnp.sqrt(v) / jnp.sqrt(start2) + epsilon)

        return jax.tree.map(direction, first, second), optax.ScaleByAdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def adam(
    optim_config: Any, schedule: Schedule, factors: Mapping[str, float], rules: Rules = RULES
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, ICLR 2015); weight decay is added to the gradient.

    Arguments as for `sgd`, and its note on checkpoints.
    """
    return optax.chain(
        decay_weights(optim_config.weight_decay, rules, optim_config.decay_all),
        scale_by_adam(optim_config.betas, optim_config.epsilon),
        scale_by_group(factors, rules),
        optax.scale_by_learning_rate(schedule),
    )


def adamw(
    optim_config: Any, schedule: Schedule, factors: Mapping[str, float], rules: Rules = RULES
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, ICLR 2019): weight decay is apart from Adam's means.

    The learning rate of the group multiplies both. Arguments as for `sgd`, and its note on
    checkpoints.
    """
    return optax.chain(
        scale_by_adam(optim_config.betas, optim_config.epsilon),
        decay_weights(optim_config.weight_decay, rules, optim_config.decay_all),
        scale_by_group(factors, rules),
        optax.scale_by_learning_rate(schedule),
    )


# By the name that `optim.kind` has: a function of the arguments of `sgd`.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
}


def make_optimizer(
    optim_config: Any,
    kind: str,
    num_steps: int,
    factor: float = 1.0,
    freeze_backbone: bool = False,
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimiser of a stage, and the schedule of the backbone's learning rate.

    Args:
        optim_config: `config.optim`; its `kind` is a key of `OPTIMIZERS`.
        kind: of the stage, "teacher", "student" or "control" (which has the student's rates).
        num_steps: steps of the stage.
        factor: on all learning rates, from `rate_factor`.
        freeze_backbone: `config.model.freeze_backbone`.
    """
    rates = optim_config.teacher if kind == "teacher" else optim_config.student
    schedule = poly(factor * rates.learning_rate, num_steps, optim_config.poly_power)
    factors = {"backbone": 1.0, "head": rates.head_multiplier}
    tx = OPTIMIZERS[optim_config.kind](optim_config, schedule, factors)
    if optim_config.layer_decay != 1:
        # Behind the optimiser, so that momentum and Adam's means do not see it.
        tx = optax.chain(tx, scale_by_layer(optim_config.layer_decay))
    return (freeze(tx, "backbone") if freeze_backbone else tx), schedule
