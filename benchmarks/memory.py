"""Peak memory of each part of a run on the CPU: teacher, labelling, student, evaluation.

    python benchmarks/memory.py [--config=configs/folder.py] [--crop=257] [--size=480x360]

Runs a config on 40 generated images, 8 of them labelled, for a few steps per stage, and prints the
peak of the resident memory (VmHWM of /proc/self/status) in each part; that of a stage includes its
evaluation. Programs are compiled anew, unless --cache names a folder that has them: compilation
takes memory too. The last line of the output is one JSON object.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from PIL import Image
from workers import ROOT

sys.path.insert(0, str(ROOT))

CLASSES = 8
# By split: numbers of images, and of masks.
COUNTS = {"train": (40, 8), "val": (8, 8)}


def write_images(root: pathlib.Path, height: int, width: int) -> None:
    """Writes a folder data set of smooth images of CLASSES colours, as JPEGs and PNG masks."""
    for split, (images, masks) in COUNTS.items():
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(images):
            rng = np.random.default_rng([number, len(split)])
            blocks = rng.integers(0, CLASSES, (height // 32 + 1, width // 32 + 1)).astype(np.uint8)
            mask = np.kron(blocks, np.ones((32, 32), np.uint8))[:height, :width]
            image = 20 * mask[..., None] + rng.integers(0, 60, (height, width, 3))
            name = f"{number:03d}"
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{name}.jpg")
            if number < masks:
                Image.fromarray(mask).save(root / "masks" / split / f"{name}.png")


def load_config(path: str) -> Any:
    """Returns the config of a file."""
    spec = importlib.util.spec_from_file_location("benchmarked_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def peak_megabytes() -> int:
    """Returns the peak of the resident memory since the last call, in MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
    return int(peak) // 1024


def measure(config: Any, workdir: str) -> dict[str, int]:
    """Runs teacher, labelling and the first student of a config; prints and returns the peaks."""
    from etils import epath

    from semiseg_jax import self_training

    peaks: dict[str, int] = {}

    def record(part: str) -> None:
        peaks[part] = peak_megabytes()
        print(f"{part:10} {peaks[part]:6} MiB", flush=True)

    record("start")
    training = self_training.open_run(config, epath.Path(workdir))
    teacher, student = training.stages[:2]
    trained = training.train_stage(teacher)
    record("teacher")
    labels = training.label(trained, student)
    record("labelling")
    trained = training.train_stage(student, trained, labels)
    record("student")
    training.save_model_bundle(trained, training.choose_stage())
    record("model")
    return peaks


def main() -> None:
    """Prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "folder.py"))
    parser.add_argument("--crop", default=257, type=int, help="sides; 0 for that of the config")
    parser.add_argument("--size", default="480x360", help="width and height of the images")
    parser.add_argument("--steps", default=3, type=int, help="of teacher and student")
    parser.add_argument("--cache", help="folder of compiled programs")
    flags = parser.parse_args()
    from semiseg_jax.runtime import malloc

    malloc.disable_malloc_trim()  # As in main.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    from semiseg_jax.data import size_settings
    from semiseg_jax.runtime import xla

    xla.force_cpu()
    width, height = map(int, flags.size.split("x"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        xla.enable_compilation_cache(flags.cache or folder / "compiled")
        write_images(folder / "data", height, width)
        config = load_config(flags.config)
        config.data.root = str(folder / "data")
        config.data.cache_dir = str(folder / "cache")
        config.data.classes = tuple(f"class {i}" for i in range(CLASSES))
        config = size_settings.resolve(config)
        if flags.crop:
            config.data.crop = (flags.crop, flags.crop)
        config.train.teacher_steps = config.train.steps = flags.steps
        config.train.log_every = 1
        config.rounds.count, config.rounds.control, config.rounds.keep = 1, False, "last"
        peaks = measure(config, str(folder / "run"))
    print(json.dumps({"name": "memory", "crop": config.data.crop, "peaks": peaks}))


if __name__ == "__main__":
    main()
