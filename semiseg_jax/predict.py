"""Label maps of a folder: python -m semiseg_jax.predict --workdir=DIR --input=DIR --output=DIR"""

import sys
from typing import Any

from absl import app, flags

from semiseg_jax import command_line, interruption, memory

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run that has ended; its model/ is read.")
_INPUT = flags.DEFINE_string("input", None, "A folder of images, nested or not, or one image.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write into.")
_OVERLAYS = flags.DEFINE_boolean("overlays", True, "Also write pictures to look at.")
_PROBABILITIES = flags.DEFINE_boolean(
    "probabilities", False, "Also write each pixel's class probabilities, as .npz."
)
# The protocol; what is not given is as the model was evaluated.
_SCALES = flags.DEFINE_list("scales", None, "Multiples of the image's size, such as 0.5,1,1.75.")
_FLIP = flags.DEFINE_boolean("flip", None, "See the mirrored image too.")
_WINDOW = flags.DEFINE_list(
    "window", None, "HEIGHT,WIDTH in pixels of windows that larger images are seen through."
)
_WINDOW_STRIDE = flags.DEFINE_list(
    "window_stride", None, "DOWN,ACROSS in pixels from window to window."
)
_PAD_TO = flags.DEFINE_integer(
    "pad_to", None, "Pad sides to multiples of it, in pixels; 1 for never."
)
_BATCH = flags.DEFINE_integer("batch", None, "Images at a time, at most.")
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", None, "That a device is given at a time; larger images are seen in tiles."
)


def main(argv: list[str]) -> None:
    """Predicts the images of the command line."""
    command_line.options_only(argv)
    for flag in (_WORKDIR, _INPUT, _OUTPUT):
        if not flag.value:
            sys.exit(f"Error: Say --{flag.name}: --help has the flags.")
    on_cpu = memory.cpu_computes()
    if on_cpu:
        memory.keep_freed()
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax.data import places  # isort: skip
    from semiseg_jax import mesh
    from semiseg_jax.errors import UserError

    broken: dict[str, str] = {}
    try:
        changes = _changes()
        if on_cpu:
            mesh.compute_on_cpu()
        mesh.keep_compiled_programs(places.usual_cache_dir() / "compiled")
        with interruption.by_signals() as asked:
            broken = _predict(changes, asked)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except interruption.Interrupted:
        print(
            "Interrupted: what is written stays; the same command does all images again.",
            file=sys.stderr,
        )
        sys.exit(interruption.EXIT_STATUS)
    if broken:
        sentences = "".join(f"\n  {sentence}" for _, sentence in sorted(broken.items()))
        images = "1 file" if len(broken) == 1 else f"{len(broken)} files"
        sys.exit(f"Error: {images} could not be predicted, all others are written:{sentences}")


def _changes() -> dict[str, Any]:
    """What the command line sets otherwise than evaluation had it, checked."""
    from semiseg_jax import settings
    from semiseg_jax.errors import UserError

    changes: dict[str, Any] = {
        name: flag.value
        for name, flag in (("flip", _FLIP), ("pad_to", _PAD_TO), ("batch", _BATCH))
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
            f"--scales, --window and --window_stride are numbers with commas between them: {error}."
        ) from error
    for name, value in changes.items():
        holds, what = settings.RULES.get(f"eval.{name}", (lambda v: True, ""))
        if not settings.is_finite(value):
            raise UserError(f"--{name} is {value!r}: make it finite.")
        if not holds(value):
            raise UserError(f"--{name} is {value!r}: make it {what}.")
    if ("window" in changes) != ("window_stride" in changes):
        raise UserError("--window and --window_stride go together: give both, or none.")
    settings.check_window("--", changes.get("window", ()), changes.get("window_stride", ()))
    if _MAX_PIXELS.value is not None:
        if _MAX_PIXELS.value < 1:
            raise UserError(f"--max_pixels is {_MAX_PIXELS.value}: make it at least 1.")
        changes["max_pixels"] = _MAX_PIXELS.value
    return changes


def _predict(changes: dict[str, Any], asked: interruption.Asked) -> dict[str, str]:
    """Predicts, with a bar that shows how far; sentences on the broken files by file."""
    import dataclasses

    from rich import progress as bars
    from rich.console import Console

    from semiseg_jax import deployed, mesh, predictions, seeing
    from semiseg_jax.data import inputs

    say = Console(highlight=False, soft_wrap=True).print
    model = deployed.load(_WORKDIR.value)
    images = inputs.Images(_INPUT.value, _OUTPUT.value)
    devices = mesh.make_mesh()
    usual = seeing.as_evaluated(model, devices.size)
    protocol = dataclasses.replace(usual, **changes)
    miou = f"mIoU {100 * model.description['miou']:.2f} on {model.protocol['split']}"
    departs = [f"--{k}={v}" for k, v in changes.items() if v != getattr(usual, k)]
    say(
        f"{_WORKDIR.value}: {len(model.classes)} classes, {miou}; "
        + (f"here {' '.join(departs)} instead" if departs else "images are seen as there"),
        markup=False,
    )
    if images.others:
        say(
            f"{images.others} files below {_INPUT.value} are no images and left alone", markup=False
        )
    writer = predictions.Writer(
        model, protocol, devices, _OUTPUT.value, _OVERLAYS.value, _PROBABILITIES.value
    )
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("images", total=len(images.examples))
        broken = writer(images.examples, lambda count: bar.advance(task, count), asked)
    say(f"{len(images.examples) - len(broken)} images predicted: {_OUTPUT.value}", markup=False)
    return broken


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_plain)
