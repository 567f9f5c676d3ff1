"""The train state, and the conversion of variables between networks with one and two norms.

Domain-specific batch normalisation (section 2.2) has a weak and a strong norm; see `models.dsbn`.
"""

import functools
from collections.abc import Callable
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
from semiseg_jax.runtime import hashes

# {"params": …, "batch_stats_weak": …, "batch_stats_strong": …}
Variables = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """The state that a training step updates and a checkpoint stores.

    Attributes:
        step: number of finished steps in this stage, an int32 scalar.
        params: parameters of the network.
        norms: the collections of norm statistics by name, such as "batch_stats_weak".
        opt_state: state of the optimiser.
        method: state of the method beside the network's, such as an averaged teacher; a tree of
            arrays, {} without any.
    """

    step: Any
    params: Any
    norms: dict[str, Any]
    opt_state: optax.OptState
    method: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> Variables:
        """The variables for `nn.Module.apply`."""
        return {"params": self.params, **self.norms}


def init_variables(model: nn.Module, seed: int, mesh: Mesh) -> Variables:
    """Returns random initial variables of both domains, replicated over the mesh.

    The values depend on the seed alone, not on the mesh.
    """
    return _init_program(model, mesh)(jax.random.key(seed))


@functools.lru_cache(maxsize=16)
def _init_program(model: nn.Module, mesh: Mesh) -> Callable[[Array], Variables]:
    # The program runs once and draws each kernel separately: optimising it takes several times
    # longer than running it.
    return jax.jit(
        functools.partial(_init, model),
        out_shardings=mesh_lib.replicated(mesh),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def variable_shapes(model: nn.Module) -> Variables:
    """Returns the variables of the network as jax.ShapeDtypeStruct leaves."""
    # A copy, which the caller may change.
    return jax.tree.map(lambda leaf: leaf, _variable_shapes(model))


@functools.lru_cache(maxsize=16)
def _variable_shapes(model: nn.Module) -> Variables:
    return jax.eval_shape(functools.partial(_init, model), jax.random.key(0))


def _init(model: nn.Module, key: Array) -> Variables:
    # Two images, one per domain. The parameters do not depend on the image size.
    images = jnp.zeros((2, 65, 65, 3), jnp.uint8)
    return model.init({"params": key}, images, domain="both")


def create_train_state(
    variables: Variables,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    init_method: Callable[[Variables], Any] = lambda variables: {},
) -> TrainState:
    """Returns the state at step 0, replicated over the mesh.

    Copies the variables: a training step donates its state, and they stay usable.

    Args:
        variables: of the network.
        tx: the optimiser.
        mesh: to put the state on.
        init_method: makes the state of the method from the variables.
    """

    def init_state(variables: Variables) -> TrainState:
        params = variables["params"]
        norms = {name: v for name, v in variables.items() if name != "params"}
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, norms, tx.init(params), init_method(variables))

    copies = jax.tree.map(jnp.copy, variables)
    return jax.jit(init_state, out_shardings=mesh_lib.replicated(mesh))(copies)


def copy_weak_to_strong(variables: Variables) -> Variables:
    """Returns variables whose strong norm is a copy of the weak one, for the first student.

    Statistics and affine parameters that both domains share are unchanged.
    """
    return match_norm_kind(inference_variables(variables), variables)


def match_norm_kind(variables: Variables, shapes: Variables) -> Variables:
    """Converts variables to a network that differs in its kind of norm (`model.norm`) alone.

    If the variables lack the network's strong norm, it becomes a copy of their weak norm. A norm
    that the network lacks is dropped.

    Args:
        variables: variables with a weak norm.
        shapes: variables of the network, from `variable_shapes`; only their names are read.

    Raises:
        KeyError: the networks differ in more than the kind of norm.
    """
    leaves = traverse_util.flatten_dict(variables)
    to_weak = {"strong": "weak", stats_collection("strong"): stats_collection("weak")}

    def leaf(path: tuple[str, ...]) -> Any:
        return leaves[path] if path in leaves else leaves[tuple(to_weak.get(p, p) for p in path)]

    paths = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: leaf(path) for path in paths})


def inference_variables(variables: Variables) -> Variables:
    """Returns the variables without the strong norm: all that domain="weak" reads.

    A network without batch norms has parameters alone.
    """
    params = traverse_util.flatten_dict(variables["params"])
    weak_params = {path: leaf for path, leaf in params.items() if "strong" not in path}
    weak_stats = stats_collection("weak")
    stats = {weak_stats: variables[weak_stats]} if weak_stats in variables else {}
    return {"params": traverse_util.unflatten_dict(weak_params), **stats}


def variables_hash(variables: Variables) -> str:
    """Returns a hash of the names and the bytes of all variables, 16 hex digits."""
    return hashes.hash_arrays(traverse_util.flatten_dict(variables, sep="/"))
