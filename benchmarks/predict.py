"""Predicting files against evaluating them: images a second, and memory over the images.

    python benchmarks/predict.py [--images=200] [--kind="png 240x180"] [--batch=8]
        [--backbone=efficientnet_lite0] [--repeats=5] [--nooverlays]

Images of a kind of benchmarks/input.py, DeepLabV3+, one scale. Ours is predict's writer, from files
to label maps and overlays on the disk; the peer is evaluation, which reads the same images and
their masks, has the same network, and counts. The two take turns; medians, in images a second of
wall time, and of CPU time, which other programs on the machine disturb less. Memory is resident
after every tenth of the images of predict's first turn, in which it also compiles; its row compares
the first tenth with all of them. The last line is one JSON object; ratio > 1 where predicting is
cheaper.
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
from input import CLASSES, FOLDER, KINDS, config_of, make_data, resident_megabytes
from workers import ROOT, compared

CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}


class Both:
    """Prediction and evaluation of one network on one set of images."""

    def __init__(self, flags: argparse.Namespace, output: str):
        sys.path.insert(0, str(ROOT))
        from semiseg_jax import memory

        memory.keep_freed()  # As predict does.
        from semiseg_jax import deployed, evaluate, mesh, predictions, seeing, state
        from semiseg_jax.data import sources
        from semiseg_jax.models import deeplab

        config = config_of(make_data(pathlib.Path(flags.folder), flags.kind, flags.images))
        config.model.backbone = flags.backbone
        config.model = deeplab.resolve(config.model)
        config.eval.batch = flags.batch
        mesh.compute_on_cpu()
        found = sources.load(config)
        # The training images have masks, and there are many of them.
        dataset = dataclasses.replace(found, evaluation=found.labeled)
        # As in a folder of images: what is predicted has none.
        self._examples = [dataclasses.replace(e, mask=None) for e in dataset.evaluation]
        devices = mesh.make_mesh()
        model = deeplab.build(config.model, CLASSES)
        colour = deeplab.input_mean(config.model)
        self._variables = state.for_inference(state.init_variables(model, 0, devices))
        self._evaluator = evaluate.Evaluator(model, dataset, config.eval, devices, colour)
        protocol = evaluate.protocol(config, dataset, self._evaluator.pad_to)
        network = deployed.Deployed(
            model,
            self._variables,
            dataset.classes,
            dataset.palette,
            config.model,
            colour,
            pad_to=config.eval.pad_to,
            exact_sizes=frozenset(),
            batch=flags.batch,
            largest_pixels=0,
            protocol=protocol,
            description={"trained_on": {"data": flags.kind}, "miou": 0.0, "protocol": protocol},
        )
        usual = seeing.as_evaluated(network, devices.size)
        self._writer = predictions.Writer(network, usual, devices, output, flags.overlays)

    def predict(self, progress: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """Images a second by clock."""
        return self._speeds(lambda: self._writer(self._examples, progress))

    def evaluate(self) -> dict[str, float]:
        """Images a second by clock."""
        return self._speeds(lambda: self._evaluator(self._variables))

    def _speeds(self, work: Callable[[], Any]) -> dict[str, float]:
        began = {name: clock() for name, clock in CLOCKS.items()}
        work()
        count = len(self._examples)
        return {name: count / (clock() - began[name]) for name, clock in CLOCKS.items()}


def memory_row(case: str, seen: list[tuple[int, float]]) -> dict[str, Any]:
    """Prints (images done, resident megabytes) at each tenth, and returns the case's row."""
    tenths = [seen[int(i)] for i in np.linspace(0, len(seen) - 1, 11)][1:]
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
    """Predicts and evaluates a folder of images in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", default=200, type=int)
    parser.add_argument("--kind", default="png 240x180", choices=KINDS)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--nooverlays", dest="overlays", action="store_false")
    parser.add_argument("--folder", default=FOLDER, help="for the files")
    flags = parser.parse_args()
    seen = [(0, 0.0)]
    with tempfile.TemporaryDirectory() as output:
        both = Both(flags, output)
        both.predict(lambda count: seen.append((seen[-1][0] + count, resident_megabytes())))
        both.evaluate()  # It compiles.
        turns = [(both.predict(), both.evaluate()) for _ in range(flags.repeats)]
    case = f"{flags.backbone}, {flags.images} images, {flags.kind}"
    print(f"{'images/s':36} {'predict':>9} {'evaluate':>9} {'ratio':>8}")
    rows = []
    for clock in CLOCKS:
        ours, peer = ([turn[who][clock] for turn in turns] for who in (0, 1))
        rows.append(compared(f"{case}, {clock} clock", {"ours": ours, "peer": peer}))
    rows.append(memory_row(case, seen))
    print(json.dumps({"name": "predict", "cases": rows}))


if __name__ == "__main__":
    main()
