"""The command itself, called inside the tests' process: the same flags, no second start of JAX."""

import contextlib
import sys
import warnings

import jax
import pytest
from absl import flags

from semiseg_jax import command_line, memory, mesh

# The smallest network and run, as overrides of any config.
TINY = (
    "--config.model.backbone=tiny",
    "--config.model.head_features=8",
    "--config.model.low_level_features=4",
    "--config.model.aspp_rates=(1,2)",
    "--config.model.dropout=0.0",
    "--config.train.steps=2",
    "--config.train.teacher_steps=2",
    "--config.train.batch_labeled=2",
    "--config.train.batch_unlabeled=2",
    "--config.train.checkpoint_every=2",
    "--config.pseudo.batch=2",
    "--config.pseudo.scales=(1.0,)",
    "--config.pseudo.flip=False",
    "--config.eval.batch=2",
    "--config.rounds.count=1",
    "--config.rounds.control=False",
    "--config.data.crop=(32,32)",
    "--config.sda.ops=('solarize',)",
)


def _take(*names: str) -> dict[str, flags.Flag]:
    """Takes flags out of those of the process."""
    taken = {name: flags.FLAGS[name] for name in names if name in flags.FLAGS}
    for name in taken:
        delattr(flags.FLAGS, name)
    return taken


def _put(taken: dict[str, flags.Flag]) -> None:
    for name, flag in taken.items():
        flags.FLAGS[name] = flag


# Each command has a --config; those of several can only take turns in one process.
_MAINS = ("config", "workdir", "coordinator", "num_processes", "process_id")
_others = _take(*_MAINS)
from semiseg_jax import main  # noqa: E402

_flags_of_main = _take(*_MAINS)
_put(_others)


@contextlib.contextmanager
def _as_main():
    """The process has main's flags, and afterwards those it had."""
    others = _take(*_MAINS)
    _put(_flags_of_main)
    known = set(flags.FLAGS)
    try:
        yield
    finally:
        # Overrides such as --config.data.root are flags too.
        _take(*(set(flags.FLAGS) - known))
        flags.FLAGS.unparse_flags()
        _take(*_flags_of_main)
        _put(others)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """python -m semiseg_jax.main ARGUMENTS, on one device.

    Raises:
        SystemExit: as the command would end; its code is the sentence.
    """
    make = mesh.make_mesh
    argv = ["main", *arguments]
    with monkeypatch.context() as patch, _as_main():
        patch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:1]))
        # The tests keep compiled programs in a place of their own.
        patch.setattr(mesh, "keep_compiled_programs", lambda folder: None)
        # For the rest of the process, which has other tests to run.
        patch.setattr(memory, "keep_freed", lambda: False)
        patch.setattr(mesh, "one_step_at_a_time", lambda: None)
        patch.setattr(sys, "argv", argv)
        with warnings.catch_warnings():
            # ml_collections loads config files by a method that Python is about to drop.
            warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)
            rest = command_line.parse(argv)
        main.main(rest)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert isinstance(end.value.code, str), "ended without a sentence"
    return end.value.code
