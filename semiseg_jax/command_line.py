"""What the programs with a config have in common: its flag, and what is wrong with a command."""

import logging as python_logging
import re
import sys
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags


def define_config(what: str) -> flags.FlagHolder:
    """The flag --config, and with it --config.key; `what` it is, for --help."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        f"{what}, such as configs/streets.py; --config.key=value changes a key of it. "
        "configs/default.py documents every key.",
        lock_config=True,
    )


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
