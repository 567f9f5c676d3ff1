"""Prediction of files against evaluation: images per second, and memory over the images.

    python benchmarks/predict.py [--images=200] [--kind="png 240x180"] [--batch=8]
        [--backbone=efficientnet_lite0] [--repeats=5] [--nooverlays]

Images of a kind of benchmarks/input.py, DeepLabV3+, one scale. "Ours" is the writer of predict,
from files to label maps and overlays on disk; "peer" is evaluation by the same network, which reads
the same images and their masks, and counts pixels. The two alternate. Figures are medians, in
images per second of wall time, and of CPU time, which other programs on the machine disturb less.
Memory is the resident memory after each tenth of the images in the first run of predict, which also
compiles; its row compares the first tenth with all images. The last line of the output is one JSON
object; ratio > 1 if prediction is cheaper.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from input import CLASSES, FOLDER, KINDS, make_config, make_data, resident_megabytes
from workers import ROOT, comparison_row

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


class PredictionAndEvaluation:
    """Runs prediction and evaluation of one network on one set of images."""

    def __init__(self, flags: argparse.Namespace, output: str):
        sys.path.insert(0, str(ROOT))
        from semiseg_jax.eval_protocol import EvalProtocol
        from semiseg_jax.runtime import malloc

        malloc.disable_malloc_trim()  # As in predict.
        from semiseg_jax import evaluate, mesh, train_state
        from semiseg_jax.data import load
        from semiseg_jax.models import deeplab
        from semiseg_jax.runtime import xla
        from semiseg_jax.serving import model_bundle, prediction_writer

        config = make_config(make_data(pathlib.Path(flags.folder), flags.kind, flags.images))
        config.model.backbone = flags.backbone
        config.model = deeplab.resolve(config.model)
        config.eval.batch = flags.batch
        xla.force_cpu()
        loaded = load.load_dataset(config)
        # Evaluate on the training images, because the evaluation set has one image.
        dataset = dataclasses.replace(loaded, evaluation=loaded.labeled)
        # Without masks, as in a folder of images to predict.
        self._examples = [dataclasses.replace(e, mask=None) for e in dataset.evaluation]
        devices = mesh.make_mesh()
        model = deeplab.build(config.model, CLASSES)
        colour = deeplab.input_mean(config.model)
        self._variables = train_state.inference_variables(
            train_state.init_variables(model, 0, devices)
        )
        self._evaluator = evaluate.Evaluator(model, dataset, config.eval, devices, colour)
        protocol = EvalProtocol.of_run(config, dataset, self._evaluator.pad_to)
        network = model_bundle.ModelBundle(
            model,
            self._variables,
            dataset.classes,
            dataset.palette,
            config.model,
            colour,
            pad_to=config.eval.pad_to,
            exact_sizes=frozenset(),
            downscale=1,
            batch=flags.batch,
            largest_pixels=0,
            protocol=protocol,
            description={
                "trained_on": {"data": flags.kind},
                "miou": 0.0,
                "protocol": protocol.to_json(),
            },
        )
        default_protocol = model_bundle.evaluation_config(network, devices.size)
        self._writer = prediction_writer.PredictionWriter(
            network, default_protocol, devices, output, flags.overlays
        )

    def predict(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """Predicts all images; returns images per second by clock."""
        return self._speeds(lambda: self._writer(self._examples, progress))

    def evaluate(self) -> dict[str, float]:
        """Evaluates all images; returns images per second by clock."""
        return self._speeds(lambda: self._evaluator(self._variables))

    def _speeds(self, work: Callable[[], Any]) -> dict[str, float]:
        began = {name: clock() for name, clock in CLOCKS.items()}
        work()
        count = len(self._examples)
        return {name: count / (clock() - began[name]) for name, clock in CLOCKS.items()}


def memory_row(case: str, samples: list[tuple[int, float]]) -> dict[str, Any]:
    """Prints images done and resident megabytes at each tenth; returns the case's row.

    Args:
        case: its name.
        samples: (images done, resident megabytes), ascending.
    """
    tenths = [samples[int(i)] for i in np.linspace(0, len(samples) - 1, 11)][1:]
    print("images", *(f"{done:7}" for done, _ in tenths))
    print("MB    ", *(f"{megabytes:7.0f}" for _, megabytes in tenths))
    (_, first), (_, last) = tenths[0], tenths[-1]
    name = f"{case}, resident MB after all against a tenth"
    return {
        "case": name,
        "ours": round(last),
        "peer": round(first),
        "ratio": round(first / last, 3),
    }


def main() -> None:
    """Predicts and evaluates a folder of images alternately."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", default=200, type=int)
    parser.add_argument("--kind", default="png 240x180", choices=KINDS)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--nooverlays", dest="overlays", action="store_false")
    parser.add_argument("--folder", default=FOLDER, help="folder for the files")
    flags = parser.parse_args()
    samples = [(0, 0.0)]
    with tempfile.TemporaryDirectory() as output:
        benchmark = PredictionAndEvaluation(flags, output)
        benchmark.predict(
            lambda count: samples.append((samples[-1][0] + count, resident_megabytes()))
        )
        benchmark.evaluate()  # Compiles the evaluation.
        turns = [(benchmark.predict(), benchmark.evaluate()) for _ in range(flags.repeats)]
    case = f"{flags.backbone}, {flags.images} images, {flags.kind}"
    print(f"{'images/s':36} {'predict':>9} {'evaluate':>9} {'ratio':>8}")
    rows = []
    for clock in CLOCKS:
        ours, peer = ([turn[who][clock] for turn in turns] for who in (0, 1))
        rows.append(comparison_row(f"{case}, {clock} clock", {"ours": ours, "peer": peer}))
    rows.append(memory_row(case, samples))
    print(json.dumps({"name": "predict", "cases": rows}))


if __name__ == "__main__":
    main()
