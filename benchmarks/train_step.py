"""A whole training step against PyTorch, on the CPU: DeepLabV3+ on three backbones, DPT on DINOv2.

    python benchmarks/train_step.py [--backbones=xception65,…] [--sizes=129,257] [--batch=4]
        [--repeats=7] [--threads=N]
    python benchmarks/train_step.py --backbones=dinov2_vits14 --sizes=224 [--frozen] [--contiguous]

Forward pass, backward pass, batch norm over the batch, cross-entropy and the SGD update, float32,
21 classes, output stride 16, without dropout. On DINOv2 the update is AdamW's; with --frozen the
backbone keeps its weights. Ours is the teacher's step as `main` runs it; PyTorch's is the same
network written in the usual way, in channels_last or --contiguous, not compiled. Both start
from the same weights and use the same uint8 batch; their first losses must agree, which shows that
the computations are the same. PyTorch runs as a process in its own environment
(benchmarks/peers/torchvision.txt), on the same cores and with as many threads, alternating with
ours. The figure of a case is the median over the repeats, in images per second; a repeat is
`--steps` steps. On a machine with other programs, `--threads=1 --clock=cpu` counts the CPU time of
the process instead. The last line of the output is one JSON object; ratio > 1 if ours is faster.
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
from workers import ROOT, Worker, comparison_row

CLASSES = 21
BACKBONES = {
    "efficientnet_lite0": "EfficientNet-Lite0",
    "resnet50": "ResNet-50",
    "xception65": "Xception-65",
    "dinov2_vits14": "DINOv2-S",
}
VISION_TRANSFORMERS = {"dinov2_vits14": 14}  # sides of their patches
# Pause before each measurement: PyTorch's threads wait actively for a while after their work.
REST_SECONDS = 0.3


def random_batch(size: int, count: int) -> dict[str, np.ndarray]:
    """Returns uint8 images [n, h, w, 3] and labels [n, h, w], a tenth of which are ignored."""
    rng = np.random.default_rng(size)
    labels = rng.integers(0, CLASSES, (count, size, size)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    return {"images": images, "labels": labels}


class Ours:
    """The teacher's step of the project, with one backbone."""

    def __init__(self, backbone: str, batch: int, is_frozen: bool = False):
        # Imported after the affinity is set, from which XLA takes its number of threads.
        sys.path.insert(0, str(ROOT))
        from semiseg_jax.runtime import malloc

        malloc.disable_malloc_trim()  # As in main.
        import jax

        from configs import default
        from semiseg_jax import mesh, optim, train_state, train_step
        from semiseg_jax.data.batch_layout import BatchSpec
        from semiseg_jax.models import deeplab
        from semiseg_jax.runtime import xla

        xla.force_cpu()
        config = default.get_config()
        config.model.backbone = backbone
        config.model.dropout = 0.0
        config.model.freeze_backbone = is_frozen
        if backbone in VISION_TRANSFORMERS:
            config.model.head, config.optim.kind = "dpt", "adamw"
        model = deeplab.build(config.model, CLASSES)
        self._jax, self._mesh_lib, self._state_lib = jax, mesh, train_state
        self._mesh = mesh.make_mesh()
        self._tx, _ = optim.make_optimizer(
            config.optim, "teacher", 100_000, freeze_backbone=is_frozen
        )
        streams = BatchSpec(("labeled",), (), batch, batch)
        self._step = train_step.make_train_step(model, self._tx, config.loss, streams, self._mesh)
        self.variables = train_state.init_variables(model, 0, self._mesh)
        self._states: dict[str, Any] = {}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the weak norm's and all other parameters by "backbone.stem.conv.kernel" names."""
        from flax import traverse_util

        params = self._state_lib.inference_variables(self.variables)["params"]
        flat = traverse_util.flatten_dict(params, sep=".")
        return {name.replace(".weak", ""): np.asarray(leaf) for name, leaf in flat.items()}

    def run(self, case: str, batch: dict[str, np.ndarray], steps: int) -> dict[str, float]:
        """Runs steps of a case; returns the same dict as the peer: seconds, cpu_seconds, loss."""
        if case not in self._states:
            create = self._state_lib.create_train_state
            self._states[case] = create(self.variables, self._tx, self._mesh)
        state, losses = self._states[case], []
        is_pseudo = np.zeros(len(batch["images"]), bool)
        key = self._jax.random.key(0)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            arrays = {"image": batch["images"], "label": batch["labels"], "is_pseudo": is_pseudo}
            state, metrics = self._step(state, self._mesh_lib.shard_batch(arrays, self._mesh), key)
            losses.append(metrics["loss"])
        self._jax.block_until_ready(state)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        self._states[case] = state
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": float(losses[0])}


def compare(
    ours: Ours, peer: Worker, backbone: str, name: str, batch: dict[str, np.ndarray], flags
) -> dict:
    """Runs the repeats of one case, alternating; returns its result row."""
    head = "DPT" if backbone in VISION_TRANSFORMERS else "DeepLabV3+"
    case = f"{head} {BACKBONES[backbone]}, {name}{', frozen' if flags.frozen else ''}"
    message = {"backbone": backbone, "batch": name, "steps": flags.steps}
    message |= {"frozen": flags.frozen, "contiguous": flags.contiguous}
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[flags.clock]
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(-1, flags.repeats):
        answers = {}
        for who in speeds:
            time.sleep(REST_SECONDS)
            answers[who] = (
                ours.run(name, batch, flags.steps) if who == "ours" else peer.request(message)
            )
        if repeat < 0:  # Compiles and fills caches.
            losses = {who: answer["loss"] for who, answer in answers.items()}
            if abs(losses["ours"] - losses["peer"]) > 1e-4 * losses["peer"]:
                sys.exit(f"{case}: the networks differ, as their first losses do: {losses}")
            continue
        for who, answer in answers.items():
            speeds[who].append(len(batch["images"]) * flags.steps / answer[clock])
    return comparison_row(case, speeds)


def main() -> None:
    """Runs every backbone at every size."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    networks = [name for name in BACKBONES if name not in VISION_TRANSFORMERS]
    parser.add_argument("--backbones", default=",".join(networks))
    parser.add_argument(
        "--sizes", default="129,257", help="sides in pixels: 32 n + 1, on DINOv2 multiples of 14"
    )
    parser.add_argument("--frozen", action="store_true", help="the backbone is not trained")
    parser.add_argument("--contiguous", action="store_true", help="PyTorch not in channels_last")
    parser.add_argument("--batch", default=4, type=int)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--steps", default=2, type=int, help="steps of a repeat")
    parser.add_argument(
        "--threads", default=len(cores), type=int, help="number of threads and of cores"
    )
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    flags = parser.parse_args()
    backbones = flags.backbones.split(",")
    if not set(backbones) <= BACKBONES.keys():
        sys.exit(f"--backbones must be out of {', '.join(BACKBONES)}.")
    sizes = [int(size) for size in flags.sizes.split(",")]
    if flags.frozen and not set(backbones) <= VISION_TRANSFORMERS.keys():
        sys.exit("--frozen is for DINOv2: a frozen backbone of DeepLab would need running moments.")
    for backbone in backbones:
        patch = VISION_TRANSFORMERS.get(backbone)
        if any(size % patch if patch else size % 32 != 1 for size in sizes):
            sys.exit(
                "--sizes must be of the form 32 n + 1, where both paddings are alike, and on "
                "DINOv2 multiples of 14."
            )
    os.sched_setaffinity(0, cores[: flags.threads])
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)

    batches = {f"{flags.batch}x{size}x{size}": random_batch(size, flags.batch) for size in sizes}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arrays in batches.items():
            np.savez(pathlib.Path(folder) / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        peer = Worker("torchvision", "train_step_peer.py", folder, str(flags.threads))
        print(f"PyTorch {peer.ready['torch']}, {flags.threads} threads, {flags.clock} clock")
        print(f"{'images/s':36} {'ours':>9} {'peer':>9} {'ratio':>8}")
        for backbone in backbones:
            ours = Ours(backbone, flags.batch, flags.frozen)
            weights = pathlib.Path(folder) / f"{backbone}.npz"
            np.savez(weights, **ours.weights())  # type: ignore[arg-type]
            rows += [compare(ours, peer, backbone, *item, flags) for item in batches.items()]
        peer.close()
    print(json.dumps({"name": "train_step", "cases": rows}))


if __name__ == "__main__":
    main()
