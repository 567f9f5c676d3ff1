"""The whole labelling stage, from files to files: the busy share of the devices, and memory.

    python benchmarks/labelling.py [--images=1000] [--backbone=efficientnet_lite0] [--batch=8]

PNGs of 240x180, DeepLabV3+, five scales and mirror images, as in a run. "Ours" is images per second
of the whole stage. "Peer" is the same predictor, repeated on one batch in memory and measured
before and after the stage: the rate of the devices without any other work. The ratio is therefore
the share of the stage's time in which the devices are busy. Memory is the resident memory after
each tenth of the images. The last line of the output is one JSON object.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from input import CLASSES, FOLDER, make_config, make_data, resident_megabytes
from workers import ROOT

KIND = "png 240x180"
PURE_REPEATS = 4


def measure(flags: argparse.Namespace) -> tuple[list[float], list[tuple[int, float, float]]]:
    """Labels a folder of images.

    Returns:
        Seconds per batch of the predictor alone, before and after the stage; and, after each batch
        of the stage, (images done, time in seconds, resident megabytes).
    """
    sys.path.insert(0, str(ROOT))
    from semiseg_jax.runtime import malloc

    malloc.disable_malloc_trim()  # As in main.
    import jax

    from semiseg_jax import mesh, train_state
    from semiseg_jax.data import input_pipeline, load
    from semiseg_jax.inference import Predictor
    from semiseg_jax.models import deeplab
    from semiseg_jax.pseudo_labels import Labeler
    from semiseg_jax.runtime import xla

    config = make_config(make_data(pathlib.Path(flags.folder), KIND, flags.images))
    config.data.labels = 2.0
    config.model.backbone = flags.backbone
    config.pseudo.batch = flags.batch
    xla.force_cpu()
    dataset = load.load_dataset(config)
    model = deeplab.build(config.model, CLASSES)
    devices = mesh.make_mesh()
    variables = train_state.inference_variables(train_state.init_variables(model, 0, devices))
    colour = deeplab.input_mean(config.model)

    batches = input_pipeline.image_batches(dataset.unlabeled, dataset, flags.batch, 1, colour)
    images = mesh.shard_batch({"image": next(iter(batches)).image}, devices)["image"]
    predictor = Predictor(model, devices, config.pseudo.scales, config.pseudo.flip)

    def predict_batch() -> float:
        began = time.perf_counter()
        jax.block_until_ready(predictor(variables, images))
        return time.perf_counter() - began

    predict_batch()  # Compiles the predictor.
    alone = [predict_batch() for _ in range(PURE_REPEATS)]
    progress_log: list[tuple[int, float, float]] = []

    def progress(done: int, total: int) -> None:
        progress_log.append((done, time.perf_counter(), resident_megabytes()))

    label = Labeler(model, dataset, config, devices, colour)
    with tempfile.TemporaryDirectory() as folder:
        label(variables, "benchmark", folder, progress)
    return alone + [predict_batch() for _ in range(PURE_REPEATS)], progress_log


def main() -> None:
    """Labels a folder of images, and prints the share of time in which the devices were busy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", default=1000, type=int)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--folder", default=FOLDER, help="folder for the files")
    flags = parser.parse_args()
    alone, progress_log = measure(flags)
    # The first batch compiles the programs; counting starts after it.
    (first, began, _), (last, ended, _) = progress_log[0], progress_log[-1]
    rate, possible = (last - first) / (ended - began), flags.batch / statistics.median(alone)
    tenths = [progress_log[int(i)] for i in np.linspace(0, len(progress_log) - 1, 11)]
    print("images", *(f"{done:7}" for done, *_ in tenths))
    print("MB    ", *(f"{megabytes:7.0f}" for *_, megabytes in tenths))
    print(
        f"{rate:.2f} images/s, {possible:.2f} in memory: devices busy {100 * rate / possible:.0f} %"
    )
    case = f"{flags.backbone}, {last} images of 240x180, from files to files"
    row = {"case": case, "ours": rate, "peer": possible, "ratio": rate / possible}
    print(json.dumps({"name": "labelling", "cases": [row]}))


if __name__ == "__main__":
    main()
