"""All of a labelling stage, from files to files: the devices' busy share, and memory.

    python benchmarks/labelling.py [--images=1000] [--backbone=efficientnet_lite0] [--batch=8]

PNGs of 240x180, DeepLabV3+, five scales and mirror, as a run labels them. Ours is images a second
of the whole stage; the peer is the same predictor on one batch in memory, over and over, measured
before and after: what the devices could do if nothing else were to be done. So the ratio is the
share of the stage's time in which the devices are busy. Memory is resident after every tenth of the
images. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np
from input import CLASSES, FOLDER, config_of, make_data, resident_megabytes
from workers import ROOT

KIND = "png 240x180"
PURE_REPEATS = 4


def measure(flags: argparse.Namespace) -> tuple[list[float], list[tuple[int, float, float]]]:
    """Labels a folder of images.

    Returns:
        Seconds of the predictor alone on one batch, before and after; and of the stage, after each
        batch: images done, the clock's seconds, resident megabytes.
    """
    sys.path.insert(0, str(ROOT))
    from semiseg_jax import memory

    memory.keep_freed()  # As main does.
    import jax

    from semiseg_jax import mesh, state
    from semiseg_jax.data import pipeline, sources
    from semiseg_jax.inference import Predictor
    from semiseg_jax.models import deeplab
    from semiseg_jax.pseudo_labels import Labeler

    config = config_of(make_data(pathlib.Path(flags.folder), KIND, flags.images))
    config.data.labels = 2.0
    config.model.backbone = flags.backbone
    config.pseudo.batch = flags.batch
    mesh.compute_on_cpu()
    dataset = sources.load(config)
    model = deeplab.build(config.model, CLASSES)
    devices = mesh.make_mesh()
    variables = state.for_inference(state.init_variables(model, 0, devices))
    colour = deeplab.input_mean(config.model)

    batches = pipeline.image_batches(dataset.unlabeled, dataset, flags.batch, 1, colour)
    images = mesh.to_devices({"image": next(iter(batches)).image}, devices)["image"]
    predictor = Predictor(model, devices, config.pseudo.scales, config.pseudo.flip)

    def pure() -> float:
        began = time.perf_counter()
        jax.block_until_ready(predictor(variables, images))
        return time.perf_counter() - began

    pure()  # It compiles.
    alone = [pure() for _ in range(PURE_REPEATS)]
    seen: list[tuple[int, float, float]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, time.perf_counter(), resident_megabytes()))

    label = Labeler(model, dataset, config, devices, colour)
    with tempfile.TemporaryDirectory() as folder:
        label(variables, "benchmark", folder, progress, print)
    return alone + [pure() for _ in range(PURE_REPEATS)], seen


def main() -> None:
    """Labels a folder of images, and says how much of the time the devices were busy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", default=1000, type=int)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--folder", default=FOLDER, help="for the files")
    flags = parser.parse_args()
    alone, seen = measure(flags)
    # Labelling the first batch compiles its programs; counting starts behind that.
    (first, began, _), (last, ended, _) = seen[0], seen[-1]
    rate, possible = (last - first) / (ended - began), flags.batch / statistics.median(alone)
    tenths = [seen[int(i)] for i in np.linspace(0, len(seen) - 1, 11)]
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
