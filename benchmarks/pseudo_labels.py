"""Labelling with five scales and mirror images against PyTorch, on the CPU.

    python benchmarks/pseudo_labels.py [--backbones=efficientnet_lite0,resnet50] [--size=180x240]
        [--batch=8] [--repeats=7] [--threads=N]

DeepLabV3+, output stride 16, 11 classes, float32; softmax values averaged over scales .5, .75, 1,
1.5, 1.75 and mirror images, class ids copied to the host. Ours is the predictor and arg max that
`main` labels with; PyTorch's is the same computation in inference mode and channels_last, also with
original and mirror image in one pass. Both start from the same weights. The class ids must agree on
99.9 % of the pixels for the networks that are equal at every size (ResNet-50; our
EfficientNet-Lite0 uses TensorFlow's SAME padding, which differs from PyTorch's at most sizes).
PyTorch runs as a process in its own environment, on the same cores and with as many threads,
alternating with ours. Figures are medians, in images per second. The last line of the output is one
JSON object; ratio > 1 if ours is faster.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from train_step import BACKBONES, REST_SECONDS
from workers import ROOT, Worker, comparison_row

CLASSES = 11
SCALES = (0.5, 0.75, 1.0, 1.5, 1.75)
SAME_AT_EVERY_SIZE = ("resnet50",)


class Ours:
    """The project's predictor, with one backbone."""

    def __init__(self, backbone: str):
        # Imported after the affinity is set, from which XLA takes its number of threads.
        sys.path.insert(0, str(ROOT))
        from semiseg_jax.runtime import malloc

        malloc.disable_malloc_trim()  # As in main.
        import jax
        import jax.numpy as jnp

        from configs import default
        from semiseg_jax import inference, mesh, train_state
        from semiseg_jax.models import deeplab
        from semiseg_jax.runtime import xla

        xla.force_cpu()
        config = default.get_config()
        config.model.backbone = backbone
        model = deeplab.build(config.model, CLASSES)
        self._mesh_lib, self._mesh = mesh, mesh.make_mesh()
        self._variables = train_state.inference_variables(
            train_state.init_variables(model, 0, self._mesh)
        )
        self._predictor = inference.Predictor(model, self._mesh, SCALES, flip=True)
        self._decide = jax.jit(lambda p: jnp.argmax(p, axis=-1).astype(jnp.uint8))

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the parameters by names such as "backbone.stem.conv.kernel"."""
        from flax import traverse_util

        flat = traverse_util.flatten_dict(self._variables["params"], sep=".")
        return {name.replace(".weak", ""): np.asarray(leaf) for name, leaf in flat.items()}

    def label(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """Returns class ids [n, h, w], and the wall and CPU time of the call in seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        arrays = self._mesh_lib.shard_batch({"image": images}, self._mesh)
        classes = np.asarray(self._decide(self._predictor(self._variables, arrays["image"])))
        return classes, {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }


def compare(backbone: str, peer: Worker, folder: pathlib.Path, images: np.ndarray, flags) -> dict:
    """Runs the repeats of one case, alternating; returns its result row."""
    ours = Ours(backbone)
    np.savez(folder / f"{backbone}.npz", **ours.weights())  # type: ignore[arg-type]
    case = f"{BACKBONES[backbone]}, {flags.batch}x{flags.size}"
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[flags.clock]
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(-1, flags.repeats):
        ids_file = str(folder / "classes.npy") if repeat < 0 else ""
        message = {"backbone": backbone, "batch": "batch", "scales": SCALES, "save": ids_file}
        time.sleep(REST_SECONDS)
        classes, our_times = ours.label(images)
        time.sleep(REST_SECONDS)
        peer_times = peer.request(message)
        if repeat < 0:  # Compiles and fills caches.
            agreement = float(np.mean(classes == np.load(ids_file)))
            if backbone in SAME_AT_EVERY_SIZE and agreement < 0.999:
                sys.exit(f"{case}: only {agreement:.4f} of the pixels have the same class")
            continue
        speeds["ours"].append(len(images) / our_times[clock])
        speeds["peer"].append(len(images) / peer_times[clock])
    return comparison_row(f"DeepLabV3+ {case}", speeds)


def main() -> None:
    """Runs every backbone."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbones", default="efficientnet_lite0,resnet50")
    parser.add_argument("--size", default="180x240", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument(
        "--threads", default=len(cores), type=int, help="number of threads and of cores"
    )
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    flags = parser.parse_args()
    os.sched_setaffinity(0, cores[: flags.threads])
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    height, width = (int(side) for side in flags.size.split("x"))
    shape = (flags.batch, height, width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        np.savez(folder / "batch.npz", images=images)
        peer = Worker("torchvision", "pseudo_labels_peer.py", name, str(flags.threads))
        print(f"PyTorch {peer.ready['torch']}, {flags.threads} threads, {flags.clock} clock")
        print(f"{'images/s':36} {'ours':>9} {'peer':>9} {'ratio':>8}")
        backbones = flags.backbones.split(",")
        rows = [compare(backbone, peer, folder, images, flags) for backbone in backbones]
        peer.close()
    print(json.dumps({"name": "pseudo_labels", "cases": rows}))


if __name__ == "__main__":
    main()
