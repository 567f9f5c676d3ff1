"""Predicts the cost of a run: python -m semiseg_jax.plan --config=configs/X.py --topology=v5e:4x4

Compiles the student's step, labelling and evaluation for a TPU slice, without the hardware, and
prints their memory, arithmetic, memory traffic and collectives, and a lower bound on the duration
of the whole run. --topology=cpu compiles for the CPU of this machine.
"""

import os
import sys

from absl import app, flags

from semiseg_jax.runtime import cli

_CONFIG = cli.define_config_flag("What to plan")
_TOPOLOGY = flags.DEFINE_multi_string(
    "topology",
    ["v5e:4x4"],
    "v4, v5e, v5p or v6e with the chips along each axis, or cpu; may be repeated.",
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


def main(argv: list[str]) -> None:
    """Prints the plan of the command line's config for each topology."""
    cli.start_command_with_config(argv)
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
            _TOPOLOGY.value,
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
