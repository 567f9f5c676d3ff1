"""Predicts images: python -m semiseg_jax.predict --workdir=DIR --input=DIR --output=DIR"""

import sys
from typing import Any

from absl import app, flags

from semiseg_jax.runtime import cli, malloc, preemption, xla

_WORKDIR = cli.define_path_flag(
    "workdir", None, "Folder of a run that has ended; its model/ is read."
)
_INPUT = cli.define_path_flag("input", None, "A folder of images, nested or not, or one image.")
_OUTPUT = cli.define_path_flag("output", None, "The folder to write to.")
_OVERLAYS = flags.DEFINE_boolean(
    "overlays", True, "Also write the images overlaid with their classes."
)
_PROBABILITIES = flags.DEFINE_boolean(
    "probabilities", False, "Also write each pixel's class probabilities, as .npz."
)
# The settings of inference; by default those of the evaluation of the model.
_SCALES = flags.DEFINE_list("scales", None, "Multiples of the image size, such as 0.5,1,1.75.")
_FLIP = flags.DEFINE_boolean("flip", None, "Average over each image and its mirror image.")
_WINDOW = flags.DEFINE_list(
    "window", None, "HEIGHT,WIDTH of the sliding window for larger images, in pixels."
)
_WINDOW_STRIDE = flags.DEFINE_list(
    "window_stride", None, "DOWN,ACROSS, pixels between neighbouring windows."
)
_PAD_TO = flags.DEFINE_integer(
    "pad_to", None, "Pad the sides of every image to multiples of this; 1 for no padding."
)
_BATCH = flags.DEFINE_integer("batch", None, "Largest number of images per batch.")
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "Pixels that a device processes at a time; larger images are tiled."
)
_MAX_IMAGE_PIXELS = flags.DEFINE_integer(
    "max_image_pixels",
    None,
    "Largest number of pixels of an image (default 268,435,456); larger ones are not decoded.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    """Predicts the images that the command line names."""
    cli.start_command(argv)
    for flag in (_WORKDIR, _INPUT, _OUTPUT):
        if not flag.value:
            sys.exit(f"Error: --{flag.name} is missing: give it; --help lists the flags.")
    on_cpu = xla.runs_on_cpu()
    if on_cpu:
        malloc.disable_malloc_trim()
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its log messages.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    from semiseg_jax.runtime import paths
    from semiseg_jax.runtime.errors import UserError

    errors: dict[str, str] = {}
    try:
        changes = _parse_changes()
        if on_cpu:
            xla.force_cpu()
        xla.enable_compilation_cache(paths.default_cache_dir() / "compiled")
        with preemption.install_signal_handlers():
            xla.require_platform()
            errors = _predict(changes)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except preemption.Preempted:
        print(
            "Interrupted: what is written stays; the same command does all images again.",
            file=sys.stderr,
        )
        sys.exit(preemption.EXIT_STATUS)
    if errors:
        sentences = "".join(f"\n  {sentence}" for _, sentence in sorted(errors.items()))
        count = "1 file" if len(errors) == 1 else f"{len(errors)} files"
        sys.exit(f"Error: {count} could not be predicted, all others are written:{sentences}")


def _parse_changes() -> dict[str, Any]:
    """Returns the fields of `InferenceConfig` that the command line sets.

    Raises:
        UserError: a flag has an invalid value.
    """
    from semiseg_jax.runtime.errors import UserError
    from semiseg_jax.serving import model_bundle

    changes: dict[str, Any] = {
        name: flag.value
        for name, flag in (
            *(("flip", _FLIP), ("pad_to", _PAD_TO), ("batch", _BATCH)),
            ("max_pixels", _MAX_PIXELS),
        )
        if flag.value is not None
    }
    try:
        if _SCALES.value is not None:
            changes["scales"] = tuple(map(float, _SCALES.value))
        for name, flag in (("window", _WINDOW), ("window_stride", _WINDOW_STRIDE)):
            if flag.value is not None:
                changes[name] = tuple(map(int, flag.value))
    except ValueError as error:
        raise UserError(
            "--scales, --window and --window_stride are numbers with commas between them: "
            f"{error}.",
            code="flag-numbers-malformed",
        ) from error
    model_bundle.check_settings(changes, "--")
    return changes


def _predict(changes: dict[str, Any]) -> dict[str, str]:
    """Predicts the images with a progress bar; returns the error messages by file.

    Args:
        changes: fields of `InferenceConfig` that differ from the evaluation's.
    """
    import dataclasses

    from rich import progress as bars

    from semiseg_jax import mesh
    from semiseg_jax.data import file_warnings, image_header
    from semiseg_jax.runtime.logger import RunConsole, logger
    from semiseg_jax.serving import inputs, model_bundle, prediction_writer

    image_header.set_max_pixels(_MAX_IMAGE_PIXELS.value or image_header.DEFAULT_MAX_PIXELS)
    bundle = model_bundle.load(_WORKDIR.value)
    images = inputs.Images(_INPUT.value, _OUTPUT.value)
    devices = mesh.make_mesh()
    evaluated = model_bundle.evaluation_config(bundle, devices.size)
    protocol = dataclasses.replace(evaluated, **changes)
    miou = f"mIoU {100 * bundle.description['miou']:.2f} on {bundle.protocol.split}"
    differences = [f"--{k}={v}" for k, v in changes.items() if v != getattr(evaluated, k)]
    logger.info(
        f"{_WORKDIR.value}: {len(bundle.classes)} classes, {miou}; "
        + (f"here {' '.join(differences)} instead" if differences else "predicts as evaluated")
        + f", images downscaled by {bundle.downscale} as in training" * (bundle.downscale > 1)
    )
    if images.others:
        logger.info(f"{images.others} files below {_INPUT.value} are skipped: they are no images")
    if images.predictions:
        folders = ", ".join(map(str, images.predictions[:3])) + ", …" * (
            len(images.predictions) > 3
        )
        logger.info(f"folders of earlier predictions are left out of the input: {folders}")
    for warning in file_warnings.find(images.examples):
        logger.info(f"Warning: {warning}")
    writer = prediction_writer.PredictionWriter(
        bundle, protocol, devices, _OUTPUT.value, _OVERLAYS.value, _PROBABILITIES.value
    )
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=RunConsole(),
    ) as bar:
        task = bar.add_task("images", total=len(images.examples))
        errors = writer(images.examples, lambda count: bar.advance(task, count))
    count = len(images.examples) - len(errors)
    logger.info(f"{count} image{'s' * (count != 1)} predicted: {_OUTPUT.value}")
    return errors


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
