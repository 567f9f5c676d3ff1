"""The command line: python -m semiseg_jax.main --config=configs/streets.py"""

import logging as python_logging
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from semiseg_jax import interruption, memory

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "What to run, such as configs/streets.py; --config.key=value changes a key of it. "
    "configs/default.py documents every key.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go, and where a run goes on; runs/NAME unless given."
)


def _parse(argv: list[str]) -> list[str]:
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


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config of the command line."""
    # Ours are the lines to read; libraries speak up from warnings on, or with --verbosity=0.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"Error: {argv[1]!r} is not an option: options start with --.")
    if not flags.FLAGS["config"].present:
        sys.exit("Error: Say what to run, such as --config=configs/streets.py.")
    config_path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(config_path.partition(":")[0]).exists():
        sys.exit(f"Error: The config {config_path} is missing: configs/ has those there are.")
    memory.keep_freed()
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax.data import sources  # isort: skip
    from semiseg_jax import mesh, rounds, settings
    from semiseg_jax.errors import UserError

    try:
        settings.check(_CONFIG.value)
        mesh.keep_compiled_programs(sources.cache_dir(_CONFIG.value.data) / "compiled")
        workdir = _WORKDIR.value or f"runs/{settings.run_name(config_path)}"
        with interruption.by_signals() as asked:
            rounds.run(_CONFIG.value, workdir, asked)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except interruption.Interrupted:
        print("Interrupted: start the same command again to go on.", file=sys.stderr)
        sys.exit(interruption.EXIT_STATUS)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
