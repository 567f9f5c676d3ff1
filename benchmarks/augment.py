"""Strong augmentation against imgaug, albumentations and torchvision v2, on one core.

    python benchmarks/augment.py [--sizes=769,513] [--repeats=15] [--peers=imgaug,…] [--cases=N=3,…]

Measures every operation and pipelines of three random operations, uint8 in, uint8 out, with new
magnitudes and another image at each call. "N=3" draws from the whole pool, "N=3 common" from the
operations that albumentations has too. The two strong views of a method that labels inside the step
are compared with twice one view ("2 views vs twice 1 view").

An operation is timed as the peers' are: as a function of a NumPy array that draws a magnitude and
applies it. The pipelines are the graph of tf.data, with its call into Python. The peers run in
environments of their own, which are created on first use under .venv-peers/ from
benchmarks/peers/*.txt, and alternate with ours on the same core. Times are CPU times of the
process, over all threads, so that other programs on the machine do not count, but for the caches
that they share. In all processes, malloc keeps freed memory, as in a run on a CPU. The figure of a
case is the median over the repeats; a repeat is 8 images for a single operation, and 40 for a
pipeline, because its cost depends on the drawn operations. The last line of the output is one JSON
object; ratio > 1 if ours is faster.
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
    # For the peers' processes; `disable_malloc_trim` has the same effect on this one.
    MALLOC_MMAP_MAX_="0",
    MALLOC_TRIM_THRESHOLD_=str(1 << 40),
)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from augment_peers import COMMON, PIPELINES  # noqa: E402
from workers import ROOT, Worker  # noqa: E402

sys.path.insert(0, str(ROOT))

from configs import default  # noqa: E402
from semiseg_jax.data import view_augment  # noqa: E402
from semiseg_jax.data.sda import OPS, strong_augment  # noqa: E402
from semiseg_jax.data.views import Views  # noqa: E402
from semiseg_jax.runtime.malloc import disable_malloc_trim  # noqa: E402

PEERS = ("imgaug", "albumentations", "torchvision")
IMAGES = 8
POOLS = dict(zip(PIPELINES, (tuple(OPS), COMMON), strict=True))
VIEWS = ("sda", "jitter")
SINGLE_COUNT, PIPELINE_COUNT = 8, 40


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
        self._images = images
        self._graphs: dict[str, Callable] = {}
        self._seed = 0

    def time(self, case: str, size: int, count: int) -> float:
        """Returns milliseconds per image, over `count` images."""
        if case in OPS:
            return self._time(lambda i, image: _draw_and_apply(case, i, image), size, count)
        if case not in self._graphs:
            self._graphs[case] = _pipeline_graph(case)
        return self.time_graph(self._graphs[case], size, count)

    def time_graph(self, graph: Callable, size: int, count: int) -> float:
        """Returns milliseconds per image of a graph (image, seed) -> any."""
        seeds = [tf.constant([i, 0], tf.int64) for i in range(self._seed, self._seed + count)]
        offset = self._seed
        return self._time(
            lambda i, image: graph(image, seeds[i - offset]), size, count, tf.constant
        )

    def _time(self, call: Callable, size: int, count: int, prepare: Callable = np.copy) -> float:
        numbers = range(self._seed, self._seed + count)
        self._seed += count
        # Copies, as the peers', whose inputs are therefore as recently in the caches as ours.
        images = [prepare(self._images[size][i % IMAGES]) for i in numbers]
        start = time.process_time()
        for i, image in zip(numbers, images, strict=True):
            call(i, image)
        return 1000 * (time.process_time() - start) / count


def _draw_and_apply(case: str, seed: int, image: np.ndarray) -> np.ndarray:
    operation = OPS[case]
    return operation.kernel(image, **operation.arguments(operation.uniform.draw((seed, 0))))


def _pipeline_graph(case: str) -> Callable:
    """Returns the tf.function of three operations: (image, seed) -> image."""
    sda = types.SimpleNamespace(num_ops=3, replace=True, magnitude="uniform", ops=POOLS[case])
    return tf.function(
        lambda image, seed: strong_augment(image, seed, sda), input_signature=_SIGNATURE
    )


def _views_graph(kind: str, count: int, size: int) -> Callable:
    """Returns the tf.function of a weak view and `count` strong ones: (image, seed) -> views."""
    config = default.get_config()
    config.method.views.kind = kind
    config.data.crop = (size, size)
    config.data.scale = (1.0, 1.0)

    def views(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        pad_value = np.zeros(3, np.uint8)
        return view_augment.augment_views(image, Views(1, count), seed, seed, config, pad_value)[0]

    return tf.function(views, input_signature=_SIGNATURE)


# Image and seed are arguments, of unknown image size, so that no result is precomputed.
_SIGNATURE = [tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]


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
    count = PIPELINE_COUNT if case in POOLS else SINGLE_COUNT
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
    return [_row(f"{case} vs {peer}{suffix}", medians["ours"], medians[peer]) for peer in supported]


def compare_views(ours: Ours, kind: str, size: int, repeats: int) -> dict:
    """Returns the result row of two strong views against twice one strong view."""
    graphs = {count: _views_graph(kind, count, size) for count in (1, 2)}
    times: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(-1, repeats):
        for count, graph in graphs.items():
            milliseconds = ours.time_graph(graph, size, PIPELINE_COUNT)
            if repeat >= 0:
                times[count].append(milliseconds)
    one, two = (statistics.median(times[count]) for count in (1, 2))
    return _row(f"2 views vs twice 1 view, {kind} @{size}", two, 2 * one)


def _row(case: str, ours_ms: float, peer_ms: float) -> dict:
    """Prints and returns a result row."""
    ratio = peer_ms / ours_ms
    print(f"{case:40} {ours_ms:9.2f} {peer_ms:9.2f} {ratio:8.2f}", flush=True)
    return {
        "case": case,
        "ours": round(ours_ms, 3),
        "peer": round(peer_ms, 3),
        "ratio": round(ratio, 3),
    }


def main() -> None:
    """Runs every case that a peer supports."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="769,513", help="sides of the square images, pixels")
    parser.add_argument("--repeats", default=15, type=int)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--cases", default=",".join([*OPS, *POOLS, *VIEWS]))
    flags = parser.parse_args()
    disable_malloc_trim()
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
                if case in VIEWS:
                    rows.append(compare_views(ours, case, size, flags.repeats))
                else:
                    rows += compare(ours, workers, case, size, flags.repeats)
        for worker in workers.values():
            worker.close()
    print(json.dumps({"name": "augment", "cases": rows}))


if __name__ == "__main__":
    main()
