"""Exports a run's model: python -m semiseg_jax.export --workdir=… --output=… --format=…

The exported model is compared with the network before it is kept; docs/deploy.md describes its use.
"""

import importlib.util
import sys
from pathlib import Path

from absl import app, flags

from semiseg_jax.runtime import cli, interrupts

_WORKDIR = cli.define_path_flag("workdir", "", "Folder of a run that has ended.")
_OUTPUT = cli.define_path_flag("output", "", "The folder to create.")
_FORMAT = flags.DEFINE_string(
    "format", "", "stablehlo, for JAX; saved_model, for TensorFlow; onnx; or tflite."
)
_PRECISION = flags.DEFINE_string(
    "precision", None, "Of tflite: float32 (the default), float16 or int8."
)
_SIZE = flags.DEFINE_string(
    "size", None, "Of tflite: HEIGHTxWIDTH of the images; by default that of the run's images."
)
_IMAGES = cli.define_path_flag(
    "images", None, "A folder with photographs to compare on; built-in scenes by default."
)
_MAX_IMAGE_PIXELS = flags.DEFINE_integer(
    "max_image_pixels",
    None,
    "Largest number of pixels of a photograph (default 268,435,456).",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    """Exports the model in a workdir."""
    cli.start_command(argv)
    workdir, output, format_ = (
        flag.value or sys.exit(f"Error: --{flag.name} is missing: give it; --help lists the flags.")
        for flag in (_WORKDIR, _OUTPUT, _FORMAT)
    )
    if importlib.util.find_spec("tensorflow") is None:
        sys.exit("Error: TensorFlow is missing: install what requirements.txt names.")
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its log messages.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    import jax

    from semiseg_jax.data import image_header
    from semiseg_jax.runtime.errors import UserError
    from semiseg_jax.serving import exporters

    # On the CPU, because accelerators compute float32 products with less precision, which would
    # hide differences between the exported model and the network.
    jax.config.update("jax_platforms", "cpu")
    image_header.set_max_pixels(_MAX_IMAGE_PIXELS.value or image_header.DEFAULT_MAX_PIXELS)
    images = Path(_IMAGES.value) if _IMAGES.value else None
    try:
        with interrupts.exit_on_signals():
            exporters.export(
                Path(workdir), Path(output), format_, images, _PRECISION.value, _SIZE.value
            )
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
