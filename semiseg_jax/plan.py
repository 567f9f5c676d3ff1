"""Know before you pay: python -m semiseg_jax.plan --config=configs/X.py --topology=v5e:4x4

Compiles the student's step, labelling and evaluation for a TPU slice that need not be there, and
says what they need: memory against a chip's, arithmetic, memory traffic, collectives; and how long
the config's whole run takes at least. --topology=cpu tells what the CPU's compiler says.
"""

import os
import sys

from absl import app, flags

from semiseg_jax import command_line

_CONFIG = command_line.define_config("What to plan")
_TOPOLOGY = flags.DEFINE_multi_string(
    "topology", ["v5e:4x4"], "v4, v5e, v5p or v6e with the chips along each axis, or cpu; again."
)
_JSON = flags.DEFINE_string("json", None, "File for the same figures as JSON.")
_MEASURE_INPUT = flags.DEFINE_float(
    "measure-input", 0.0, "Seconds to measure what this machine's input pipeline supplies."
)
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "How many layers of the student's step to list, by the memory they move."
)
_STEP_ONLY = flags.DEFINE_bool(
    "step-only", False, "Compile the student's step alone; the others' arithmetic is counted."
)
_MACHINE_CODE = flags.DEFINE_bool(
    "machine-code",
    False,
    "Compile for a TPU to the end, which takes far longer: code's size, the compiler's counts.",
)


def main(argv: list[str]) -> None:
    """Plans the config of the command line for each topology."""
    command_line.config_path(argv)
    # The TPU's compiler needs no TPU, and the chips of a TPU host are left to others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    from semiseg_jax.data import sources  # noqa: F401  # isort: skip - silences TensorFlow first
    from semiseg_jax import settings
    from semiseg_jax.errors import UserError
    from semiseg_jax.planning import planner

    try:
        settings.check(_CONFIG.value)
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
    app.run(main, flags_parser=command_line.parse)
