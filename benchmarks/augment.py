"""Strong augmentation against imgaug, albumentations and torchvision v2, on one core.

    python benchmarks/augment.py [--sizes=769,513] [--repeats=15] [--peers=imgaug,…]

Measures every operation and the pipeline of three random operations, uint8 in, uint8 out. Our code
is the graph of the tf.data pipeline: it draws the magnitude and applies the operation, with a new
seed and another image at each call. The peers run in environments of their own, which are created
on first use under .venv-peers/ from benchmarks/peers/*.txt, and alternate with ours on the same
core. Times are CPU times of the process, over all threads, so that other programs on the machine do
not count. The figure of a case is the median over the repeats; a repeat is 2 images for a single
operation, and 40 for the pipeline, because its cost depends on the drawn operations. The last line
of the output is one JSON object; ratio > 1 if ours is faster.
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

# Set before NumPy and TensorFlow start threads; the workers inherit affinity and environment.
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


def make_images(size: int) -> np.ndarray:
    """Returns uint8 [IMAGES, size, size, 3]: smooth colours with noise, similar to photographs."""
    rng = np.random.default_rng(size)
    result = np.empty((IMAGES, size, size, 3), np.uint8)
    for image in result:
        coarse = rng.normal(128, 60, (size // 32 + 2, size // 32 + 2, 3))
        smooth = np.kron(coarse, np.ones((32, 32, 1)))[:size, :size]
        image[:] = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255)
    return result


class Ours:
    """Times our operations in the same way as a worker times the peer's."""

    def __init__(self, images: dict[int, np.ndarray]):
        self._images = {size: [tf.constant(x) for x in stack] for size, stack in images.items()}
        self._graphs: dict[str, Callable] = {}
        self._seed = 0

    def time(self, case: str, size: int, count: int) -> float:
        """Returns milliseconds per image, over `count` images."""
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
    """Returns the tf.function of a case: (image, seed) -> image."""
    # Image and seed are arguments, of unknown image size, so that no result is precomputed.
    signature = [tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    sda = types.SimpleNamespace(num_ops=3, replace=True, magnitude="uniform", ops=tuple(OPS))

    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if case == PIPELINE:
            return strong_augment(image, seed, sda)
        return OPS[case].apply(image, **OPS[case].sample(seed))

    return tf.function(augment, input_signature=signature)


class Peer(Worker):
    """A peer's process and the cases that it supports."""

    def __init__(self, name: str, folder: str):
        super().__init__(name, "augment_peers.py", name, folder)
        self.cases: list[str] = self.ready["cases"]

    def time(self, case: str, size: int, count: int) -> float:
        """Returns milliseconds per image, over `count` images."""
        return self.request({"case": case, "size": size, "count": count})["ms"]


def compare(ours: Ours, workers: dict[str, Peer], case: str, size: int, repeats: int) -> list:
    """Runs the repeats of one case at one size, alternating; returns a result row for each peer."""
    supported = {peer: worker for peer, worker in workers.items() if case in worker.cases}
    count = COUNTS.get(case, 2)
    times: dict[str, list[float]] = {"ours": []}
    for repeat in range(-1, repeats):
        for name in ("ours", *supported):
            try:
                milliseconds = supported.get(name, ours).time(case, size, count)
            except RuntimeError as error:
                print(f"{case} at {size}: {name} is left out: {error}", flush=True)
                workers[name].cases.remove(case)
                return compare(ours, workers, case, size, repeats)
            if repeat >= 0:  # Repeat -1 traces graphs and fills caches.
                times.setdefault(name, []).append(milliseconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    suffix = "" if size == 769 else f" @{size}"
    rows = []
    for peer in supported:
        ours_ms, peer_ms = medians["ours"], medians[peer]
        rows.append(
            {
                "case": f"{case} vs {peer}{suffix}",
                "ours": round(ours_ms, 3),
                "peer": round(peer_ms, 3),
                "ratio": round(peer_ms / ours_ms, 3),
            }
        )
        print(
            f"{rows[-1]['case']:40} {ours_ms:9.2f} {peer_ms:9.2f} {peer_ms / ours_ms:8.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Runs every case that a peer supports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="769,513", help="sides of the square images, pixels")
    parser.add_argument("--repeats", default=15, type=int)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--cases", default=",".join([*OPS, PIPELINE]))
    flags = parser.parse_args()
    images = {int(size): make_images(int(size)) for size in flags.sizes.split(",")}
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
