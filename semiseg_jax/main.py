"""Trains teacher and students: python -m semiseg_jax.main --config=configs/streets.py

Runs Algorithm 1 and writes results, a report and the weights of the stage that rounds.keep chooses
to the workdir. The same command resumes a run that was stopped. After the first steps the command
says how long the run will take; --minutes=60 fits it to an hour. docs/own_data.md leads from your
own images to predictions.
"""

import functools
import shlex
import time
from typing import Any

from absl import app, flags

from semiseg_jax.runtime import cli, preemption
from semiseg_jax.runtime.logger import logger

_CONFIG = cli.define_config_flag("What to run")
_WORKDIR = cli.define_path_flag(
    "workdir",
    None,
    "The folder that a run writes to, and goes on in; runs/streets for configs/streets.py unless "
    "given.",
)
_MINUTES = flags.DEFINE_float(
    "minutes",
    None,
    "How many minutes the whole run may take on this machine: its steps, and if need be its "
    "rounds, are fitted to that at the first start. The config's own steps unless given.",
)
cli.define_process_flags()


def _check(config: Any) -> None:
    # Imported here, because it imports JAX, and --help need not wait for that.
    from semiseg_jax import config_check

    config_check.check(config)


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config from the command line."""
    began = time.perf_counter()
    config_path = cli.start_command_with_config(argv)
    with cli.setup_run(_CONFIG.value, _check):
        from semiseg_jax import config_check, self_training
        from semiseg_jax.planning import minutes
        from semiseg_jax.planning.announcer import Announcer

        workdir = _WORKDIR.value or f"runs/{config_check.run_name(config_path)}"
        announcer = Announcer(began)
        choose_settings = functools.partial(
            minutes.choose_settings, workdir=workdir, minutes=_MINUTES.value, announcer=announcer
        )
        with preemption.install_signal_handlers(), announcer.running():
            self_training.run(_CONFIG.value, workdir, announcer, choose_settings)
        logger.info(
            f"Open {workdir}/report.html for the pictures. Predict images with: python -m "
            f"semiseg_jax.predict --workdir={shlex.quote(workdir)} --input=IMAGES --output=FOLDER"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags_and_config)
