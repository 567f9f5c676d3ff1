"""Labelling with five scales and mirror against PyTorch, on the CPU.

    python benchmarks/pseudo_labels.py [--backbones=efficientnet_lite0,resnet50] [--size=180x240]
        [--batch=8] [--repeats=7] [--threads=N]

DeepLabV3+, output stride 16, 11 classes, float32; softmax values averaged over scales .5, .75, 1,
1.5, 1.75 and mirror images, class ids on the host. Ours is the predictor and the decision that
`main` labels with; PyTorch's is the same in inference mode and channels_last, plain and mirrored in
one pass too. Both start from the same weights. The class ids must agree on 99.9 % of the pixels
where the networks are the same at every size (ResNet-50; TensorFlow's SAME padding, which
EfficientNet-Lite0 has with us, is not PyTorch's at most sizes). PyTorch is a process in an
environment of its own, held to the same cores and threads; the two take turns; medians, in images a
second. The last line is one JSON object; ratio > 1 where ours is faster.
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
from workers import ROOT, Worker, compared

CLASSES = 11
SCALES = (0.5, 0.75, 1.0, 1.5, 1.75)
SAME_AT_EVERY_SIZE = ("resnet50",)


class Ours:
    """The project's predictor, with one backbone."""

    def __init__(self, backbone: str):
        # Imported once affinity is set: XLA takes its number of threads from it.
        sys.path.insert(0, str(ROOT))
        from semiseg_jax import memory

        memory.keep_freed()  # As main does.
        import jax
        import jax.numpy as jnp

        from configs import default
        from semiseg_jax import inference, mesh, state
        from semiseg_jax.models import deeplab

        mesh.compute_on_cpu()
        config = default.get_config()
        config.model.backbone = backbone
        model = deeplab.build(config.model, CLASSES)
        self._mesh_lib, self._mesh = mesh, mesh.make_mesh()
        self._variables = state.for_inference(state.init_variables(model, 0, self._mesh))
        self._predictor = inference.Predictor(model, self._mesh, SCALES, flip=True)
        self._decide = jax.jit(lambda p: jnp.argmax(p, axis=-1).astype(jnp.uint8))

    def weights(self) -> dict[str, np.ndarray]:
        """Parameters by names such as "backbone.stem.conv.kernel"."""
        from flax import traverse_util

        flat = traverse_util.flatten_dict(self._variables["params"], sep=".")
        return {name.replace(".weak", ""): np.asarray(leaf) for name, leaf in flat.items()}

    def label(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """Class ids [n, h, w], and the time they took."""
        wall, cpu = time.perf_counter(), time.process_time()
        arrays = self._mesh_lib.to_devices({"image": images}, self._mesh)
        classes = np.asarray(self._decide(self._predictor(self._variables, arrays["image"])))
        return classes, {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }


def compare(backbone: str, peer: Worker, folder: pathlib.Path, images: np.ndarray, flags) -> dict:
    """Interleaved repeats of one case; a row of the result."""
    ours = Ours(backbone)
    np.savez(folder / f"{backbone}.npz", **ours.weights())  # type: ignore[arg-type]
    case = f"{BACKBONES[backbone]}, {flags.batch}x{flags.size}"
    clock = {"wall": "seconds", "cpu": "cpu_seconds"}[flags.clock]
    speeds: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(-1, flags.repeats):
        saved = str(folder / "classes.npy") if repeat < 0 else ""
        asked = {"backbone": backbone, "batch": "batch", "scales": SCALES, "save": saved}
        time.sleep(REST_SECONDS)
        classes, mine = ours.label(images)
        time.sleep(REST_SECONDS)
        theirs = peer.ask(asked)
        if repeat < 0:  # It compiles and fills caches.
            same = float(np.mean(classes == np.load(saved)))
            if backbone in SAME_AT_EVERY_SIZE and same < 0.999:
                sys.exit(f"{case}: only {same:.4f} of the pixels have the same class")
            continue
        speeds["ours"].append(len(images) / mine[clock])
        speeds["peer"].append(len(images) / theirs[clock])
    return compared(f"DeepLabV3+ {case}", speeds)


def main() -> None:
    """Runs every backbone."""
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbones", default="efficientnet_lite0,resnet50")
    parser.add_argument("--size", default="180x240", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--batch", default=8, type=int)
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--threads", default=len(cores), type=int, help="and cores")
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
