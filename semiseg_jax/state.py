"""The train state: parameters, both norms' statistics, optimiser; made, copied, and thinned."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models.dsbn import stats_collection

# {"params": …, "batch_stats_weak": …, "batch_stats_strong": …}
Variables = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """What a training step changes, and a checkpoint holds.

    Attributes:
        step: steps done in this stage, an int32 scalar.
        params: parameters.
        norms: the statistics collections, by name.
        opt_state: of the optimiser.
    """

    step: Any
    params: Any
    norms: dict[str, Any]
    opt_state: optax.OptState

    @property
    def variables(self) -> Variables:
        """What the network is applied to."""
        return {"params": self.params, **self.norms}


def init_variables(model: nn.Module, seed: int, mesh: Mesh) -> Variables:
    """Freshly drawn variables of both domains, a copy on every device.

    Depends on the seed alone, not on the mesh.
    """
    # It runs once and draws each kernel by a program of its own: optimising those would take
    # several times longer than running them.
    return jax.jit(
        functools.partial(_init, model),
        out_shardings=mesh_lib.replicated(mesh),
        compiler_options={"xla_backend_optimization_level": 0},
    )(jax.random.key(seed))


def variable_shapes(model: nn.Module) -> Variables:
    """Shapes and dtypes of the network's variables."""
    return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def _init(model: nn.Module, key: Array) -> Variables:
    # Two images: one of each domain. The size is of no consequence to the parameters.
    images = jnp.zeros((2, 65, 65, 3), jnp.uint8)
    return model.init({"params": key}, images, domain="both")


def create(variables: Variables, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0, from variables that stay usable (a step donates its state)."""

    def start(variables: Variables) -> TrainState:
        params = variables["params"]
        norms = {k: v for k, v in variables.items() if k != "params"}
        return TrainState(jnp.zeros((), jnp.int32), params, norms, tx.init(params))

    copied = jax.tree.map(jnp.copy, variables)
    return jax.jit(start, out_shardings=mesh_lib.replicated(mesh))(copied)


def copy_weak_to_strong(variables: Variables) -> Variables:
    """The strong norm becomes a copy of the weak one; how the first student starts.

    Networks whose domains share a norm or its affine parameters come back as they are in that
    part.
    """
    return with_norms_of(for_inference(variables), variables)


def with_norms_of(variables: Variables, shapes: Variables) -> Variables:
    """Weights for a network that differs in its kind of norm alone.

    A norm that the weights lack becomes a copy of their weak one, one that the network lacks is
    left out.

    Args:
        variables: with a weak norm.
        shapes: the network's variables, as `variable_shapes` gives them.
    """
    have = traverse_util.flatten_dict(variables)
    weak = {"strong": "weak", stats_collection("strong"): stats_collection("weak")}

    def take(path: tuple[str, ...]) -> Any:
        return have[path] if path in have else have[tuple(weak.get(p, p) for p in path)]

    wanted = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: take(path) for path in wanted})


def for_inference(variables: Variables) -> Variables:
    """Without the strong norm: what is deployed, and all that domain="weak" reads."""
    params = traverse_util.flatten_dict(variables["params"])
    kept = {path: leaf for path, leaf in params.items() if "strong" not in path}
    weak = stats_collection("weak")
    return {"params": traverse_util.unflatten_dict(kept), weak: variables[weak]}
