"""What a step of unimatch_v2 costs beside the passes of its network, on one device.

    python benchmarks/method_step.py [--crop=129] [--images=4] [--repeats=7]

A step has three passes: the averaged teacher on the weak views, and the student, forward and
backward, on the labelled images and on the two strong views. Each is compiled and timed on its own,
as are the update of the average and the mixing of images and labels. The step and these programs
alternate; a figure is the median over the repeats. EfficientNet-Lite0, float32, 11 classes. The
last line of the output is one JSON object: seconds by program, `ratio` of the step to the sum of
its passes, and the share of average and mixing in the step.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from workers import ROOT

sys.path.insert(0, str(ROOT))

CLASSES = 11


def make_programs(crop: int, images: int) -> dict[str, Callable[[], Any]]:
    """Returns the step and its parts by name; each call runs one and returns its arrays."""
    import jax
    import jax.numpy as jnp

    from configs import default
    from semiseg_jax import compiled_model, losses, mesh, train_state
    from semiseg_jax.methods import confidence, masks, mixing, registry
    from semiseg_jax.methods.image_keys import image_keys
    from semiseg_jax.models import deeplab

    config = default.get_config()
    config.method.name = "unimatch_v2"
    config.model.backbone = "efficientnet_lite0"
    config.model.dropout = 0.0
    config.train.batch_labeled = config.train.batch_unlabeled = images
    model = deeplab.build(deeplab.resolve(config.model), CLASSES)
    places = mesh.make_mesh(jax.devices()[:1])
    program = compiled_model.make_program(config, "student", 1000, model, places)
    method: Any = registry.build(config)
    variables = train_state.init_variables(model, 0, places)
    state = program.create_state(variables, places)
    rng = np.random.default_rng(0)
    batch = mesh.shard_batch(
        {
            "image": rng.integers(0, 256, (images, crop, crop, 3)).astype(np.uint8),
            "label": rng.integers(0, CLASSES, (images, crop, crop)).astype(np.uint8),
            "is_pseudo": np.zeros(images, bool),
            "views": rng.integers(0, 256, (images, 3, crop, crop, 3)).astype(np.uint8),
            "valid": np.ones((images, crop, crop), bool),
        },
        places,
    )
    key = jax.random.key(0)
    weak, strong = batch["views"][:, 0], batch["views"][:, 1:].reshape(-1, crop, crop, 3)
    norms = {name: v for name, v in variables.items() if name != "params"}

    @functools.partial(jax.jit, static_argnames="domain")
    def train_pass(params: Any, inputs: Any, domain: str) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = model.apply(
                {"params": params, **norms},
                inputs,
                domain=domain,
                train=True,
                mutable=list(norms),
                rngs={"dropout": key},
            )
            labels = jnp.zeros(logits.shape[:3], jnp.uint8)
            total, count = losses.cross_entropy(logits, labels)
            return total / count, updated

        return jax.grad(loss, has_aux=True)(params)

    @jax.jit
    def mix(views: Any, logits: Any) -> Any:
        labels = confidence.teacher_labels(logits, batch["valid"])
        mixed = []
        for view in (1, 2):
            keys = image_keys(jax.random.fold_in(key, view), images)
            boxes = masks.box_masks(mixing.unimatch_boxes(keys, (crop, crop)), (crop, crop))
            both = {"image": views[:, view], "labels": labels}
            mixed.append(mixing.mix(boxes, mixing.partners(both), both))
        return mixed

    update = jax.jit(method.update_state, donate_argnums=0)
    predict = jax.jit(lambda variables, inputs: model.apply(variables, inputs, domain="weak"))
    logits = predict(variables, weak)
    holder = {"state": state, "own": method.init_state(variables)}

    def step() -> Any:
        holder["state"], metrics = program.step(holder["state"], batch, key)
        return holder["state"], metrics

    def average() -> Any:
        holder["own"] = update(holder["own"], variables, 10)
        return holder["own"]

    return {
        "step": step,
        "teacher": lambda: predict(variables, weak),
        "labelled": lambda: train_pass(variables["params"], batch["image"], "weak"),
        "strong": lambda: train_pass(variables["params"], strong, "strong"),
        "average": average,
        "mixing": lambda: mix(batch["views"], logits),
    }


def main() -> None:
    """Times the step and its parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--crop", default=129, type=int)
    parser.add_argument("--images", default=4, type=int, help="labelled, and unlabelled")
    parser.add_argument("--repeats", default=7, type=int)
    flags = parser.parse_args()
    from semiseg_jax.runtime import malloc, xla

    malloc.disable_malloc_trim()  # As in main.
    xla.force_cpu()
    import jax

    programs = make_programs(flags.crop, flags.images)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(-1, flags.repeats):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if repeat >= 0:  # The first time compiles.
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    passes = sum(medians[name] for name in ("teacher", "labelled", "strong"))
    result = {
        **{name: round(value, 5) for name, value in medians.items()},
        "ratio": round(medians["step"] / passes, 3),
        "average_and_mixing": round((medians["average"] + medians["mixing"]) / medians["step"], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
