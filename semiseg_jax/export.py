"""A run's model for serving: python -m semiseg_jax.export --workdir=… --output=… --format=…

It is compared with the network of the run before it appears; docs/deploy.md says how to use it.
"""

import importlib.util
import sys
from pathlib import Path

from absl import app, flags

from semiseg_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run that has ended.")
_OUTPUT = flags.DEFINE_string("output", "", "The folder to make.")
_FORMAT = flags.DEFINE_string("format", "", "stablehlo, for JAX, or saved_model.")
_IMAGES = flags.DEFINE_string(
    "images", None, "A folder with photographs to compare on; built-in scenes unless given."
)


def main(argv: list[str]) -> None:
    """Makes an artefact of the model in a workdir."""
    command_line.options_only(argv)
    workdir, output, format_ = (
        flag.value or sys.exit(f"Error: Say --{flag.name}: --help has the flags.")
        for flag in (_WORKDIR, _OUTPUT, _FORMAT)
    )
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit("Error: TensorFlow is missing: install what requirements.txt names.")
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax import data  # noqa: F401 # isort: skip
    import jax

    from semiseg_jax import artefacts
    from semiseg_jax.errors import UserError

    # Whose float32 is float32: accelerators round what they multiply, and parity is to be seen.
    jax.config.update("jax_platforms", "cpu")
    try:
        artefacts.export(
            Path(workdir),
            Path(output),
            format_,
            Path(_IMAGES.value) if _IMAGES.value else None,
            say=print,
        )
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_plain)
