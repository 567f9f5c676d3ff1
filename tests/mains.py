"""The command itself, called inside the tests' process: the same flags, no second start of JAX."""

import contextlib
import importlib
import sys
import warnings
from typing import Any

import jax
import pytest
from absl import flags

from semiseg_jax import mesh
from semiseg_jax.runtime import cli, malloc, xla

# The smallest network and run, as overrides of any config.
TINY = (
    "--config.model.backbone=tiny",
    "--config.model.pretrained=",
    "--config.model.head=v2",
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


# Commands have flags of the same names; in one process they can only take turns.
_OF_PROCESSES = ("coordinator", "num_processes", "process_id")
_FLAGS = {
    "main": ("config", "workdir", "minutes", *_OF_PROCESSES),
    "plan": (
        *("config", "topology", "json", "measure-input", "layers", "step-only", "machine-code"),
        *_OF_PROCESSES,
    ),
    "predict": (
        *("workdir", "input", "output", "overlays", "probabilities", "scales", "flip", "window"),
        *("window_stride", "pad_to", "batch", "max_pixels"),
    ),
    "suggest": ("workdir", "count", "output", "by", "seed", "min_area", "merge", "take_untouched"),
}
_others = _take(*{name for names in _FLAGS.values() for name in names})
_commands: dict[str, tuple[Any, dict[str, flags.Flag]]] = {}
for _name, _names in _FLAGS.items():
    _module = importlib.import_module(f"semiseg_jax.{_name}")
    _commands[_name] = _module, _take(*_names)
_put(_others)


@contextlib.contextmanager
def _as_command(own: dict[str, flags.Flag]):
    """The process has a command's flags, and afterwards those it had."""
    others = _take("config", *own)
    _put(own)
    known = set(flags.FLAGS)
    try:
        yield
    finally:
        # Overrides such as --config.data.root are flags too.
        _take(*(set(flags.FLAGS) - known))
        flags.FLAGS.unparse_flags()
        _take(*own)
        _put(others)


def run(
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    command: str = "main",
    predicts_time: bool = False,
) -> None:
    """python -m semiseg_jax.main ARGUMENTS, or another command, on one device.

    Args:
        monkeypatch: of the test.
        *arguments: of the command.
        command: its name.
        predicts_time: the arithmetic of the programs is counted, which takes seconds; otherwise
            that fails, and main does not say how long the run takes.

    Raises:
        SystemExit: as the command would end; its code is the sentence.
    """
    make = mesh.make_mesh

    def make_mesh(devices=None):
        assert devices is None or predicts_time
        return make(devices or jax.devices()[:1])

    module, own = _commands[command]
    parse = cli.parse_flags_and_config if "config" in own else cli.parse_flags
    argv = [command, *arguments]
    with monkeypatch.context() as patch, _as_command(own):
        patch.setattr(mesh, "make_mesh", make_mesh)
        # The tests keep compiled programs in a place of their own.
        patch.setattr(xla, "enable_compilation_cache", lambda folder: None)
        # For the rest of the process, which has other tests to run.
        patch.setattr(malloc, "disable_malloc_trim", lambda: False)
        patch.setattr(xla, "force_cpu", lambda: None)
        patch.setattr(sys, "argv", argv)
        with warnings.catch_warnings():
            # ml_collections loads config files by a method that Python is about to drop.
            warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)
            rest = parse(argv)
        module.main(rest)


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str, command: str = "main") -> str:
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments, command=command)
    assert isinstance(end.value.code, str), "ended without a sentence"
    return end.value.code
