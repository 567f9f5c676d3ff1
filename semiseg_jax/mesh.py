"""The device mesh: one axis, `data`; batches are split over it, everything else is replicated."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from semiseg_jax.runtime.errors import UserError

DATA_AXIS = "data"

# With few images per chip the TPU's compiler moves rows and columns of the images into the batch
# dimension around each convolution and back between the convolutions (space-to-batch);
# docs/scaling.md has the memory traffic that this costs. Both options are needed to turn it off.
_COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    }
}


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh of all devices (or of the given ones) with one axis, `data`.

    The compiler chooses every sharding that the program leaves unspecified. The devices of a
    process are adjacent, so that the process's shard of a batch is one contiguous range of images.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def round_up_batch(images: int, devices: int) -> int:
    """Rounds a number of images up to a multiple of the number of devices.

    For labelling and evaluation, whose results do not depend on the batch size: the additional
    places are filled with empty images.
    """
    return -(-images // devices) * devices


def check_batches(config: Any, devices: int) -> None:
    """Raises an error for training batches that do not divide over devices and micro-batches.

    They are not rounded, because another batch size is another training recipe.

    Args:
        config: the whole config.
        devices: number of devices.

    Raises:
        UserError: names the key of the batch.
    """
    accumulate = config.train.accumulate
    for name in ("batch_labeled", "batch_unlabeled"):
        size = config.train[name]
        if size % (devices * accumulate):
            turns = f", {accumulate} times each" if accumulate > 1 else ""
            raise UserError(
                f"train.{name} is {size}, which does not divide over {devices} devices{turns}: "
                f"make it a multiple of {devices * accumulate}.",
                code="batch-not-divisible",
            )


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """Returns the `jax.jit` compiler options for programs with convolutions on a mesh."""
    return _COMPILER_OPTIONS.get(platform(mesh))


def platform(mesh: Mesh) -> str:
    """Returns the platform of the mesh's devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def try_compile(traced: jax.stages.Traced) -> jax.stages.Compiled | str:
    """Compiles a program; returns the compiler's message if a device's memory is too small for it.

    Args:
        traced: the program, for the devices of its shardings.

    Raises:
        jax.errors.JaxRuntimeError: the program cannot be compiled for another reason.
    """
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the leading axis, images, is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def shard_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Assembles global arrays from the shard of each process, without waiting for the transfer.

    Args:
        batch: this process's shard, arrays or trees of arrays, leading axis the images, in the
            order of its devices.
        mesh: over the devices of all processes.
    """
    sharding = batch_sharding(mesh)
    place = functools.partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(place, batch)


def join_blocks(groups: int, *batches: Any) -> Any:
    """Joins batches so that no image leaves its device: block by block, not end to end.

    Args:
        groups: number of devices; batches are in as many equal blocks.
        batches: trees of arrays [n, ...] of one structure; n may differ.
    """

    def join(*leaves: Shaped[Array, "_n *rest"]) -> Shaped[Array, "_m *rest"]:
        blocks = [leaf.reshape(groups, -1, *leaf.shape[1:]) for leaf in leaves]
        joined = jnp.concatenate(blocks, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    return jax.tree.map(join, *batches)


def local_data(array: jax.Array) -> np.ndarray:
    """Returns this process's shard of a batch as a NumPy array; the inverse of `to_devices`."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
