"""What the programs with a config have in common: its flag, and what is wrong with a command."""

import contextlib
import itertools
import logging as python_logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from semiseg_jax import distributed, interruption
from semiseg_jax.errors import UserError


def define_config(what: str) -> flags.FlagHolder:
    """The flag --config, and with it --config.key; `what` it is, for --help."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        f"{what}, such as configs/streets.py; --config.key=value changes a key of it. "
        "configs/default.py documents every key.",
        lock_config=True,
    )
    # --help has the flags of the module that was started.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


def define_processes() -> None:
    """The flags by which one of several processes finds the others; see `start_processes`."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where a run has several processes; else $SEMISEG_COORDINATOR. A "
        "TPU pod and a Slurm step need none of these three.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are; else $SEMISEG_NUM_PROCESSES."
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this is, from 0 on; else $SEMISEG_PROCESS_ID."
    )
    for name in ("coordinator", "num_processes", "process_id"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def start_processes(on_cpu: bool) -> None:
    """Joins the other processes that flags, environment or cluster tell of; before JAX computes.

    Args:
        on_cpu: the CPU computes.

    Raises:
        UserError: what they tell does not fit together.
    """

    def number(name: str) -> int | None:
        variable = f"SEMISEG_{name.upper()}"
        value = os.environ.get(variable)
        if flags.FLAGS[name].present or not value:
            return flags.FLAGS[name].value
        if not re.fullmatch(r"-?\d+", value):
            raise UserError(f"{variable}={value} is not a whole number.")
        return int(value)

    coordinator = flags.FLAGS["coordinator"].value or os.environ.get("SEMISEG_COORDINATOR") or None
    distributed.start(coordinator, number("num_processes"), number("process_id"), on_cpu)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """What a user can mend ends the command with a sentence, and its other processes too."""
    try:
        with distributed.together({interruption.Interrupted: interruption.EXIT_STATUS}):
            yield
    except UserError as error:
        sys.exit(f"Error: {error}")
    except interruption.Interrupted:
        if distributed.is_main():
            print("Interrupted: start the same command again to go on.", file=sys.stderr)
        sys.exit(interruption.EXIT_STATUS)


def parse(argv: list[str]) -> list[str]:
    """The arguments that are not flags; a wrong flag, key or config ends in one sentence."""
    _refuse_missing_file(argv)
    try:
        left = flags.FLAGS(argv)
        config = flags.FLAGS.config
        # An OSError of the file is raised by whatever is asked for first.
        getattr(config, "seed", None)
    except Exception as error:  # A config file may raise anything.
        sys.exit(f"Error: {_sentence_on(error)}")
    if flags.FLAGS["config"].present and not isinstance(config, ConfigDict):
        returned = "nothing" if config is None else type(config).__name__
        sys.exit(
            f"Error: get_config of the config file returns {returned}: have it return the config "
            "that configs.default.get_config() gives."
        )
    return left


def _refuse_missing_file(argv: list[str]) -> None:
    """A config file that is not there, in words; ml_collections has its own for later."""
    given = [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-config")]
    given += [a.partition("=")[2] for a in argv if re.match("--?config=", a)]
    for value in given:
        path = Path(value.partition(":")[0])
        if not value:
            sys.exit("Error: --config is empty: name a file, such as configs/streets.py.")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is missing"
            sys.exit(f"Error: The config {path} {what}: configs/ has those there are.")


def _sentence_on(error: Exception) -> str:
    # Of an unknown key, written two ways: 'stepz' by an override, Key "stepz" by a config file.
    pattern = r"\W*(?:Key \"|')(\w+)\\?[\"'](?:.*Did you mean \"(\w+)\")?"
    found = re.match(pattern, str(error), re.DOTALL)
    if isinstance(error, AttributeError | KeyError) and found:
        key, near = found.groups()
        hint = f"did you mean {near}?" if near else "configs/default.py has every key."
        return f"There is no config key {key}: {hint}"
    if str(error).startswith("string indices must be integers"):
        return "A --config.key goes on behind a text: configs/default.py has every key."
    # A config file that raises a TypeError comes wrapped in its traceback, with the reason last.
    reason = (str(error).strip().splitlines() or [""])[-1].strip()
    if not isinstance(error, flags.Error):
        reason = f"The config file raises {type(error).__name__}: {reason}"
    return f"{reason}; configs/default.py documents every key, --help the flags."


def parse_plain(argv: list[str]) -> list[str]:
    """As `parse`, for a command without a config."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"Error: {str(error).strip()}; --help has the flags.")


def options_only(argv: list[str]) -> None:
    """Quietens the libraries; what is no option ends the command in one sentence.

    Args:
        argv: what `parse` left over.
    """
    # Ours are the lines to read; libraries speak up from warnings on, or with --verbosity=0.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("jax").setLevel(python_logging.WARNING)
        # What fails in orbax's threads is said in one sentence where it is met.
        python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    if len(argv) > 1:
        sys.exit(f"Error: {argv[1]!r} is not an option: options start with --.")


def config_path(argv: list[str]) -> str:
    """What --config names, as it was given; a command that cannot be meant ends in one sentence.

    Args:
        argv: what `parse` left over.
    """
    options_only(argv)
    if not flags.FLAGS["config"].present:
        sys.exit("Error: Say what to run, such as --config=configs/streets.py.")
    return config_flags.get_config_filename(flags.FLAGS["config"])
