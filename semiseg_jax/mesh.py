"""The device mesh: one axis, `data`, over which batches are split and all else is copied."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from semiseg_jax.errors import UserError

DATA_AXIS = "data"

# With few images a chip the TPU's compiler turns rows and columns of an image into batch around
# each convolution, and back for what lies between them; docs/scaling.md says what that moves. It is
# off only when both options say so.
_COMPILER_OPTIONS: dict[str, dict[str, bool]] = {
    "tpu": {
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    }
}


def keep_compiled_programs(folder: os.PathLike | str) -> None:
    """Keeps what JAX compiles in a folder, so that a restart does not compile again."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def compute_on_cpu() -> None:
    """Has JAX compute on the CPU, one step at a time; call it before JAX has started its backend.

    A call of a compiled program then returns when its results are there. Otherwise JAX dispatches
    ahead, so that the next step's buffers are allocated while a step still runs: with Xception-65
    at 4x257x257 on two cores a step took 3.5 to 4.0 s, and takes 2.6 to 2.7 s one at a time. There
    is nothing to gain from dispatching ahead, because the CPU that would dispatch is the one that
    computes. Programs over several devices go on as they were.

    No other platform is asked for: the TPU's runtime, where it is installed to compile with (see
    `plan`), prints a page about the chips that it does not find.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given) with the compiler placing what we leave open.

    The devices of a process stand together, so that its part of a batch is one piece of it.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_over(images: int, devices: int) -> int:
    """The fewest images, at least as many as given, that divide over the devices.

    For batches that no result follows from, those of labelling and of evaluation: what is too much
    is filled with empty images.
    """
    return -(-images // devices) * devices


def check_batches(config: Any, devices: int) -> None:
    """Refuses training batches that do not divide over the devices, or there into micro-batches.

    No other number is taken for them, because the recipe is another with it.

    Args:
        config: the whole config.
        devices: how many there are.

    Raises:
        UserError: naming the batch's key.
    """
    parts = config.train.accumulate
    for name in ("batch_labeled", "batch_unlabeled"):
        size = config.train[name]
        if size % (devices * parts):
            turns = f", {parts} times each" if parts > 1 else ""
            raise UserError(
                f"train.{name} is {size}, which does not divide over {devices} devices{turns}: "
                f"make it a multiple of {devices * parts}."
            )


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """What programs with convolutions are compiled with on a mesh; for `jax.jit`."""
    return _COMPILER_OPTIONS.get(platform(mesh))


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def compiled(traced: jax.stages.Traced) -> jax.stages.Compiled | str:
    """The compiled program, or what the compiler says where a device has not the memory for it.

    Args:
        traced: the program, for the devices of its shardings.
    """
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return str(error)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_image(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from each process's part, on their way while the caller goes on.

    Args:
        batch: this process's images, in the order of its devices; leading axis the images.
        mesh: of all processes.
    """
    sharding = split_by_image(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def from_devices(array: jax.Array) -> np.ndarray:
    """This process's images of an array that is split by image; the way back of `to_devices`."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
