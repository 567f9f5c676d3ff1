"""The command line: python -m semiseg_jax.main --config=configs/streets.py"""

import sys

from absl import app, flags

from semiseg_jax import command_line

_CONFIG = command_line.define_config("What to run")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results go, and where a run goes on; runs/NAME unless given."
)


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config of the command line."""
    config_path = command_line.config_path(argv)
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax.data import sources  # isort: skip
    from semiseg_jax import mesh, rounds, settings
    from semiseg_jax.errors import UserError

    try:
        settings.check(_CONFIG.value)
        mesh.keep_compiled_programs(sources.cache_dir(_CONFIG.value.data) / "compiled")
        rounds.run(_CONFIG.value, _WORKDIR.value or f"runs/{settings.run_name(config_path)}")
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
