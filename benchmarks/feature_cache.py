"""What `data.cache_features` saves: steps that read features beside steps that encode images.

    python benchmarks/feature_cache.py [--backbone=dinov2_vits14] [--head=dpt] [--crop=224]
        [--images=4] [--repeats=7]

The backbone is frozen and has random weights, the dtype is float32, the classes are 11. A teacher's
step has labelled images alone; a student's as many strongly augmented ones, which are encoded in
either case. Both kinds of step alternate; a figure is the median over the repeats. A cached step
includes the reading of the files, which were written before the measurement. The last line of the
output is one JSON object; ratio > 1 if cached features are faster.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from workers import ROOT, comparison_row

sys.path.insert(0, str(ROOT))

CLASSES = 11


def make_steps(kind: str, flags: Any, folder: str) -> tuple[dict[str, Callable[[], Any]], int, int]:
    """Returns the steps of a stage, the bytes of an image's features, and the images of a step.

    The step on cached features is "ours", that on images is "peer".
    """
    import jax
    from etils import epath

    from configs import default
    from semiseg_jax import compiled_model, feature_cache, mesh, train_state
    from semiseg_jax.models import deeplab

    config = default.get_config()
    config.model.backbone, config.model.head = flags.backbone, flags.head
    config.model.freeze_backbone = True
    config.train.batch_labeled = config.train.batch_unlabeled = flags.images
    model = deeplab.build(deeplab.resolve(config.model), CLASSES)
    places = mesh.make_mesh(jax.devices()[:1])
    variables = train_state.init_variables(model, 0, places)
    rng = np.random.default_rng(0)
    count = flags.images * (2 if kind == "student" else 1)
    arrays = {
        "image": rng.integers(0, 256, (count, flags.crop, flags.crop, 3), np.uint8),
        "label": rng.integers(0, CLASSES, (count, flags.crop, flags.crop), np.uint8),
        "is_pseudo": np.arange(count) >= flags.images,
    }
    weak = arrays["image"][: flags.images]
    cache = feature_cache.FeatureCache(epath.Path(folder), model, variables)
    image_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.features(weak))) // len(weak)
    key = jax.random.key(0)

    def make_step(is_cached: bool) -> Callable[[], Any]:
        config.data.cache_features = is_cached
        program = compiled_model.make_program(config, kind, 1000, model, places)
        holder = {"state": program.create_state(variables, places)}

        def step() -> Any:
            features = {"features": cache.features(weak)} if is_cached else {}
            batch = mesh.shard_batch(arrays | features, places)
            holder["state"], metrics = program.step(holder["state"], batch, key)
            return metrics

        return step

    return {"ours": make_step(True), "peer": make_step(False)}, image_bytes, count


def main() -> None:
    """Times both steps of a teacher and of a student."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="dinov2_vits14")
    parser.add_argument("--head", default="dpt")
    parser.add_argument("--crop", default=224, type=int, help="side in pixels")
    parser.add_argument("--images", default=4, type=int, help="of each stream")
    parser.add_argument("--repeats", default=7, type=int)
    flags = parser.parse_args()
    from semiseg_jax.runtime import malloc, xla

    malloc.disable_malloc_trim()  # As in main.
    xla.force_cpu()
    import jax

    rows = []
    print(f"{'images/s':36} {'cached':>9} {'encoded':>9} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("teacher", "student"):
            steps, image_bytes, images = make_steps(kind, flags, folder)
            speeds: dict[str, list[float]] = {name: [] for name in steps}
            for repeat in range(-1, flags.repeats):
                for name, step in steps.items():
                    began = time.perf_counter()
                    jax.block_until_ready(step())
                    if repeat >= 0:  # The first one compiles.
                        speeds[name].append(images / (time.perf_counter() - began))
            rows.append(comparison_row(f"step of a {kind}, {flags.backbone}, {flags.head}", speeds))
    print(json.dumps({"name": "feature_cache", "image_bytes": image_bytes, "cases": rows}))


if __name__ == "__main__":
    main()
