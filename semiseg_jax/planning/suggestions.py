"""Suggests config changes that make a program fit into memory; each is tested by compiling it."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import stages
from semiseg_jax.losses import supervised_loss
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.programs import Cost, Counted, Program, TooLarge
from semiseg_jax.runtime.errors import UserError

Change = dict[str, Any]  # new values by dotted config key


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change to the config, the program compiled with it, and whether that program fits."""

    change: Change
    program: Program
    fits: bool

    def __str__(self) -> str:
        """Formats the change as command-line options."""
        return " ".join(f"--config.{key}={value}" for key, value in self.change.items())


def fits(cost: Cost | TooLarge | Counted, limit: int) -> bool:
    """Returns whether the program compiled and needs at most `limit` bytes."""
    return isinstance(cost, Cost) and cost.memory.total <= limit


def try_changes(
    config: Any,
    kind: str,
    compile_program: Callable[[Any], Program],
    topology: Topology,
    limit: int,
) -> list[Suggestion]:
    """Compiles a program with changes that may make it fit, the smallest change first.

    Every single change is compiled. If none of them fits, combinations are compiled until one does.
    Rematerialisation is first because it computes the same values; bfloat16 is next, it only
    rounds. Micro-batches keep the batch, its loss and its update, but normalise each micro-batch
    by its own moments (see `train_step.make_train_step`). Smaller batches change the recipe.

    Args:
        config: the config whose program does not fit.
        kind: kind of the program.
        compile_program: compiles the program of a config.
        topology: the batches must be divisible by its number of devices.
        limit: bytes of memory of one device.
    """
    suggestions = []
    num_devices = len(topology.devices)
    singles = _single_changes(config, kind, num_devices)
    for size in range(1, len(singles) + 1):
        for combination in itertools.combinations(singles, size):
            change = {key: value for single in combination for key, value in single.items()}
            candidate = with_change(config, change)
            if not _are_batches_valid(candidate, num_devices):
                continue  # Half of the batch may be too small for micro-batches.
            program = compile_program(candidate)
            suggestions.append(Suggestion(change, program, fits(program.cost, limit)))
            if size > 1 and suggestions[-1].fits:
                return suggestions
        if any(suggestion.fits for suggestion in suggestions):
            break
    return suggestions


def with_change(config: Any, change: Change) -> Any:
    """Returns a copy of the config with some values replaced."""
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(change)
    return copy


def _single_changes(config: Any, kind: str, num_devices: int) -> list[Change]:
    """Returns the changes that lower the memory of a program, the smallest first."""
    changes: list[Change] = []
    is_step = kind.endswith("step")
    if is_step and not config.model.remat:
        changes.append({"model.remat": True})
    if config.model.compute_dtype != "bfloat16":
        changes.append({"model.compute_dtype": "bfloat16"})
    if is_step and (count := _more_micro_batches(config, num_devices)):
        changes.append({"train.accumulate": count})
    if is_step:
        keys = ["train.batch_labeled", "train.batch_unlabeled"]
        divisor = num_devices * config.train.accumulate
    else:
        keys = ["pseudo.batch" if kind == "labelling" else "eval.batch"]
        divisor = num_devices
    smaller_batch: Change = {}
    for key in keys:
        section, name = key.split(".")
        # Labelling and evaluation round their batch up to a multiple of the devices.
        half = mesh_lib.round_up_batch(config[section][name], divisor) // 2 // divisor * divisor
        if half:
            smaller_batch[key] = half
    if smaller_batch:
        changes.append(smaller_batch)
    return changes


def _more_micro_batches(config: Any, num_devices: int) -> int | None:
    """Returns the next larger number of micro-batches that divides the batches, None if none."""
    train = config.train
    most = min(train.batch_labeled, train.batch_unlabeled) // num_devices
    for count in range(train.accumulate + 1, most + 1):
        if _are_batches_valid(with_change(config, {"train.accumulate": count}), num_devices):
            return count
    return None


def _are_batches_valid(config: Any, num_devices: int) -> bool:
    try:
        mesh_lib.check_batches(config, num_devices)
        stages.check_norm_values(config)
        supervised_loss.check(config)
    except UserError:
        return False
    return True
