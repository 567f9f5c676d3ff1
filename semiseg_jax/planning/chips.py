"""Published rates of TPU chips, and device topologies to compile for without the hardware."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError, first_line

CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates and memory size of one TPU chip.

    Attributes:
        flops: peak rate of bfloat16 products with float32 accumulation, in operations per second.
        memory_rate: bandwidth of the main memory (HBM), in bytes per second.
        link_rate: bandwidth of all links to other chips together, one way, in bytes per second.
        memory: size of the main memory, in bytes.
        accelerator: prefix of the accelerator type of its slices, such as "v5litepod-".
        cores: TensorCores per chip; the number in an accelerator type counts TensorCores.
        options: further options of `topologies.get_topology_desc`.
    """

    flops: float
    memory_rate: float
    link_rate: float
    memory: int
    accelerator: str
    cores: int = 1
    options: tuple[tuple[str, str], ...] = ()


# Source: the system architecture pages of the Cloud TPU documentation ("TPU v4", "TPU v5e",
# "TPU v5p", "TPU v6e"): peak compute per chip (bf16), HBM bandwidth and capacity, and inter-chip
# interconnect bandwidth (2,400, 1,600, 4,800 and 3,584 Gbps).
CHIPS: dict[str, Chip] = {
    # Megacore: the two cores of a chip act as one device, as on pods.
    "v4": Chip(275e12, 1228e9, 300e9, 32 * 2**30, "v4-", 2, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 200e9, 16 * 2**30, "v5litepod-"),
    "v5p": Chip(459e12, 2765e9, 600e9, 95 * 2**30, "v5p-", 2),
    "v6e": Chip(918e12, 1640e9, 448e9, 32 * 2**30, "v6e-"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: value of --topology, such as v5e:4x4.
        devices: one device per chip.
        hosts: number of host machines.
        chip: rates of the chips; None for the CPU and for the devices of this machine.
    """

    name: str
    devices: tuple[jax.Device, ...]
    hosts: int
    chip: Chip | None


def topology(name: str) -> Topology:
    """Returns the devices of a topology.

    Args:
        name: VERSION:AxB or VERSION:AxBxC, such as v5e:4x4, or "cpu" for the CPU of this machine.

    Raises:
        UserError: the topology does not exist, or the TPU compiler is not installed.
    """
    if name == CPU:
        return Topology(name, tuple(jax.devices(CPU)), 1, None)
    version, _, shape = name.partition(":")
    if version not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={name} is not known: write {CPU}, or one of {', '.join(CHIPS)} with the "
            "number of chips along each axis, such as v5e:4x4 or v4:2x2x4.",
            code="topology-unknown",
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU's compiler, which is not installed: pip install "
            "libtpu==0.0.42.1, or look at --topology=cpu.",
            code="tpu-compiler-missing",
        )
    chip = CHIPS[version]
    sides = [int(side) for side in shape.split("x")]
    _set_libtpu_environment(chip, math.prod(sides))
    options: dict[str, Any] = dict(chip.options)
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices: list[Any] = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--topology={name} does not exist ({reason}): v5e and v6e have two axes, v4 and v5p "
            "three, all even but for a single chip.",
            code="topology-nonexistent",
        ) from error
    hosts = len({device.process_index for device in devices})
    return Topology(name, tuple(devices), hosts, chip)


def this_machine(mesh: Mesh) -> Topology:
    """Returns the devices that a run computes on as a topology, without published rates."""
    return Topology("here", tuple(mesh.devices.flat), multihost.process_count(), None)


def _set_libtpu_environment(chip: Chip, num_chips: int) -> None:
    """Sets the variables that libtpu would otherwise query from a TPU host, with warnings."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No chip is opened, so several processes may load libtpu at the same time.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.accelerator}{num_chips * chip.cores}"
