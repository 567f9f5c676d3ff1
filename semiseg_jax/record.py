"""What a run keeps for people to look at: pictures, scores by image, both norms, what it ran on.

    WORKDIR/run.json                    classes, counts of images, devices, versions
    WORKDIR/gallery/SPLIT/ID.jpg, .png  evaluation images, made small, and their labels
    STAGE/evaluation.json               confusion matrix, mIoU by image
    STAGE/predictions/ID.png            what the stage sees in the images of the gallery
    STAGE/norms.json                    weak and strong norms of some layers
    STAGE/pseudo_gallery.json           some of the images that the stage labelled, and why these
    STAGE/pseudo_gallery/ID.jpg         they themselves, made small

Nothing is read from here by a run itself: no result depends on it. `report` makes a page of it.
"""

import datetime
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from clu import metric_writers
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from semiseg_jax import health, provenance
from semiseg_jax.data import labels
from semiseg_jax.data.sources import Dataset
from semiseg_jax.evaluate import Score, Seen
from semiseg_jax.models.dsbn import DOMAINS, stats_collection
from semiseg_jax.state import Variables

RUN, GALLERY = "run.json", "gallery"
EVALUATION, PREDICTIONS, NORMS = "evaluation.json", "predictions", "norms.json"
PSEUDO_GALLERY = "pseudo_gallery"

# Evaluation images whose predictions are kept, evenly spaced in the list; of these, how many
# TensorBoard shows.
KEPT, EXAMPLES = 120, 4
# Pictures are made small: their longer side in pixels at most.
LONGER_SIDE = 480
# Layers whose norms are kept, and channels of each.
LAYERS, CHANNELS = 4, 512
# Parts of a backbone whose names say their place; all others come in the order of their names.
_IN_ORDER = ("stem", "entry", "middle")
# Pseudo-labels to show, of either kind.
SHOWN_PSEUDO = 4
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow")


def keep_run(workdir: epath.Path, dataset: Dataset, mesh: Mesh) -> None:
    """Writes run.json; it has the time at which the command was last started."""
    device = mesh.devices.flat[0]
    installed = {d.name.replace("_", "-"): d.version for d in metadata.distributions()}
    found = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "classes": list(dataset.classes),
        "palette": [list(colour) for colour in dataset.palette],
        "images": {
            "labelled": len(dataset.labeled),
            "unlabelled": len(dataset.unlabeled),
            dataset.evaluated_on: len(dataset.evaluation),
        },
        "split_hash": dataset.split_hash,
        "devices": f"{mesh.size} × {device.device_kind} ({device.platform})",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processes": jax.process_count(),
        "versions": {
            "semiseg_jax": provenance.code_version(),
            "Python": platform.python_version(),
            **{name: installed[name] for name in _PACKAGES if name in installed},
        },
    }
    _write_json(workdir / RUN, found)


def kept_ids(dataset: Dataset) -> list[str]:
    """Evaluation images whose predictions are kept: the same ones in every stage."""
    step = -(-len(dataset.evaluation) // KEPT)
    return [e.id for e in dataset.evaluation[:: max(step, 1)]]


class Pictures:
    """Takes what an evaluation shows, and keeps it.

    Attributes:
        shown: ids of the images that are wanted.
        examples: image, labels and prediction side by side, [1, h, w, 3], by id, for TensorBoard.
    """

    def __init__(self, workdir: epath.Path, stage: epath.Path, dataset: Dataset, final: bool):
        """Inside a stage only the examples are taken; at its end, `final`, all that is kept."""
        kept = kept_ids(dataset)
        self._wanted_examples = frozenset(kept[:EXAMPLES])
        self.shown = frozenset(kept) if final else self._wanted_examples
        self.examples: dict[str, UInt8[np.ndarray, "1 h w 3"]] = {}
        self._palette = dataset.palette
        self._gallery = workdir / GALLERY / dataset.split_hash
        self._predictions = stage / PREDICTIONS
        self._final = final

    def __call__(self, seen: Seen) -> None:
        """Takes an image."""
        image, label, predicted = (small(part) for part in (seen.image, seen.label, seen.predicted))
        if seen.id in self._wanted_examples:
            colours = labels.full_palette(self._palette)
            row = np.concatenate([image, colours[label], colours[predicted]], axis=1)
            self.examples[f"{GALLERY}/{seen.id}"] = row[None]
        if not self._final:
            return
        truth = self._gallery / f"{seen.id}.png"
        if not truth.exists():
            labels.write_bytes(self._gallery / f"{seen.id}.jpg", jpeg(image), sync=False)
            labels.write_bytes(truth, labels.encode_mask(label, self._palette), sync=False)
        map_ = labels.encode_mask(predicted, self._palette)
        labels.write_bytes(self._predictions / f"{seen.id}.png", map_, sync=False)


def small(picture: UInt8[np.ndarray, "h w *rgb"]) -> UInt8[np.ndarray, "sh sw *rgb"]:
    """The picture, or label map, with its longer side at most LONGER_SIDE pixels."""
    height, width = picture.shape[:2]
    factor = LONGER_SIDE / max(height, width)
    if factor >= 1:
        return picture
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    is_image = picture.ndim == 3
    how = Image.Resampling.LANCZOS if is_image else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size, how))


def jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The image as a JPEG file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=85)
    return content.getvalue()


def keep_evaluation(
    stage: epath.Path, score: Score, dataset: Dataset, protocol: Mapping[str, Any]
) -> None:
    """Writes evaluation.json; null for an image without a labelled pixel."""
    by_image = {k: None if math.isnan(v) else v for k, v in score.by_image.items()}
    found = {
        "protocol": protocol,
        "gallery": dataset.split_hash,
        "kept": kept_ids(dataset),
        "confusion": score.confusion.tolist(),
        "miou_by_image": {e.id: by_image[e.id] for e in dataset.evaluation if e.id in by_image},
    }
    _write_json(stage / EVALUATION, found)


# {layer: {"mean", "var", "scale", "bias": {domain: values by channel}}}
Norms = dict[str, dict[str, dict[str, Float[np.ndarray, " channels"]]]]


def norms(variables: Variables, domains: Sequence[str] = DOMAINS) -> Norms:
    """The running moments and the affine parameters of some layers of the backbone.

    Args:
        variables: of a network.
        domains: norms that the stage trains; those that the network has are taken.
    """
    found: Norms = {}
    stats = {d: variables[stats_collection(d)] for d in domains if stats_collection(d) in variables}
    flat = {d: traverse_util.flatten_dict(stats[d]) for d in stats}
    params = traverse_util.flatten_dict(variables["params"])
    for layer in _chosen([path[:-1] for path in next(iter(flat.values()), ())]):
        values = {k: {d: flat[d][(*layer, k)] for d in flat} for k in ("mean", "var")}
        for key in ("scale", "bias"):
            values[key] = {d: params[p] for d in flat if (p := (*layer, d, key)) in params}
        found["/".join(layer)] = jax.tree.map(np.asarray, values)
    return found


def _chosen(layers: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """LAYERS layers of the backbone, evenly spaced from its first to its last."""

    def depth(layer: tuple[str, ...]) -> tuple[int, list[list[tuple[int, str]]]]:
        # The entry before the middle, and stage 2 before stage 10.
        parts = [re.findall(r"\d+|\D+", name) for name in layer]
        numbers = [[(int(p) if p.isdigit() else 0, p) for p in part] for part in parts]
        ranks = (i for i, prefix in enumerate(_IN_ORDER) if layer[1].startswith(prefix))
        return next(ranks, len(_IN_ORDER)), numbers

    ordered = sorted({layer for layer in layers if layer[0] == "backbone"}, key=depth)
    places = np.linspace(0, len(ordered) - 1, min(LAYERS, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def keep_norms(stage: epath.Path, kept: Norms) -> None:
    """Writes norms.json, of at most CHANNELS evenly spaced channels, 5 digits each."""

    def plain(values: Float[np.ndarray, " channels"]) -> list[float]:
        return [float(f"{v:.5g}") for v in values[:: -(-len(values) // CHANNELS)]]

    # Layer by layer, because trees come back sorted by name.
    _write_json(stage / NORMS, {layer: jax.tree.map(plain, kept[layer]) for layer in kept})


def summarise(
    writer: metric_writers.MetricWriter, step: int, pictures: Pictures, kept: Norms
) -> None:
    """Writes what TensorBoard shows of an evaluation beside its scalars: examples, both norms."""
    writer.write_images(step, pictures.examples)
    writer.write_histograms(
        step,
        {
            f"norm/{layer}/{key}/{domain}": values
            for layer, by_key in kept.items()
            for key, by_domain in by_key.items()
            for domain, values in by_domain.items()
            # There is no histogram of what is not a number.
            if np.isfinite(values).all()
        },
    )


def keep_pseudo(
    stage: epath.Path, folder: epath.Path, manifest: Mapping[str, Any], dataset: Dataset
) -> None:
    """Keeps the images of some pseudo-labels, made small, and a list that says why these.

    Args:
        stage: the folder of the stage that labelled.
        folder: of its label maps, with what `health` found.
        manifest: of the label maps.
        dataset: its unlabelled images are read.
    """
    sure = {name: entry["mean_confidence"] for name, entry in manifest["images"].items()}
    found = {
        "least_confident": dict(sorted(sure.items(), key=lambda item: item[1])[:SHOWN_PSEUDO]),
        "most_changed": (labels.read_json(folder / health.HEALTH) or {}).get("most_changed", {}),
    }
    wanted = {name for chosen in found.values() for name in chosen}
    for example in dataset.unlabeled:
        if example.id in wanted:
            image = small(labels.read_image(example.image))
            labels.write_bytes(
                stage / PSEUDO_GALLERY / f"{example.id}.jpg", jpeg(image), sync=False
            )
    _write_json(stage / f"{PSEUDO_GALLERY}.json", found)


def _write_json(path: epath.Path, content: Any) -> None:
    labels.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
