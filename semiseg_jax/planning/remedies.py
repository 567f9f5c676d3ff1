"""What makes a program fit that does not: changes to the config, each tried by compiling it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.errors import UserError
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.programs import Cost, Counted, Program, TooLarge

Change = dict[str, Any]  # values by dotted key


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change to the config, what the program is with it, and whether it fits."""

    change: Change
    program: Program
    fits: bool

    def __str__(self) -> str:
        """As options of the command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.change.items())


def fits(cost: Cost | TooLarge | Counted, limit: int) -> bool:
    """Whether the compiler placed a program, within a limit in bytes."""
    return isinstance(cost, Cost) and cost.memory.total <= limit


def tried(
    config: Any, kind: str, make: Callable[[Any], Program], topology: Topology, limit: int
) -> list[Remedy]:
    """Changes that may make a program fit, the smallest first, up to one that does.

    All single changes are tried, and where none helps, several together. Rematerialisation
    comes first because it computes the same, bfloat16 next, which rounds. Micro-batches keep the
    batch, its loss and its update, but each is normalised by its own moments (see
    `steps.make_train_step`); smaller batches change the recipe.

    Args:
        config: with which it does not fit.
        kind: of the program.
        make: compiles the program of a config.
        topology: whose devices batches must divide over.
        limit: bytes that there are on one of them.
    """
    remedies = []
    devices = len(topology.devices)
    singles = _changes(config, kind, devices)
    for together in range(1, len(singles) + 1):
        for combined in itertools.combinations(singles, together):
            change = {key: value for single in combined for key, value in single.items()}
            candidate = changed(config, change)
            if not _divides(candidate, devices):
                continue  # Half of the batch may be too small for micro-batches.
            program = make(candidate)
            remedies.append(Remedy(change, program, fits(program.cost, limit)))
            if together > 1 and remedies[-1].fits:
                return remedies
        if any(remedy.fits for remedy in remedies):
            break
    return remedies


def changed(config: Any, change: Change) -> Any:
    """A copy of the config with some values replaced."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(change)
    return copy


def _changes(config: Any, kind: str, devices: int) -> list[Change]:
    """Single changes that lower a program's memory, smallest first."""
    changes: list[Change] = []
    is_step = kind.endswith("step")
    if is_step and not config.model.remat:
        changes.append({"model.remat": True})
    if config.model.compute_dtype != "bfloat16":
        changes.append({"model.compute_dtype": "bfloat16"})
    if is_step and (parts := _micro_batches(config, devices)):
        changes.append({"train.accumulate": parts})
    if is_step:
        keys = ["train.batch_labeled", "train.batch_unlabeled"]
        blocks = devices * config.train.accumulate
    else:
        keys = ["pseudo.batch" if kind == "labelling" else "eval.batch"]
        blocks = devices
    smaller: Change = {}
    for key in keys:
        section, name = key.split(".")
        # Those of labelling and evaluation fill the devices, so they may be more than is asked for.
        half = mesh_lib.batch_over(config[section][name], blocks) // 2 // blocks * blocks
        if half:
            smaller[key] = half
    if smaller:
        changes.append(smaller)
    return changes


def _micro_batches(config: Any, devices: int) -> int | None:
    """The fewest that are more than now and divide the batches; None where nothing does."""
    train = config.train
    most = min(train.batch_labeled, train.batch_unlabeled) // devices
    for parts in range(train.accumulate + 1, most + 1):
        if _divides(changed(config, {"train.accumulate": parts}), devices):
            return parts
    return None


def _divides(config: Any, devices: int) -> bool:
    try:
        mesh_lib.check_batches(config, devices)
    except UserError:
        return False
    return True
