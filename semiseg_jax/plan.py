"""Predicts the cost of a run before it starts.

    python -m semiseg_jax.plan --config=configs/X.py
    python -m semiseg_jax.plan --config=configs/X.py --topology=v5e:4x4

Without a topology it measures each kind of step on this machine for some seconds, and prints how
long the run will take here.

With a topology it compiles the student's step, labelling and evaluation for a TPU slice, without
the hardware, and prints their memory, arithmetic, memory traffic and collectives, and a lower bound
on the duration of the whole run. --topology=cpu compiles for the CPU of this machine.
"""

import os
import sys
from typing import Any

from absl import app, flags

from semiseg_jax.runtime import cli, preemption

_CONFIG = cli.define_config_flag("What to plan")
_TOPOLOGY = flags.DEFINE_multi_string(
    "topology",
    None,
    "v4, v5e, v5p or v6e with the chips along each axis, or cpu; may be repeated. Unless given, "
    "the time of the run on this machine is measured. The flags below belong to a topology.",
)
_JSON = cli.define_path_flag("json", None, "JSON file to write the plan to.")
_MEASURE_INPUT = flags.DEFINE_float(
    "measure-input", 0.0, "Seconds to measure this machine's input pipeline for; 0 for not at all."
)
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Number of layers of the student's step to list, by their memory traffic."
)
_STEP_ONLY = flags.DEFINE_bool(
    "step-only",
    False,
    "Compile only the student's step; count the arithmetic of the other programs.",
)
_MACHINE_CODE = flags.DEFINE_bool(
    "machine-code",
    False,
    "Compile to machine code, which takes far longer for a TPU; adds the size of the code and the "
    "compiler's own counts.",
)
cli.define_process_flags()
_OF_TOPOLOGY = (_JSON, _MEASURE_INPUT, _LAYERS, _STEP_ONLY, _MACHINE_CODE)


def main(argv: list[str]) -> None:
    """Prints the plan of the command line's config, here or for each topology."""
    cli.start_command_with_config(argv)
    if _TOPOLOGY.value:
        _plan_topologies(_TOPOLOGY.value)
    else:
        _plan_here()


def _plan_here() -> None:
    """Prints the time of the run on this machine."""
    for flag in _OF_TOPOLOGY:
        if flags.FLAGS[flag.name].present:
            sys.exit(f"Error: --{flag.name} needs --topology, such as --topology=v5e:4x4.")

    def check(config: Any) -> None:
        from semiseg_jax import config_check

        config_check.check(config)

    with cli.setup_run(_CONFIG.value, check):
        from semiseg_jax.planning import minutes

        with preemption.install_signal_handlers():
            minutes.print_run_time(_CONFIG.value)


def _plan_topologies(topologies: list[str]) -> None:
    """Prints the plan for each topology."""
    # The TPU compiler needs no TPU; the chips of a TPU host stay free for other processes.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its notes.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    from semiseg_jax import config_check
    from semiseg_jax.planning import planner
    from semiseg_jax.runtime.errors import UserError

    try:
        config_check.check(_CONFIG.value)
        planner.run(
            _CONFIG.value,
            topologies,
            _JSON.value,
            _MEASURE_INPUT.value,
            _LAYERS.value,
            _STEP_ONLY.value,
            _MACHINE_CODE.value,
        )
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags_and_config)
