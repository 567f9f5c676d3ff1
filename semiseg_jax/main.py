"""Teacher, pseudo-labels, students: python -m semiseg_jax.main --config=configs/streets.py

It leaves a table of results, and the last student's weights, in the workdir. The same command goes
on where it stopped. docs/own_data.md has the way from your own images to predictions.
"""

from absl import app, flags

from semiseg_jax import command_line, interruption, memory

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
    on_cpu = memory.cpu_computes()
    if on_cpu:
        memory.keep_freed()
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax.data import sources  # isort: skip
    from semiseg_jax import mesh, rounds, settings

    with command_line.one_sentence():
        settings.check(_CONFIG.value)
        if on_cpu:
            mesh.one_step_at_a_time()
        mesh.keep_compiled_programs(sources.cache_dir(_CONFIG.value.data) / "compiled")
        workdir = _WORKDIR.value or f"runs/{settings.run_name(config_path)}"
        command_line.start_processes(on_cpu)
        with interruption.by_signals() as asked:
            rounds.run(_CONFIG.value, workdir, asked)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
