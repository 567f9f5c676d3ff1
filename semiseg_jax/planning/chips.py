"""TPU chips as published, and the devices of a topology that need not be there."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from semiseg_jax.errors import UserError, first_line

CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's published rates and size.

    Attributes:
        flops: peak of bfloat16 products with float32 sums, operations a second.
        memory_rate: of the main memory (HBM), bytes a second.
        link_rate: of all links to other chips together, bytes a second one way.
        memory: bytes of main memory.
        accelerator: what its slices are called, with the number behind it to count by.
        cores: TensorCores of a chip, by which some slices are counted.
        options: further ones to describe its topologies by.
    """

    flops: float
    memory_rate: float
    link_rate: float
    memory: int
    accelerator: str
    cores: int = 1
    options: tuple[tuple[str, str], ...] = ()


# From the system architecture pages of Cloud TPU's documentation, one for each version ("TPU v4",
# "TPU v5e", "TPU v5p", "TPU v6e"): peak compute per chip (bf16), HBM bandwidth and capacity, and
# inter-chip interconnect bandwidth: 2,400, 1,600, 4,800 and 3,584 Gbps.
CHIPS: dict[str, Chip] = {
    # As pods run it, the two cores of a chip are one device.
    "v4": Chip(275e12, 1228e9, 300e9, 32 * 2**30, "v4-", 2, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 819e9, 200e9, 16 * 2**30, "v5litepod-"),
    "v5p": Chip(459e12, 2765e9, 600e9, 95 * 2**30, "v5p-", 2),
    "v6e": Chip(918e12, 1640e9, 448e9, 32 * 2**30, "v6e-"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: as it was asked for, such as v5e:4x4.
        devices: one for each chip.
        hosts: machines that they hang on.
        chip: their rates; None for the CPU.
    """

    name: str
    devices: tuple[jax.Device, ...]
    hosts: int
    chip: Chip | None


def topology(name: str) -> Topology:
    """The devices of a topology: VERSION:AxB or VERSION:AxBxC, or the CPU of this machine.

    Raises:
        UserError: it does not exist, or the TPU's compiler is not installed.
    """
    if name == CPU:
        return Topology(name, tuple(jax.devices(CPU)), 1, None)
    version, _, shape = name.partition(":")
    if version not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={name} is not known: write {CPU}, or one of {', '.join(CHIPS)} with the "
            "number of chips along each axis, such as v5e:4x4 or v4:2x2x4."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU's compiler, which is not installed: pip install "
            "libtpu==0.0.42.1, or look at --topology=cpu."
        )
    chip = CHIPS[version]
    sides = [int(side) for side in shape.split("x")]
    _describe(chip, math.prod(sides))
    options: dict[str, Any] = dict(chip.options)
    if math.prod(sides) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found: list[Any] = topologies.get_topology_desc(name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"--topology={name} does not exist ({reason}): v5e and v6e have two axes, v4 and v5p "
            "three, all even but for a single chip."
        ) from error
    hosts = len({device.process_index for device in found})
    return Topology(name, tuple(found), hosts, chip)


def _describe(chip: Chip, chips: int) -> None:
    """What libtpu would otherwise ask the machine it runs on for, and complain of not finding."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # No chip is opened, so that there is nothing that processes could take from each other.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = f"{chip.accelerator}{chips * chip.cores}"
