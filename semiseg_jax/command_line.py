"""What the programs with a config have in common: its flag, and what is wrong with a command."""

import contextlib
import itertools
import logging as python_logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from semiseg_jax import distributed, interruption
from semiseg_jax.errors import UserError, first_line


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
    files = _config_files(argv)
    _refuse_missing(files)
    try:
        left = flags.FLAGS(argv)
        config = flags.FLAGS.config
        # An OSError of the file is raised by whatever is asked for first.
        getattr(config, "seed", None)
    except Exception as error:  # A config file may raise anything.
        # A --flagfile may name the config, which argv then does not.
        sys.exit(f"Error: {_sentence_on(error, files[-1] if files else 'given')}")
    if flags.FLAGS["config"].present and not isinstance(config, ConfigDict):
        sys.exit(f"Error: {_no_config(type(config).__name__)}")
    return left


def _config_files(argv: list[str]) -> list[str]:
    """The values of --config, as far as they are paths."""
    given = [value for flag, value in itertools.pairwise(argv) if flag in ("--config", "-config")]
    given += [a.partition("=")[2] for a in argv if re.match("--?config=", a)]
    return [value.partition(":")[0] for value in given]


def _refuse_missing(files: list[str]) -> None:
    """A config file that is not there, in words; ml_collections has its own for later."""
    for file in files:
        path = Path(file)
        if not file:
            sys.exit("Error: --config is empty: name a file, such as configs/streets.py.")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is missing"
            sys.exit(f"Error: The config {path} {what}: configs/ has those there are.")


def _no_config(returned: str) -> str:
    returned = "nothing" if returned == "NoneType" else returned
    return (
        f"get_config of the config file returns {returned}: have it return the config that "
        "configs.default.get_config() gives."
    )


def _sentence_on(error: BaseException, file: str) -> str:
    """What went wrong in the flags, or in the config file at `file`."""
    error = _unwrapped(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if unknown := _unknown_key(error, frames[-1].f_globals["__name__"]):
        return unknown
    if any(frame.f_code.co_qualname == "ConfigFileFlagParser.parse" for frame in frames):
        reason = f"The config file {file} raises {type(error).__name__}: {first_line(error)}"
    elif isinstance(error, flags.Error):
        reason = first_line(error)
    # An override of what is no config at all: the lookup ends at its first part.
    elif found := re.search(r"<class '(\w+)'>\.(\w+) .* lookup: \2\b", str(error)):
        return _no_config(found.group(1))
    else:
        return (
            "A --config.key asks for a part that its value does not have: configs/default.py has "
            "every key."
        )
    return f"{reason}; configs/default.py documents every key, --help the flags."


def _unwrapped(error: BaseException) -> BaseException:
    """What a config file raised, of an exception that ml_collections and absl made of it."""
    inner = error.__cause__ or error.__context__
    wrappers = "flag --config=|Error whilst parsing config file|Configuration is not available"
    return _unwrapped(inner) if inner and re.match(wrappers, str(error)) else error


def _unknown_key(error: BaseException, module: str) -> str | None:
    """The sentence on a key that ml_collections does not know; `module` raised the error."""
    # Written two ways: 'stepz' by an override, Key "stepz" by a config file.
    pattern = r"\W*(?:Key \"|')(\w+)\\?[\"'](?:.*Did you mean \"(\w+)\")?"
    found = re.match(pattern, str(error), re.DOTALL)
    # A config file may look up something else in vain, which reads the same.
    ours = isinstance(error, AttributeError | KeyError) and module.startswith("ml_collections")
    if not (ours and found):
        return None
    key, near = found.groups()
    hint = f"did you mean {near}?" if near else "configs/default.py has every key."
    return f"There is no config key {key}: {hint}"


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
