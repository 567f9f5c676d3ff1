"""A whole training step against PyTorch: DeepLabV3+ on three backbones, on the CPU.

    python benchmarks/train_step.py [--backbones=xception65,…] [--sizes=129,257] [--batch=4]
        [--repeats=7] [--threads=N]

Forward, backward, batch norm over the batch, cross-entropy and the SGD update, float32, 21 classes,
output stride 16, without dropout. Ours is the teacher's step as `main` runs it; PyTorch's is the
same network written the plain way, in channels_last, not compiled. Both start from the same weights
and see the same uint8 batch, and their first losses must agree, which shows that they compute the
same. PyTorch is a process in an environment of its own (benchmarks/peers/torchvision.txt), held to
the same cores and threads; the two take turns. A case's number is the median over the repeats, in
images a second; a repeat is `--steps` steps. On a machine that other programs use as well,
`--threads=1 --clock=cpu` counts the process's CPU time instead. The last line is one JSON object;
ratio > 1 where ours is faster.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np
from workers import ROOT, Worker, compared

CLASSES = 21
BACKBONES = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet50": "ResNet-50",
    "xception65": "Xception-65",
}
# PyTorch's threads wait actively for a while after their work.
REST_SECONDS = 0.3


def batch_of(size: int, count: int) -> dict[str, np.ndarray]:
    """uint8 images [n, h, w, 3] and labels [n, h, w], a tenth of them ignored."""
    rng = np.random.default_rng(size)
    labels = rng.integers(0, CLASSES, (count, size, size)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    return {"images": images, "labels": labels}


class Ours:
    """The teacher's step of the project, with one backbone."""

    def __init__(self, backbone: str, batch: int):
        # Imported once affinity is set: XLA takes its number of threads from it.
        sys.path.insert(0, str(ROOT))
        from semiseg_jax import memory

        memory.keep_freed()  # As main does.
        import jax

        from configs import default
        from semiseg_jax import mesh, optim, state, steps
        from semiseg_jax.data.streams import Streams
        from semiseg_jax.models import deeplab

        mesh.compute_on_cpu()
        config = default.get_config()
        config.model.backbone = backbone
        config.model.dropout = 0.0
        model = deeplab.build(config.model, CLASSES)
        self._jax, self._mesh_lib, self._state_lib = jax, mesh, state
        self._mesh = mesh.make_mesh()
        self._tx, _ = optim.make_optimizer(config.optim, "teacher", 100_000)
        streams = Streams(("labeled",), (), batch, batch)
        self._step = steps.make_train_step(model, self._tx, config.loss, streams, self._mesh)
        self.variables = state.init_variables(model, 0, self._mesh)
        self._running: dict[str, Any] = {}

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters of the weak norm by names such as "backbone.stem.conv.kernel"."""
        from flax import traverse_util

        params = self._state_lib.for_inference(self.variables)["params"]
        flat = traverse_util.flatten_dict(params, sep=".")
        return {name.replace(".weak", ""): np.asarray(leaf) for name, leaf in flat.items()}

    def run(self, case: str, batch: dict[str, np.ndarray], steps: int) -> dict[str, float]:
        """As the worker answers."""
        if case not in self._running:
            self._running[case] = self._state_lib.create(self.variables, self._tx, self._mesh)
        state, losses = self._running[case], []
        is_pseudo = np.zeros(len(batch["images"]), bool)
        key = self._jax.random.key(0)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            arrays = {"image": batch["images"], "label": batch["labels"], "is_pseudo": is_pseudo}
            state, metrics = self._step(state, self._mesh_lib.to_devices(arrays, self._mesh), key)
            losses.append(metrics["loss"])
        self._jax.block_until_ready(state)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        self._running[case] = state
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": float(losses[0])}


def compare(
    ours: Ours, peer: Worker, backbone: str, name: str, batch: dict[str, np.ndarray], flags
) -> dict:
    """Interleaved repeats of one case; a row of the result."""
    case = f"{BACKBONES[backbone]}, {name}"
    asked = {"backbone": backbone, "batch": name, "steps": flags.steps}
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[flags.clock]
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(-1, flags.repeats):
        answers = {}
        for who in speeds:
            time.sleep(REST_SECONDS)
            answers[who] = ours.run(name, batch, flags.steps) if who == "ours" else peer.ask(asked)
        if repeat < 0:  # It compiles and fills caches.
            losses = {who: answer["loss"] for who, answer in answers.items()}
            if abs(losses["ours"] - losses["peer"]) > 1e-4 * losses["peer"]:
                sys.exit(f"{case}: the networks differ, as their first losses do: {losses}")
            continue
        for who, answer in answers.items():
            speeds[who].append(len(batch["images"]) * flags.steps / answer[clock])
    return compared(f"DeepLabV3+ {case}", speeds)


def main() -> None:
    """Runs every size."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--sizes", default="129,257", help="sides in pixels, of the form 32 n + 1")
    parser.add_argument("--batch", default=4, type=int)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--steps", default=2, type=int, help="steps of a repeat")
    parser.add_argument("--threads", default=len(cores), type=int, help="and cores")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    flags = parser.parse_args()
    backbones = flags.backbones.split(",")
    if not set(backbones) <= BACKBONES.keys():
        sys.exit(f"--backbones must be out of {', '.join(BACKBONES)}.")
    sizes = [int(size) for size in flags.sizes.split(",")]
    if any(size % 32 != 1 for size in sizes):
        sys.exit("--sizes must be of the form 32 n + 1: there both paddings are alike.")
    os.sched_setaffinity(0, cores[: flags.threads])
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)

    batches = {f"{flags.batch}x{size}x{size}": batch_of(size, flags.batch) for size in sizes}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in batches.items():
            np.savez(pathlib.Path(folder) / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        peer = Worker("torchvision", "train_step_peer.py", folder, str(flags.threads))
        print(f"PyTorch {peer.ready['torch']}, {flags.threads} threads, {flags.clock} clock")
        print(f"{'images/s':36} {'ours':>9} {'peer':>9} {'ratio':>8}")
        for backbone in backbones:
            ours = Ours(backbone, flags.batch)
            weights = pathlib.Path(folder) / f"{backbone}.npz"
            np.savez(weights, **ours.weights())  # type: ignore[arg-type]
            rows += [compare(ours, peer, backbone, *item, flags) for item in batches.items()]
        peer.close()
    print(json.dumps({"name": "train_step", "cases": rows}))


if __name__ == "__main__":
    main()
