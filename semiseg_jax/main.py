"""The command line: python -m semiseg_jax.main --config=configs/streets.py"""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

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
    """absl's parser, with config errors as one sentence instead of a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").strip("'\"").split())
        sys.exit(f"The config does not load: {message} — configs/default.py has every key.")


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config of the command line."""
    # Ours are the lines to read; libraries speak up from warnings on, or with --verbosity=0.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}: options start with --.")
    if _CONFIG.value is None:
        sys.exit("Say what to run, such as --config=configs/streets.py.")
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    from semiseg_jax import mesh, rounds, settings
    from semiseg_jax.data import sources
    from semiseg_jax.errors import UserError

    config_path = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        settings.check(_CONFIG.value)
        mesh.keep_compiled_programs(sources.cache_dir(_CONFIG.value.data) / "compiled")
        rounds.run(_CONFIG.value, _WORKDIR.value or f"runs/{settings.run_name(config_path)}")
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
