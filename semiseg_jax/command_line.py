"""What the programs with a config have in common: its flag, and what is wrong with a command."""

import contextlib
import logging as python_logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

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
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        # Written two ways: 'stepz' by an override, Key "stepz" by a config file.
        pattern = r"(?:Key \"|')(\w+)\\?[\"'](?:.*Did you mean \"(\w+)\")?"
        found = re.search(pattern, str(error), re.DOTALL)
        key, near = found.groups() if found else (str(error), None)
        hint = f"did you mean {near}?" if near else "configs/default.py has every key."
        sys.exit(f"Error: There is no config key {key}: {hint}")
    except (flags.Error, TypeError, ValueError, SyntaxError, NameError, ImportError) as error:
        # A config file that raises comes wrapped in its traceback, with the reason last.
        reason = str(error).strip().splitlines()[-1].strip()
        sys.exit(f"Error: {reason}; configs/default.py documents every key, --help the flags.")


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
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(path.partition(":")[0]).exists():
        sys.exit(f"Error: The config {path} is missing: configs/ has those there are.")
    return path
