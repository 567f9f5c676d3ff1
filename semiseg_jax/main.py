"""Trains teacher and students: python -m semiseg_jax.main --config=configs/streets.py

Runs Algorithm 1 and writes results, a report and the weights of the stage that rounds.keep chooses
to the workdir. The same command resumes a run that was stopped. docs/own_data.md leads from your
own images to predictions.
"""

from typing import Any

from absl import app

from semiseg_jax.runtime import cli, preemption

_CONFIG = cli.define_config_flag("What to run")
_WORKDIR = cli.define_path_flag(
    "workdir",
    None,
    "The folder that a run writes to, and goes on in; runs/streets for configs/streets.py unless "
    "given.",
)
cli.define_process_flags()


def _check(config: Any) -> None:
    # Imported here, because it imports JAX, and --help need not wait for that.
    from semiseg_jax import config_check

    config_check.check(config)


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config from the command line."""
    config_path = cli.start_command_with_config(argv)
    with cli.setup_run(_CONFIG.value, _check):
        from semiseg_jax import config_check, self_training

        workdir = _WORKDIR.value or f"runs/{config_check.run_name(config_path)}"
        with preemption.install_signal_handlers():
            self_training.run(_CONFIG.value, workdir)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags_and_config)
