"""Strong augmentation against imgaug, albumentations and torchvision v2, on one core.

    python benchmarks/augment.py [--sizes=769,513] [--repeats=15] [--peers=imgaug,…]

Every operation and the pipeline of three random ones, uint8 in, uint8 out. Ours is what the
tf.data pipeline runs: a graph that draws the magnitude and applies the operation, with a new seed
and another image at each call. The peers run in environments of their own, made when first needed
under .venv-peers/ from benchmarks/peers/*.txt, and take turns with ours on the same core. Times are
the CPU time of the process, all threads: other programs on the machine do not count. A case's
number is the median over the repeats; a repeat of a single operation is 2 images, one of the
pipeline 40, because its cost depends on what is drawn. The last line is one JSON object; ratio > 1
where ours is faster.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable

# Before NumPy and TensorFlow start threads; the workers inherit both.
CORE = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})
os.environ.update(
    OMP_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TF_CPP_MIN_LOG_LEVEL="3",
    TF_NUM_INTRAOP_THREADS="1",
    TF_NUM_INTEROP_THREADS="1",
)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from workers import ROOT, Worker  # noqa: E402

sys.path.insert(0, str(ROOT))

from semiseg_jax.data.sda import OPS, strong_augment  # noqa: E402

PEERS = ("imgaug", "albumentations", "torchvision")
IMAGES = 8
PIPELINE = "N=3"
COUNTS = {PIPELINE: 40}


def pictures(size: int) -> np.ndarray:
    """uint8 [IMAGES, size, size, 3]: smooth colours with some noise, as photographs have."""
    rng = np.random.default_rng(size)
    result = np.empty((IMAGES, size, size, 3), np.uint8)
    for image in result:
        coarse = rng.normal(128, 60, (size // 32 + 2, size // 32 + 2, 3))
        smooth = np.kron(coarse, np.ones((32, 32, 1)))[:size, :size]
        image[:] = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255)
    return result


class Ours:
    """Times our operations the way a worker times the peer's."""

    def __init__(self, images: dict[int, np.ndarray]):
        self._images = {size: [tf.constant(x) for x in stack] for size, stack in images.items()}
        self._graphs: dict[str, Callable] = {}
        self._seed = 0

    def time(self, case: str, size: int, count: int) -> float:
        """Milliseconds an image, over `count` images."""
        if case not in self._graphs:
            self._graphs[case] = _graph(case)
        graph = self._graphs[case]
        images = self._images[size]
        arguments = []
        for _ in range(count):
            self._seed += 1
            arguments.append((images[self._seed % IMAGES], tf.constant([self._seed, 0], tf.int64)))
        start = time.process_time()
        for image, seed in arguments:
            graph(image, seed)
        return 1000 * (time.process_time() - start) / count


def _graph(case: str) -> Callable:
    # Image and seed are arguments of an unknown size: nothing can be computed ahead.
    signature = [tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    sda = types.SimpleNamespace(num_ops=3, replace=True, magnitude="uniform", ops=tuple(OPS))

    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if case == PIPELINE:
            return strong_augment(image, seed, sda)
        return OPS[case].apply(image, **OPS[case].sample(seed))

    return tf.function(augment, input_signature=signature)


class Peer(Worker):
    """A peer's process, and what it can do."""

    def __init__(self, name: str, folder: str):
        super().__init__(name, "augment_peers.py", name, folder)
        self.cases: list[str] = self.ready["cases"]

    def time(self, case: str, size: int, count: int) -> float:
        """Milliseconds an image, over `count` images."""
        return self.ask({"case": case, "size": size, "count": count})["ms"]


def compare(ours: Ours, workers: dict[str, Peer], case: str, size: int, repeats: int) -> list:
    """Interleaved repeats of one case at one size; rows of the result."""
    having = {peer: worker for peer, worker in workers.items() if case in worker.cases}
    count = COUNTS.get(case, 2)
    times: dict[str, list[float]] = {"ours": []}
    for repeat in range(-1, repeats):
        for name in ("ours", *having):
            try:
                milliseconds = having.get(name, ours).time(case, size, count)
            except RuntimeError as error:
                print(f"{case} at {size}: {name} is left out: {error}", flush=True)
                workers[name].cases.remove(case)
                return compare(ours, workers, case, size, repeats)
            if repeat >= 0:  # The one before traces graphs and fills caches.
                times.setdefault(name, []).append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    suffix = "" if size == 769 else f" @{size}"
    rows = []
    for peer in having:
        mine, theirs = medians["ours"], medians[peer]
        rows.append(
            {
                "case": f"{case} vs {peer}{suffix}",
                "ours": round(mine, 3),
                "peer": round(theirs, 3),
                "ratio": round(theirs / mine, 3),
            }
        )
        print(f"{rows[-1]['case']:40} {mine:9.2f} {theirs:9.2f} {theirs / mine:8.2f}", flush=True)
    return rows


def main() -> None:
    """Runs every case that a peer has."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="769,513", help="sides of the square images, pixels")
    parser.add_argument("--repeats", default=15, type=int)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--cases", default=",".join([*OPS, PIPELINE]))
    flags = parser.parse_args()
    images = {int(size): pictures(int(size)) for size in flags.sizes.split(",")}
    rows, workers = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size, stack in images.items():
            np.save(pathlib.Path(folder) / f"{size}.npy", stack)
        for peer in flags.peers.split(","):
            try:
                workers[peer] = Peer(peer, folder)
            except RuntimeError as error:
                print(f"{peer} is left out: {error}", flush=True)
        print(f"\n{'milliseconds an image, one core':40} {'ours':>9} {'peer':>9} {'ratio':>8}")
        ours = Ours(images)
        for size in images:
            for case in flags.cases.split(","):
                rows += compare(ours, workers, case, size, flags.repeats)
        for worker in workers.values():
            worker.close()
    print(json.dumps({"name": "augment", "cases": rows}))


if __name__ == "__main__":
    main()
