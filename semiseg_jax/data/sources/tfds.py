"""Data sets of TensorFlow Datasets (TFDS), exported once to image and mask files.

TFDS stores examples in sequential files, and training here needs random access. So each split in
use is exported once, images and masks as the bytes that TFDS stores.
"""

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from semiseg_jax.data.dataset import Example, Layout, pairs, safe_id
from semiseg_jax.data.image_header import FORMATS
from semiseg_jax.data.sources import cityscapes
from semiseg_jax.data.sources.folder import classes_from_config
from semiseg_jax.runtime import fileio, hashes
from semiseg_jax.runtime.errors import UserError, first_line
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import cache_dir

PREFIX = "tfds:"
CITYSCAPES = "cityscapes/semantic_segmentation"
CITYSCAPES_EXTRA = f"{CITYSCAPES}_extra"
# The name that TFDS may use for a split of this project.
SPLIT_ALIASES = {"val": "validation"}
# By Pillow's name of the format.
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}


def layout(config: Any) -> Layout:
    """Returns the layout of the data set in `data.name`, exported from the TFDS folder `data.root`.

    Raises:
        UserError: TFDS does not know the data set or would have to download it, or a feature or
            split is missing.
    """
    data = config.data
    name = data.name.removeprefix(PREFIX)
    if name in ("cityscapes", CITYSCAPES):
        return _cityscapes(config)
    if name == CITYSCAPES_EXTRA:
        raise UserError(
            f"The masks of {data.name} are coarse: set data.name={PREFIX}{CITYSCAPES}, and "
            "data.train_extra for its further images.",
            code="tfds-masks-coarse",
        )
    builder = _builder(name, data.root)
    features = {"image": data.tfds_image, "mask": data.tfds_mask}
    export = _Export(builder, features, data.tfds_id, data)
    classes, palette, table, form = classes_from_config(_with_class_names(data, builder))
    evaluation: tuple[Example, ...] = ()
    # Without the split, evaluation can still use a list or held-out images.
    if export.has_split(config.eval.split) or not (data.evaluation_list or data.holdout):
        evaluation = export.examples(config.eval.split)
    return Layout(
        name=f"tfds-{name.replace('/', '-')}",
        root=export.folder,
        classes=classes,
        palette=palette,
        table=table,
        train=export.examples(data.tfds_train),
        evaluation=evaluation,
        mask_format=form,
    )


def _cityscapes(config: Any) -> Layout:
    """Returns the layout of TFDS's Cityscapes, whose features and classes need no config keys."""
    data = config.data
    cityscapes.check_eval_split(config)
    features = {"image": "image_left", "mask": "segmentation_label"}
    export = _Export(_builder(CITYSCAPES, data.root), features, "image_id", data)
    further: tuple[Example, ...] = ()
    if data.train_extra:
        # All masks of this builder config are coarse, so only its train_extra images are used.
        extra_builder = _builder(CITYSCAPES_EXTRA, data.root)
        extra_export = _Export(extra_builder, {"image": "image_left"}, "image_id", data)
        extra = extra_export.examples("train_extra")
        further = tuple(e for e in extra if e.id not in cityscapes.DAMAGED_IMAGES)
    return Layout(
        name="cityscapes",
        root=export.folder,
        classes=cityscapes.CLASSES,
        palette=cityscapes.PALETTE,
        table=cityscapes.label_ids_table(),
        train=export.examples("train"),
        evaluation=export.examples(config.eval.split),
        further=further,
        masks_of_lists=False,
    )


def _with_class_names(data_config: Any, builder: Any) -> Any:
    """Returns `config.data` with the class names of the mask feature if the config has none."""
    import tensorflow_datasets as tfds

    feature = dict(builder.info.features.items()).get(data_config.tfds_mask)
    if data_config.classes or not isinstance(feature, tfds.features.LabeledImage):
        return data_config
    completed = data_config.copy_and_resolve_references()
    completed.classes = tuple(feature.names)
    return completed


def _builder(name: str, data_dir: str) -> Any:
    """Returns TFDS's builder of a data set, which may not be prepared yet.

    Raises:
        UserError: TFDS does not know the name.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as error:
        # TFDS may repeat its arguments before the reason.
        reason = first_line(Exception(str(error).rpartition('}": ')[2])).rstrip(".: ")
        raise UserError(
            f"data.name={PREFIX}{name} is not known to TFDS ({reason}): give the name of one of "
            "its data sets, with /CONFIG where it has several and a :VERSION that it has, or in "
            "data.root the folder of one that is prepared.",
            code="tfds-dataset-unknown",
        ) from error


def _prepare(builder: Any) -> None:
    """Lets TFDS prepare a data set from local archives, unless it is prepared already.

    Raises:
        UserError: TFDS would have to download the data set, or archives are missing.
    """
    if builder.info.splits:
        return
    name = "/".join(filter(None, (builder.name, getattr(builder.builder_config, "name", ""))))
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise UserError(
            f"{PREFIX}{name} is not prepared in {builder.data_path.parent}, and TFDS would download"
            f" it: run `tfds build {name} --data_dir={builder.data_dir_root}` once, or name the "
            "folder that has it in data.root.",
            code="tfds-dataset-not-prepared",
        )
    archives = f"{builder.data_dir_root}/downloads/manual"
    logger.info(f"TFDS prepares {name} from its archives in {archives}.")
    try:
        builder.download_and_prepare()
    except (AssertionError, OSError, ValueError, KeyError) as error:
        reason = first_line(error).rstrip(".: ")
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise UserError(
            f"TFDS cannot prepare {name} ({reason}): put its archives into {archives}, as they "
            f"were downloaded (TFDS: {instructions})",
            code="tfds-preparation-failed",
        ) from error


class _Export:
    """Exports splits of a TFDS data set to files below `folder`, each split once.

    The constructor raises a UserError if the data set lacks a feature or cannot be prepared.

    Attributes:
        folder: the folder of images/SPLIT, masks/SPLIT and SPLIT.json; the last file is written
            when the export of the split is complete.
    """

    def __init__(self, builder: Any, features: dict[str, str], id_feature: str, data_config: Any):
        self._builder = builder
        self._features = features
        self._id_feature = id_feature
        for key, feature in features.items():
            if feature not in builder.info.features:
                raise UserError(
                    f"{PREFIX}{builder.name} has no feature {feature}: set data.tfds_{key} to one "
                    f"of {', '.join(sorted(builder.info.features))}.",
                    code="tfds-feature-missing",
                )
        _prepare(builder)
        export_spec = (str(builder.info.full_name), sorted(features.items()), id_feature)
        cache_key = repr((export_spec, str(builder.data_path)))
        digest = hashes.hash_bytes(cache_key.encode(), 12)
        self.folder = cache_dir(data_config) / f"tfds-{builder.name}-{digest}"

    def has_split(self, name: str) -> bool:
        """Returns whether the data set has a split of this name or of its TFDS alias."""
        return not {name, SPLIT_ALIASES.get(name)}.isdisjoint(self._builder.info.splits)

    def examples(self, name: str) -> tuple[Example, ...]:
        """Returns the examples of a split; exports the split on first use.

        Raises:
            UserError: there is no such split, or the format of an image is not supported.
        """
        if not self.has_split(name):
            raise UserError(
                f"{PREFIX}{self._builder.name} has no split {name}: set data.tfds_train and "
                f"eval.split to one of {', '.join(self._builder.info.splits)}.",
                code="tfds-split-missing",
            )
        name = name if name in self._builder.info.splits else SPLIT_ALIASES[name]
        completion_file = self.folder / f"{name}.json"
        if not completion_file.exists():
            total = self._builder.info.splits[name].num_examples
            logger.info(
                f"{total} {name} examples of {self._builder.name} go to {self.folder}, once."
            )
            count = 0
            for features in self._stored_features(name):
                self._write(name, features)
                count += 1
            # Without sync: the disk must not have this file before the images it vouches for.
            content = (json.dumps({"ids": count}) + "\n").encode()
            fileio.write_bytes(completion_file, content, sync=False)
        return pairs(self.folder / "images" / name, self.folder / "masks" / name)

    def _stored_features(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the features in use of each example; images stay encoded if TFDS stores files."""
        import tensorflow_datasets as tfds

        used_features = dict.fromkeys(self._features.values(), True)
        if self._id_feature:
            used_features[self._id_feature] = True
        decoders = {
            feature: tfds.decode.SkipDecoding()
            for feature in self._features.values()
            if isinstance(self._builder.info.features[feature], tfds.features.Image)
        }
        dataset = self._builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(used_features, decoders=decoders),
            read_config=tfds.ReadConfig(add_tfds_id=True, try_autocache=False),
        )
        yield from dataset.as_numpy_iterator()

    def _write(self, split: str, features: dict[str, Any]) -> None:
        """Writes the image and mask files of an example."""
        name = features[self._id_feature or "tfds_id"]
        name = name.decode() if isinstance(name, bytes) else str(name)
        # The dots in TFDS's own ids do not mark a suffix.
        id_ = safe_id(name) if self._id_feature else name.replace(".", "-")
        for kind, feature in self._features.items():
            content = features[feature]
            if not isinstance(content, bytes):
                content = _encode_png(np.asarray(content), feature)
            suffix = _file_suffix(content, feature)
            # `pairs` finds masks by this suffix; the reader goes by the content.
            suffix = suffix if kind == "image" else ".png"
            fileio.write_bytes(
                self.folder / f"{kind}s" / split / f"{id_}{suffix}", content, sync=False
            )


def _encode_png(array: np.ndarray, feature: str) -> bytes:
    """Encodes a decoded feature, [h, w], [h, w, 1] or [h, w, 3] with values 0..255, as PNG."""
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if squeezed.ndim not in (2, 3) or squeezed.min(initial=0) < 0 or squeezed.max(initial=0) > 255:
        raise UserError(
            f"The feature {feature} has shape {array.shape} and values {array.min()} to "
            f"{array.max()}: name an image or a map of ids 0 to 255 in data.tfds_image and "
            "data.tfds_mask.",
            code="tfds-feature-not-an-image",
        )
    buffer = io.BytesIO()
    Image.fromarray(squeezed.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _file_suffix(content: bytes, feature: str) -> str:
    """Returns the suffix for an encoded image; raises a UserError for unsupported formats."""
    try:
        kind = Image.open(io.BytesIO(content), formats=FORMATS).format or ""
    except UnidentifiedImageError:
        kind = ""
    if kind not in SUFFIXES:
        raise UserError(
            f"The feature {feature} holds files of kind {kind or 'unknown'}: name images in "
            "data.tfds_image and data.tfds_mask.",
            code="tfds-image-format-unknown",
        )
    return SUFFIXES[kind]
