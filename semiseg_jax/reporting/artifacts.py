"""Writes the files of a run that only people read, and that `report` shows.

    WORKDIR/run.json                    classes, numbers of images, devices, versions
    WORKDIR/gallery/SPLIT/ID.jpg, .png  thumbnails of evaluation images and of their labels
    STAGE/evaluation.json               confusion matrix, mIoU by image
    STAGE/predictions/ID.png            predictions of the stage for the images of the gallery
    STAGE/norms.json                    weak and strong norm of some layers
    STAGE/pseudo_gallery.json           images whose pseudo-labels are shown, and why
    STAGE/pseudo_gallery/ID.jpg         thumbnails of these images

A run never reads these files, so no result depends on them. The functions that read the JSON files
for the report return None if a file is missing, damaged or of another form.
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

from semiseg_jax import pseudo_label_stats
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import image_io
from semiseg_jax.data.load import Dataset
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.evaluate import EvalExample, Score
from semiseg_jax.models.dsbn import DOMAINS, stats_collection
from semiseg_jax.runtime import fileio, json_forms
from semiseg_jax.train_state import Variables

RUN, GALLERY = "run.json", "gallery"
EVALUATION, PREDICTIONS, NORMS = "evaluation.json", "predictions", "norms.json"
PSEUDO_GALLERY = "pseudo_gallery"

# Evaluation images whose predictions are stored, evenly spaced in the list; the first
# NUM_EXAMPLES of them are also written to TensorBoard.
MAX_PREDICTIONS, NUM_EXAMPLES = 120, 4
# Longer side of a thumbnail in pixels, at most.
THUMBNAIL_SIDE = 480
# Layers whose norms are stored, and channels of each layer.
NUM_LAYERS, MAX_CHANNELS = 4, 512
# Name prefixes of the first modules of a backbone, in order; the others follow by name.
_FIRST_MODULES = ("stem", "entry", "middle")
# Pseudo-labels shown as least confident.
_NUM_LEAST_CONFIDENT = 4
# The norms that a layer can have, by name, each with its values by channel.
_CHANNELS = json_forms.list_of(json_forms.is_number, range(1, MAX_CHANNELS + 1))
_BY_DOMAIN = json_forms.both(
    json_forms.mapping_of(_CHANNELS, lambda name: name in DOMAINS),
    # Their values are plotted against each other.
    lambda by_domain: len(set(map(len, by_domain.values()))) <= 1,
)
_NUMBERS_BY_NAME = json_forms.mapping_of(json_forms.is_number, json_forms.is_name)
_CONFUSION = json_forms.both(
    json_forms.list_of(json_forms.list_of(json_forms.is_count), range(1, 256)),
    lambda rows: all(len(row) == len(rows) for row in rows),
)
_COLOUR = json_forms.list_of(
    json_forms.both(json_forms.is_count, lambda level: level < 256), range(3, 4)
)
# The forms of the files.
_RUN_FORM = json_forms.both(
    json_forms.record(
        {
            "started": json_forms.is_text,
            "classes": json_forms.list_of(json_forms.is_text, range(256)),
            "palette": json_forms.list_of(_COLOUR),
            "images": json_forms.mapping_of(json_forms.is_count),
            "split_hash": json_forms.is_text,
            "devices": json_forms.is_text,
            "machine": json_forms.is_text,
            "processes": json_forms.is_count,
            "versions": json_forms.mapping_of(json_forms.is_text),
        }
    ),
    lambda run: len(run["classes"]) == len(run["palette"]),
)
_EVALUATION_FORM = json_forms.both(
    json_forms.record(
        {
            "protocol": json_forms.is_object,  # in detail by `EvalProtocol.from_json`
            "gallery": json_forms.is_name,
            "kept": json_forms.list_of(json_forms.is_name),
            "confusion": _CONFUSION,
            "miou_by_image": json_forms.mapping_of(
                json_forms.optional(json_forms.is_number), json_forms.is_name
            ),
        }
    ),
    lambda evaluation: evaluation["miou_by_image"].keys() >= set(evaluation["kept"]),
)
_NORMS_FORM = json_forms.mapping_of(
    json_forms.record(dict.fromkeys(("mean", "var", "scale", "bias"), _BY_DOMAIN))
)
_PSEUDO_FORM = json_forms.record(
    {"least_confident": _NUMBERS_BY_NAME, "most_changed": _NUMBERS_BY_NAME}
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "tensorflow")


def write_run(workdir: epath.Path, dataset: Dataset, mesh: Mesh) -> None:
    """Writes run.json, with the time at which the command was last started."""
    device = mesh.devices.flat[0]
    installed = {d.name.replace("_", "-"): d.version for d in metadata.distributions()}
    content = {
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
            "semiseg_jax": workdir_lib.code_version(),
            "Python": platform.python_version(),
            **{name: installed[name] for name in _PACKAGES if name in installed},
        },
    }
    _write_json(workdir / RUN, content)


def read_run(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the content of run.json."""
    return fileio.read_json(workdir / RUN, _RUN_FORM)


def gallery_ids(dataset: Dataset) -> list[str]:
    """Returns the evaluation images whose predictions are stored, the same in every stage."""
    step = -(-len(dataset.evaluation) // MAX_PREDICTIONS)
    return [e.id for e in dataset.evaluation[:: max(step, 1)]]


class PredictionSink:
    """Receives the images of an evaluation and stores thumbnails of them.

    Attributes:
        shown: ids of the images to receive.
        examples: image, label and prediction side by side, uint8 [1, h, w, 3], by TensorBoard tag.
    """

    def __init__(self, workdir: epath.Path, stage: epath.Path, dataset: Dataset, final: bool):
        """Selects the images of an evaluation.

        Args:
            workdir: folder of the run, for the gallery.
            stage: folder of the stage, for the predictions.
            dataset: provides the evaluation images and the palette.
            final: whether the stage has ended; within a stage only examples are collected, and no
                file is written.
        """
        ids = gallery_ids(dataset)
        self._example_ids = frozenset(ids[:NUM_EXAMPLES])
        self.shown = frozenset(ids) if final else self._example_ids
        self.examples: dict[str, UInt8[np.ndarray, "1 h w 3"]] = {}
        self._palette = dataset.palette
        self._gallery = workdir / GALLERY / dataset.split_hash
        self._predictions = stage / PREDICTIONS
        self._final = final

    def __call__(self, seen: EvalExample) -> None:
        """Stores the thumbnails of an image."""
        image, label, predicted = (
            thumbnail(map_) for map_ in (seen.image, seen.label, seen.predicted)
        )
        if seen.id in self._example_ids:
            colours = image_io.full_palette(self._palette)
            row = np.concatenate([image, colours[label], colours[predicted]], axis=1)
            self.examples[f"{GALLERY}/{seen.id}"] = row[None]
        if not self._final:
            return
        truth = self._gallery / f"{seen.id}.png"
        encoded = image_io.encode_mask(label, self._palette)
        # The mask may have been corrected since another stage was evaluated.
        if not truth.exists() or truth.read_bytes() != encoded:
            jpeg = encode_jpeg(image)
            fileio.write_bytes(self._gallery / f"{seen.id}.jpg", jpeg, sync=False)
            fileio.write_bytes(truth, encoded, sync=False)
        prediction = image_io.encode_mask(predicted, self._palette)
        fileio.write_bytes(self._predictions / f"{seen.id}.png", prediction, sync=False)


def thumbnail(picture: UInt8[np.ndarray, "h w *rgb"]) -> UInt8[np.ndarray, "sh sw *rgb"]:
    """Returns a thumbnail of an image or label map, at most THUMBNAIL_SIDE pixels long."""
    height, width = picture.shape[:2]
    factor = THUMBNAIL_SIDE / max(height, width)
    if factor >= 1:
        return picture
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    is_image = picture.ndim == 3
    resampling = Image.Resampling.LANCZOS if is_image else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size, resampling))


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns the image as a JPEG file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "JPEG", quality=85)
    return content.getvalue()


def write_evaluation(
    stage: epath.Path, score: Score, dataset: Dataset, protocol: Mapping[str, Any]
) -> None:
    """Writes evaluation.json; the mIoU of an image without a labelled pixel is null."""
    by_image = {k: None if math.isnan(v) else v for k, v in score.by_image.items()}
    content = {
        "protocol": protocol,
        "gallery": dataset.split_hash,
        "kept": gallery_ids(dataset),
        "confusion": score.confusion.tolist(),
        "miou_by_image": {e.id: by_image[e.id] for e in dataset.evaluation if e.id in by_image},
    }
    _write_json(stage / EVALUATION, content)


def read_evaluation(stage: epath.Path) -> dict[str, Any] | None:
    """Returns the content of evaluation.json."""
    evaluation = fileio.read_json(stage / EVALUATION, _EVALUATION_FORM)
    try:
        EvalProtocol.from_json(evaluation["protocol"] if evaluation else {})
    except ValueError:
        return None
    return evaluation


# {layer: {"mean", "var", "scale", "bias": {domain: values by channel}}}
Norms = dict[str, dict[str, dict[str, Float[np.ndarray, " channels"]]]]


def norm_statistics(variables: Variables, domains: Sequence[str] = DOMAINS) -> Norms:
    """Returns the running moments and affine parameters of NUM_LAYERS layers of the backbone.

    Args:
        variables: variables of a network.
        domains: norms that the stage trains; norms that the network does not have are ignored.
    """
    result: Norms = {}
    stats = {d: variables[stats_collection(d)] for d in domains if stats_collection(d) in variables}
    flat = {d: traverse_util.flatten_dict(stats[d]) for d in stats}
    params = traverse_util.flatten_dict(variables["params"])
    for layer in _select_layers([path[:-1] for path in next(iter(flat.values()), ())]):
        values = {k: {d: flat[d][(*layer, k)] for d in flat} for k in ("mean", "var")}
        for key in ("scale", "bias"):
            values[key] = {d: params[p] for d in flat if (p := (*layer, d, key)) in params}
        result["/".join(layer)] = jax.tree.map(np.asarray, values)
    return result


def _select_layers(layers: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns NUM_LAYERS layers of the backbone, evenly spaced from its first to its last."""

    def depth(layer: tuple[str, ...]) -> tuple[int, list[list[tuple[int, str]]]]:
        # Sorts the entry flow before the middle flow, and stage 2 before stage 10.
        tokens_by_name = [re.findall(r"\d+|\D+", name) for name in layer]
        numbers = [[(int(t) if t.isdigit() else 0, t) for t in tokens] for tokens in tokens_by_name]
        ranks = (i for i, prefix in enumerate(_FIRST_MODULES) if layer[1].startswith(prefix))
        return next(ranks, len(_FIRST_MODULES)), numbers

    ordered = sorted({layer for layer in layers if layer[0] == "backbone"}, key=depth)
    count = min(NUM_LAYERS, len(ordered))
    indices = np.linspace(0, len(ordered) - 1, count).round().astype(int)
    return [ordered[index] for index in indices]


def write_norms(stage: epath.Path, layers: Norms) -> None:
    """Writes norms.json, with at most MAX_CHANNELS evenly spaced channels and 5 digits each."""

    def subsample(values: Float[np.ndarray, " channels"]) -> list[float]:
        return [float(f"{v:.5g}") for v in values[:: -(-len(values) // MAX_CHANNELS)]]

    # One tree per layer: `jax.tree.map` over all of them would sort the layers by name.
    _write_json(
        stage / NORMS, {name: jax.tree.map(subsample, values) for name, values in layers.items()}
    )


def read_norms(stage: epath.Path) -> dict[str, Any] | None:
    """Returns the content of norms.json."""
    return fileio.read_json(stage / NORMS, _NORMS_FORM)


def write_summaries(
    writer: metric_writers.MetricWriter, step: int, pictures: PredictionSink, layers: Norms
) -> None:
    """Writes the examples and the histograms of the norms of an evaluation to TensorBoard."""
    writer.write_images(step, pictures.examples)
    writer.write_histograms(
        step,
        {
            f"norm/{layer}/{key}/{domain}": values
            for layer, by_key in layers.items()
            for key, by_domain in by_key.items()
            for domain, values in by_domain.items()
            # A histogram of NaN or infinity is not defined.
            if np.isfinite(values).all()
        },
    )


def write_pseudo(
    stage: epath.Path, folder: epath.Path, manifest: Mapping[str, Any], dataset: Dataset
) -> None:
    """Writes pseudo_gallery.json and thumbnails of the images in it.

    Args:
        stage: folder of the stage whose model made the pseudo-labels.
        folder: folder of the label maps, with the output of `pseudo_label_stats`.
        manifest: manifest of the label maps.
        dataset: its unlabelled images are read.
    """
    confidence = {name: entry["mean_confidence"] for name, entry in manifest["images"].items()}
    ascending = sorted(confidence.items(), key=lambda item: item[1])
    content = {
        "least_confident": dict(ascending[:_NUM_LEAST_CONFIDENT]),
        "most_changed": (pseudo_label_stats.read_stats(folder) or {}).get("most_changed", {}),
    }
    ids = {name for scores in content.values() for name in scores}
    for example in dataset.unlabeled:
        if example.id in ids:
            jpeg = encode_jpeg(thumbnail(image_io.read_image(example.image)))
            fileio.write_bytes(stage / PSEUDO_GALLERY / f"{example.id}.jpg", jpeg, sync=False)
    _write_json(stage / f"{PSEUDO_GALLERY}.json", content)


def read_pseudo(stage: epath.Path) -> dict[str, Any] | None:
    """Returns the content of pseudo_gallery.json."""
    return fileio.read_json(stage / f"{PSEUDO_GALLERY}.json", _PSEUDO_FORM)


def _write_json(path: epath.Path, content: Any) -> None:
    fileio.write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
