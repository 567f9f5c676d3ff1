"""Checkpoints of a stage (orbax), and the final weights (safetensors)."""

import errno
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from flax import traverse_util

from semiseg_jax import distributed
from semiseg_jax.data import labels
from semiseg_jax.errors import UserError, first_line, reason
from semiseg_jax.state import TrainState, Variables


class Checkpoints:
    """The checkpoints of one stage; written in the background, the newest two kept."""

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)
        # Without rename a file that is written last, commit_success.txt, makes a checkpoint count.
        by_marker = ocp.path.atomicity.CommitFileTemporaryPath
        finishing = None if labels.has_rename(self._folder) else by_marker
        try:
            if self._folder.exists() and not self._folder.is_dir():
                # orbax would find out as it saves, and then wait for minutes.
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            self._manager = ocp.CheckpointManager(
                self._folder.resolve(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2, create=True, temporary_path_class=finishing
                ),
                # Named here, so that a new process can read what is saved without saving first.
                item_handlers={"state": ocp.StandardCheckpointHandler()},
            )
        except OSError as error:
            raise UserError(
                f"The folder of checkpoints {self._folder} cannot be opened ({reason(error)}): "
                "make it readable and writable, or give another --workdir."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:
            # What ended the stage is what to tell, if anything did.
            if kind is None:
                raise self._unwritten(error) from error

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def newest(self, like: TrainState, say: Callable[[str], None]) -> tuple[int, TrainState] | None:
        """The newest checkpoint that can be read, and its step; None where there is none.

        Damaged ones are removed: the steps since the one before are done again.

        Args:
            like: as for `restore`.
            say: takes a line about each one that is removed.

        Raises:
            UserError: the checkpoint has other names, shapes or dtypes, or the storage fails;
                nothing is removed then.
        """
        steps = distributed.agree("checkpoints", lambda: sorted(self._manager.all_steps()))
        found, damaged = None, {}
        for step in reversed(steps):
            state, why = self._read(step, like)
            if state is not None:
                found = step, state
                break
            damaged[step] = why
        # Only now: where the storage fails with the last of them, they all stay.
        for step, why in damaged.items():
            say(f"the checkpoint of step {step} is damaged ({why[:100]}): it is removed")
            self._manager.delete(step)
        return found

    def _read(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """The state of a step, or None and what is damaged; None for all where it is for one.

        Raises:
            UserError: as `restore`; or the storage fails, and the checkpoint may be sound.
        """
        state, why, may_be_sound = None, "", False
        try:
            state = self.restore(step, like)
        except (UserError, jax.errors.JaxRuntimeError):
            raise  # The latter where another process ended: no checkpoint is to blame.
        except Exception as error:  # orbax and tensorstore have many.
            why, may_be_sound = first_line(error), _is_of_storage(error)
        # What one process cannot read, none goes on from.
        told = distributed.gather("checkpoint read", (why, may_be_sound))
        for why, sound in told:
            if sound:
                raise UserError(
                    f"The checkpoint {self._folder / str(step)} cannot be read ({why}), and may be "
                    "sound: check the storage and start again, or remove that folder to train its "
                    "steps anew."
                )
        damage = next((why for why, _ in told if why), "")
        return (None, damage) if damage else (state, "")

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state of a step; once the arrays are copied, the rest goes on behind.

        Raises:
            UserError: this checkpoint, or the one before, cannot be written.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(_by_name(state)))
        try:
            self._manager.save(step, args=args)
        except jax.errors.JaxRuntimeError:
            raise  # Another process ended.
        except Exception as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> UserError:
        """One sentence for what orbax and tensorstore say in many."""
        return UserError(
            f"A checkpoint cannot be written to {self._folder} ({reason(error)}): make room there "
            "or give another --workdir, and start again; the complete checkpoints are kept."
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step.

        Args:
            step: of the checkpoint.
            like: shapes, dtypes and shardings of the state, such as arrays of it.

        Raises:
            UserError: the checkpoint has other names, shapes or dtypes.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _by_name(like))
        self._check_matches(step, wanted)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        saved = self._manager.restore(step, args=args)["state"]
        # In the order of the state's leaves; dictionaries come back sorted by name.
        leaves = [saved[name] for name in _by_name(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _check_matches(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> None:
        """orbax would cast to another dtype without a word."""
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
                    f"config makes {new}: use the config it was made with, or another workdir."
                )


# How tensorstore's messages begin where the storage fails. Those on what it read begin otherwise:
# DATA_LOSS, OUT_OF_RANGE, FAILED_PRECONDITION, NOT_FOUND.
_STORAGE_FAILS = (
    *("UNAVAILABLE", "UNKNOWN", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED"),
    *("RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"),
)


def _is_of_storage(error: BaseException) -> bool:
    """Whether a file could not be read, rather than was read, or missed, and found damaged."""
    if error.__cause__:  # orbax raises errors of its own from tensorstore's.
        return _is_of_storage(error.__cause__)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return str(error).startswith(_STORAGE_FAILS)


def _by_name(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by names such as "params.backbone.stem.conv.kernel"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def save_weights(path: epath.PathLike, variables: Variables, description: dict[str, Any]) -> None:
    """Writes variables as one .safetensors file, with a description in its header.

    Tensor names are paths such as "params/backbone/stem/conv/kernel".
    """
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flat.items()}
    content = safetensors.numpy.save(arrays, {"description": json.dumps(description)})
    labels.write_bytes(epath.Path(path), content)
