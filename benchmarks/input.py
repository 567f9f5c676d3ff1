"""The input pipeline from files on disk: images per second and memory, for 100 to 10,000 images.

    python benchmarks/input.py [--counts=100,1000,10000] [--repeats=9] [--threads=2]

Measures the batches of a student's step: half labelled images, weakly augmented, half
pseudo-labelled images, strongly augmented; a sixteenth of the images is labelled. There are two
kinds of data: PNGs of 240x180 with a crop of 160x128 (CamVid at half size) and JPEGs of 1024x512
with a crop of 512x512. The files are generated once in the cache folder: 200 distinct files, and
hard links to them for larger sets, so that the sets need little disk space and stay in the page
cache.

Each size runs in its own process, and the processes alternate: a repeat is the same steps in each,
with the same draws. Each figure is the median over the repeats: images per second of wall time, and
of CPU time, which other programs on the machine disturb less; and the resident memory at the end.
The last line of the output is one JSON object: `ours` is the largest size, `peer` the one before,
ratio > 1 if the larger set is faster; ideally it is 1.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from workers import ROOT

sys.path.insert(0, str(ROOT))

DISTINCT = 200
CLASSES = 11
# (height, width) of the images, their format, (height, width) of the crop, steps per repeat.
KINDS = {
    "png 240x180": ((180, 240), "png", (128, 160), 40),
    "jpeg 1024x512": ((512, 1024), "jpg", (512, 512), 10),
}
# Default of --folder, for the generated files.
CACHE = os.environ.get("SEMISEG_CACHE") or pathlib.Path.home() / ".cache" / "semiseg_jax"
FOLDER = pathlib.Path(CACHE) / "benchmark_input"
BATCH = 8  # images in each stream
PREFETCH = 2


# --- Data ----------------------------------------------------------------------------------------


def synthetic_photograph(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image of smooth, noisy colours and a label of class blocks.

    Reading the image costs about as much as reading a photograph.
    """
    small = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (height, width, 3))
    image = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
    blocks = rng.integers(0, CLASSES, (height // 24 + 1, width // 24 + 1)).astype(np.uint8)
    label = np.kron(blocks, np.ones((24, 24), np.uint8))[:height, :width]
    return image, label


def make_data(folder: pathlib.Path, kind: str, count: int) -> pathlib.Path:
    """Returns the root of a folder data set of `count` images; generates it if it is missing."""
    (height, width), suffix, *_ = KINDS[kind]
    distinct = folder / f"{width}x{height}.{suffix}"
    if not distinct.exists():
        scratch = distinct.with_name(f"{distinct.name}.{os.getpid()}")
        scratch.mkdir(parents=True)
        for number in range(DISTINCT):
            image, label = synthetic_photograph(np.random.default_rng(number), height, width)
            Image.fromarray(image).save(scratch / f"{number}.{suffix}", quality=90)
            Image.fromarray(label).save(scratch / f"{number}.mask.png")
        scratch.rename(distinct)
    root = folder / f"{distinct.name}-{count}"
    if not root.exists():
        scratch = root.with_name(f"{root.name}.{os.getpid()}")
        for split, size in (("train", count), ("val", 1)):
            for name in ("images", "masks"):
                (scratch / name / split).mkdir(parents=True)
            for number in range(size):
                source = distinct / f"{number % DISTINCT}.{suffix}"
                os.link(source, scratch / "images" / split / f"{number:06d}.{suffix}")
                mask = source.with_suffix(".mask.png")
                os.link(mask, scratch / "masks" / split / f"{number:06d}.png")
        scratch.rename(root)
    return root


def make_config(root: pathlib.Path) -> Any:
    """Returns the default config on a data set from `make_data`."""
    from configs import default

    config = default.get_config()
    config.data.name = "folder"
    config.data.root = str(root)
    config.data.classes = tuple(f"class {i}" for i in range(CLASSES))
    return config


# --- One size, in its own process ----------------------------------------------------------------


def student_batches(root: pathlib.Path, kind: str, threads: int) -> Iterator[Any]:
    """Yields a student's batches from a data set, without end."""
    from semiseg_jax import stages
    from semiseg_jax.data import input_pipeline, load

    config = make_config(root)
    config.data.labels = 1 / 16
    config.data.crop = KINDS[kind][2]
    config.data.threads = threads
    config.data.prefetch = PREFETCH
    config.train.batch_labeled = config.train.batch_unlabeled = BATCH
    dataset = load.load_dataset(config)
    # Masks of the unlabelled images stand in for pseudo-labels.
    pseudo = input_pipeline.pseudo_examples(dataset, root / "masks" / "train")
    return input_pipeline.train_batches(
        config,
        dataset,
        pseudo,
        stages.batch_spec(config, "student"),
        stages.stage_seed(0, 1, "student"),
        range(1_000_000_000),
        np.zeros(3, np.uint8),
    )


def serve(root: pathlib.Path, kind: str, threads: int) -> None:
    """Answers each input line with the rates of a repeat and the memory after it."""
    batches = student_batches(root, kind, threads)
    for _ in sys.stdin:
        # The pipeline filled its buffers while it waited for its turn; these batches do not count.
        for _ in range(2 * PREFETCH):
            next(batches)
        steps = KINDS[kind][3]
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        images = 2 * BATCH * steps
        answer = {
            "wall": images / (time.perf_counter() - wall),
            "cpu": images / (time.process_time() - cpu),
            "memory": resident_megabytes(),
        }
        print(json.dumps(answer), flush=True)


def resident_megabytes() -> float:
    """Returns the resident memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


# --- All sizes -----------------------------------------------------------------------------------


class SizeProcess:
    """The process that serves one size of one kind of data."""

    def __init__(self, kind: str, count: int, flags: argparse.Namespace):
        command = [sys.executable, __file__, f"--serve={kind}", f"--counts={count}"]
        command += [f"--threads={flags.threads}", f"--folder={flags.folder}"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    def repeat(self) -> dict[str, float]:
        """Runs one repeat and returns the answer of `serve`."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("A size's process ended; what it said is above.")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process by ending its input."""
        self._process.communicate()


def compare(kind: str, counts: list[int], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the repeats of one kind of data, alternating between the sizes; prints a line per size.

    Returns:
        Result rows that compare the last two sizes.
    """
    sizes = {count: SizeProcess(kind, count, flags) for count in counts}
    answers: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for repeat in range(-1, flags.repeats):
        for count, size in sizes.items():
            answer = size.repeat()
            if repeat >= 0:  # Repeat -1 traces graphs and fills caches.
                answers[count].append(answer)
    medians = {}
    for count, size in sizes.items():
        size.close()
        samples = answers[count]
        rates = {key: statistics.median(answer[key] for answer in samples) for key in samples[0]}
        medians[count] = rates | {"memory": samples[-1]["memory"]}
        spread = ", ".join(
            f"{key} {min(a[key] for a in samples):.1f} to {max(a[key] for a in samples):.1f}"
            for key in ("wall", "cpu")
        )
        print(
            f"{kind:14} {count:6} images {rates['wall']:9.1f} {rates['cpu']:11.1f} "
            f"{medians[count]['memory']:8.0f}   ({spread})",
            flush=True,
        )
    small, large = (medians[count] for count in counts[-2:])
    names = f"{counts[-1]} against {counts[-2]} images"
    keys = {"wall": "images/s", "cpu": "images/CPU second", "memory": "resident MB"}
    return [
        {
            "case": f"{kind}, {what}, {names}",
            "ours": round(large[key], 3),
            "peer": round(small[key], 3),
            "ratio": round((large[key] / small[key]) ** (-1 if key == "memory" else 1), 3),
        }
        for key, what in keys.items()
    ]


def main() -> None:
    """Runs every kind at every count; with --serve runs one case as a subprocess."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--counts", default="100,1000,10000", help="ascending; the last two are compared"
    )
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--repeats", default=9, type=int)
    parser.add_argument(
        "--threads", default=0, type=int, help="threads of the pipeline; 0 for all cores"
    )
    parser.add_argument("--folder", default=FOLDER, help="folder for the files")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    counts = [int(count) for count in flags.counts.split(",")]
    folder = pathlib.Path(flags.folder)
    if flags.serve:
        serve(make_data(folder, flags.serve, counts[0]), flags.serve, flags.threads)
        return
    if len(counts) < 2:
        sys.exit("--counts must name at least two sizes: the last two are compared.")
    print(f"{'':28} {'images/s':>9} {'a CPU s':>11} {'RSS MB':>8}")
    rows = []
    for kind in flags.kinds.split(","):
        for count in counts:
            make_data(folder, kind, count)
        rows += compare(kind, counts, flags)
    print(json.dumps({"name": "input", "cases": rows}))


if __name__ == "__main__":
    main()
