"""Checkpoints of a stage (orbax), and the final weights (safetensors)."""

import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging as absl_logging
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Int

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models import weight_files
from semiseg_jax.runtime import fileio, hashes, multihost
from semiseg_jax.runtime.errors import UserError, first_line, reason
from semiseg_jax.runtime.logger import logger
from semiseg_jax.train_state import TrainState, Variables, variables_hash


def _store_small_arrays_whole() -> None:
    """Has orbax cut only arrays of megabytes into slices, one for each device that holds a copy.

    By default it cuts every array, for hosts to share the writing. A network has hundreds of small
    arrays: cutting one takes longer than writing it.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # It warns of every handler that is replaced.
    try:
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
    finally:
        absl_logging.set_verbosity(verbosity)


_store_small_arrays_whole()


class Checkpoints:
    """The checkpoints of one stage; written in the background, the newest two are kept.

    Each holds a hash of its content and the seed of its stage in orbax's custom metadata: a
    damaged checkpoint is not restored, nor one of another stage or run.
    """

    def __init__(self, folder: epath.PathLike, seed: Int[np.ndarray, "2"] | None = None):
        """Opens the folder, and creates it if it is missing.

        Args:
            folder: of the checkpoints.
            seed: `Stage.seed`; checkpoints with another one are refused. None: any is restored.

        Raises:
            UserError: the folder cannot be read or written, or a checkpoint's metadata are damaged.
        """
        self._folder = epath.Path(folder)
        self._seed = [] if seed is None else seed.tolist()
        # On a store without rename a file that is written last, commit_success.txt, marks a
        # checkpoint as complete.
        by_marker = ocp.path.atomicity.CommitFileTemporaryPath
        temporary_path = None if fileio.has_rename(self._folder) else by_marker
        try:
            if self._folder.exists() and not self._folder.is_dir():
                # orbax would notice only as it saves, and then wait for minutes.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._manager = ocp.CheckpointManager(
                self._folder.resolve(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2, create=True, temporary_path_class=temporary_path
                ),
                # Named here, so that a new process can read a checkpoint without saving first.
                item_handlers={"state": ocp.StandardCheckpointHandler()},
            )
        except OSError as error:
            raise UserError(
                f"The folder of checkpoints {self._folder} cannot be opened ({reason(error)}): "
                "make it readable and writable, or give another --workdir.",
                code="checkpoint-folder-unusable",
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # orbax reads the metadata of every checkpoint here.
            raise UserError(
                f"The checkpoints in {self._folder} cannot be opened ({first_line(error)}): "
                f"{_METADATA} of one of them is damaged; remove the folder of that step, and its "
                "steps are trained again.",
                code="checkpoint-metadata-damaged",
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            # The error that ended the stage, if there is one, is the one to report.
            if kind is None:
                raise self._write_error(error) from error

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def restore_newest(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint as (step, state); None if there is none.

        Damaged checkpoints are removed: the steps since the one before are trained again.

        Args:
            like: as for `restore`.

        Raises:
            UserError: the checkpoint has other names, shapes or dtypes, or the storage fails; no
                checkpoint is removed then.
        """
        steps = multihost.broadcast_from_main(
            "checkpoints", lambda: sorted(self._manager.all_steps())
        )
        newest, damage_by_step = None, {}
        for step in reversed(steps):
            state, damage = self._try_restore(step, like)
            if state is not None:
                newest = step, state
                break
            damage_by_step[step] = damage
        # Only now: if the storage fails at the last of them, all of them stay.
        for step, damage in damage_by_step.items():
            logger.info(f"the checkpoint of step {step} is damaged ({damage[:100]}): it is removed")
            self._manager.delete(step)
        return newest

    def _try_restore(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """(state of a step, ""), or (None, what is damaged); the same kind in every process.

        Raises:
            UserError: as `restore`; or the storage fails, and the checkpoint may be sound.
        """
        state, damage, may_be_sound = None, "", False
        try:
            state = self.restore(step, like)
        except (UserError, jax.errors.JaxRuntimeError):
            raise  # The latter if another process ended: the checkpoint is not at fault.
        except Exception as error:  # orbax and tensorstore raise many types.
            damage, may_be_sound = first_line(error), _is_storage_failure(error)
        # A checkpoint that one process cannot read is used by none.
        outcomes = multihost.all_gather("checkpoint read", (damage, may_be_sound))
        for damage, sound in outcomes:
            if sound:
                raise UserError(
                    f"The checkpoint {self._folder / str(step)} cannot be read ({damage}), and may "
                    "be sound: check the storage and start again, or remove that folder to train "
                    "its steps anew.",
                    code="checkpoint-storage-unreadable",
                )
        damage = next((damage for damage, _ in outcomes if damage), "")
        return (None, damage) if damage else (state, "")

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state of a step; returns once the arrays are copied, and writes on after that.

        Raises:
            UserError: this checkpoint, or the one before, cannot be written.
        """
        leaves = _by_name(state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(leaves))
        # Every process holds the whole state and hashes it, at about 1 GB/s.
        metadata = {"hash": _state_hash(leaves, self._seed), "seed": self._seed}
        try:
            self._manager.save(step, args=args, custom_metadata=metadata)
        except jax.errors.JaxRuntimeError:
            raise  # Another process ended.
        except Exception as error:
            raise self._write_error(error) from error

    def _write_error(self, error: Exception) -> UserError:
        """One sentence for the many errors of orbax and tensorstore."""
        return UserError(
            f"A checkpoint cannot be written to {self._folder} ({reason(error)}): make room there "
            "or give another --workdir, and start again; the complete checkpoints are kept.",
            code="checkpoint-unwritable",
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step.

        Args:
            step: of the checkpoint.
            like: shapes, dtypes and shardings of the state, such as arrays of it.

        Raises:
            UserError: the checkpoint has other names, shapes or dtypes, or is of another stage.
            ValueError: it is damaged; orbax raises other types, too.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_name(like))
        self._check_matches(step, wanted)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        saved = self._manager.restore(step, args=args)["state"]
        self._check_content(step, saved)
        # In the order of the state's leaves; dictionaries come back sorted by name.
        leaves = [saved[name] for name in _by_name(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _check_matches(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Refuses other names, shapes or dtypes; orbax would cast to another dtype silently."""
        metadata = self._manager.item_metadata(step)["state"]
        saved = dict(getattr(metadata, "tree", metadata))
        for name in sorted(saved.keys() | wanted.keys()):
            old, new = (
                f"{t[name].dtype}{list(t[name].shape)}" if name in t else "nothing"
                for t in (saved, wanted)
            )
            if old != new:
                raise UserError(
                    f"The checkpoint {self._folder / str(step)} holds {old} as {name} where the "
                    f"config makes {new}: use the config it was made with, or another workdir.",
                    code="checkpoint-of-another-model",
                )

    def _check_content(self, step: int, leaves: Mapping[str, Any]) -> None:
        """Compares a restored checkpoint with its hash, and its seed with that of the stage."""
        folder = self._folder / str(step)
        metadata = _read_custom_metadata(folder / _METADATA)
        if not metadata:
            return  # Written by older code.
        if metadata.get("hash") != _state_hash(leaves, metadata.get("seed")):
            raise ValueError("its content does not have the hash that was stored with it")
        if self._seed and metadata.get("seed") not in ([], self._seed):
            raise UserError(
                f"The checkpoint {folder} is of another stage or of a run with another seed: put "
                "the stage's own checkpoint in its place, or remove that folder, and the stage is "
                "trained again.",
                code="checkpoint-of-another-stage",
            )


# orbax writes this file into the folder of each checkpoint.
_METADATA = "_CHECKPOINT_METADATA"


def _read_custom_metadata(path: epath.Path) -> dict[str, Any]:
    """Returns what `Checkpoints.save` stored beside the arrays; {} in checkpoints of older code.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    content = fileio.parse_json(path.read_text())
    metadata = content.get("custom_metadata") if isinstance(content, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _state_hash(leaves: Mapping[str, Any], seed: Any) -> str:
    """Returns a hash of the leaves of a state and of the seed of its stage."""
    return hashes.hash_json([hashes.hash_arrays(leaves), seed])


# How messages of tensorstore begin if the storage fails. Messages on damaged data begin otherwise:
# DATA_LOSS, OUT_OF_RANGE, FAILED_PRECONDITION, NOT_FOUND.
_STORAGE_FAILURES = (
    *("UNAVAILABLE", "UNKNOWN", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED"),
    *("RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"),
)


def _is_storage_failure(error: BaseException) -> bool:
    """Whether the storage failed, rather than delivered damaged or missing data."""
    if error.__cause__:  # orbax raises errors of its own from tensorstore's.
        return _is_storage_failure(error.__cause__)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return str(error).startswith(_STORAGE_FAILURES)


def _by_name(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by names such as "params.backbone.stem.conv.kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def save_weights(path: epath.PathLike, variables: Variables, description: dict[str, Any]) -> str:
    """Writes variables as one .safetensors file, with a description in its header.

    Tensor names are paths such as "params/backbone/stem/conv/kernel".

    Returns:
        The SHA-256 of the file, 64 hex digits.
    """
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    content = safetensors.numpy.save(arrays, {"description": json.dumps(description)})
    fileio.write_bytes(epath.Path(path), content)
    return hashes.hash_bytes(content, 64)


# The file of a stage's best weights, in its folder.
BEST_WEIGHTS = "best.safetensors"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Weights of a stage that may be the ones to report.

    Attributes:
        step: after which the stage had them.
        miou: in 0..1, on the set that weights are selected on.
        variables: the weights, a copy on every device.
    """

    step: int
    miou: float
    variables: Variables


@dataclasses.dataclass(frozen=True)
class BestWeights:
    """The best weights of a stage so far, in a file of its folder (`eval.select`).

    A later evaluation replaces them only where it is better, not where it is equal: so a run that
    was interrupted and repeats evaluations ends with the same weights. The authors' released code
    selects on the set that it reports; the paper is silent. Each result row names the selection.

    Attributes:
        folder: of the stage.
        every: steps between candidates, before the last step of the stage.
    """

    folder: epath.Path
    every: int

    def update(self, step: int, miou: float, variables: Variables) -> None:
        """Stores the weights of a step if they are better than all before.

        Args:
            step: after which the stage had the weights.
            miou: in 0..1, on the set that weights are selected on.
            variables: the weights.

        Raises:
            UserError: the weights before are lost, so that the best are unknown; raised in every
                process.
        """
        candidate = Candidate(step, miou, variables)

        def write_if_better() -> None:
            best = self._read() if step > self.every else None
            if best is None or miou > best.description["miou"]:
                self.write(candidate)

        multihost.broadcast_from_main("best weights", write_if_better)

    def write(self, candidate: Candidate) -> None:
        """Writes weights as the best so far, without a comparison."""
        description: dict[str, Any] = {"step": candidate.step, "miou": candidate.miou}
        description["hash"] = _best_hash(description, variables_hash(candidate.variables))
        save_weights(self.folder / BEST_WEIGHTS, candidate.variables, description)

    def load(self, shapes: Variables, mesh: Mesh) -> Candidate:
        """The best of all candidates.

        Args:
            shapes: of the network's variables.
            mesh: for the devices.

        Raises:
            UserError: the file is missing or damaged.
        """
        file = self._read()
        names = traverse_util.flatten_dict(shapes, sep="/")
        variables = traverse_util.unflatten_dict({n: file.tensors[n] for n in names}, sep="/")
        on_devices = jax.device_put(variables, mesh_lib.replicated(mesh))
        return Candidate(file.description["step"], file.description["miou"], on_devices)

    @property
    def step(self) -> int:
        """The step of the best weights so far; raises as `load`."""
        return self._read().description["step"]

    def _read(self) -> weight_files.File:
        try:
            file = weight_files.read(self.folder / BEST_WEIGHTS)
            # Files of older code have no hash.
            computed = _best_hash(file.description, hashes.hash_arrays(file.tensors))
            if file.description.get("hash", computed) != computed:
                raise ValueError("its content does not have the hash in its header")
            return file
        except (UserError, ValueError) as error:
            raise UserError(
                f"{self.folder / BEST_WEIGHTS}, the best weights so far, is missing or damaged: "
                f"restore it, or remove {self.folder}, and the stage is trained again.",
                code="best-weights-missing",
            ) from error


def _best_hash(description: Mapping[str, Any], weights_hash: str) -> str:
    """Returns the hash of best weights and of the step and mIoU that they are described by.

    Raises:
        ValueError: the description has no step or no mIoU.
    """
    if not description.keys() >= {"step", "miou"}:
        raise ValueError("its header has no step and mIoU")
    return hashes.hash_json([description["step"], description["miou"], weights_hash])
