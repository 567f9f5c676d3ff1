"""Teacher, pseudo-labels, students: python -m semiseg_jax.main --config=configs/streets.py

It leaves a table of results, and the last student's weights, in the workdir. The same command goes
on where it stopped. docs/own_data.md has the way from your own images to predictions.
"""

from absl import app, flags

from semiseg_jax import command_line, interruption, startup

_CONFIG = command_line.define_config("What to run")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder that a run writes to, and goes on in; runs/streets for configs/streets.py unless "
    "given.",
)
command_line.define_processes()


def main(argv: list[str]) -> None:
    """Runs Algorithm 1 with the config of the command line."""
    config_path = command_line.config_path(argv)
    with startup.of_a_run(_CONFIG.value):
        from semiseg_jax import rounds, settings

        workdir = _WORKDIR.value or f"runs/{settings.run_name(config_path)}"
        with interruption.by_signals() as asked:
            rounds.run(_CONFIG.value, workdir, asked)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
