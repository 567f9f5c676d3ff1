"""Data sets of TensorFlow Datasets, exported once to images and masks of their own.

TFDS keeps examples in files that are read from front to back; training here reads any example at
any time. So each split that is used is written out, images and masks as the bytes that TFDS holds.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from semiseg_jax.data import cityscapes, labels
from semiseg_jax.data.examples import Example, Layout, Say, pairs, safe_id
from semiseg_jax.data.folder import described_classes
from semiseg_jax.data.places import cache_dir
from semiseg_jax.errors import UserError, first_line

PREFIX = "tfds:"
CITYSCAPES = "cityscapes/semantic_segmentation"
CITYSCAPES_EXTRA = f"{CITYSCAPES}_extra"
# What we call a split, and what TFDS does where it has none of that name.
SPLITS = {"val": "validation"}
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"}


def layout(config: Any, say: Say) -> Layout:
    """The data set named in `data.name`, below TFDS's folder `data.root`.

    Raises:
        UserError: TFDS does not have it, or only after a download, or it lacks a feature or split.
    """
    data = config.data
    name = data.name.removeprefix(PREFIX)
    if name in ("cityscapes", CITYSCAPES):
        return _cityscapes(config, say)
    if name == CITYSCAPES_EXTRA:
        raise UserError(
            f"The masks of {data.name} are coarse: set data.name={PREFIX}{CITYSCAPES}, and "
            "data.train_extra for its further images."
        )
    builder = _builder(name, data.root)
    features = {"image": data.tfds_image, "mask": data.tfds_mask}
    exported = _Export(builder, features, data.tfds_id, data, say)
    classes, palette, table = described_classes(_with_names(data, builder))
    evaluation: tuple[Example, ...] = ()
    # A data set without the split may still be evaluated on a list or on what is held out.
    if exported.has(config.eval.split) or not (data.evaluation_list or data.holdout):
        evaluation = exported.split(config.eval.split)
    return Layout(
        name=f"tfds-{name.replace('/', '-')}",
        root=exported.folder,
        classes=classes,
        palette=palette,
        table=table,
        train=exported.split(data.tfds_train),
        evaluation=evaluation,
    )


def _cityscapes(config: Any, say: Say) -> Layout:
    """Cityscapes, which needs no description; the images of train_extra from its other config."""
    data = config.data
    cityscapes.refuse_test_split(config)
    features = {"image": "image_left", "mask": "segmentation_label"}
    exported = _Export(_builder(CITYSCAPES, data.root), features, "image_id", data, say)
    further: tuple[Example, ...] = ()
    if data.train_extra:
        # Its masks are coarse, also those of train and val: only these images are taken.
        extra = _builder(CITYSCAPES_EXTRA, data.root)
        found = _Export(extra, {"image": "image_left"}, "image_id", data, say).split("train_extra")
        further = tuple(e for e in found if e.id not in cityscapes.DAMAGED)
    return Layout(
        name="cityscapes",
        root=exported.folder,
        classes=cityscapes.CLASSES,
        palette=cityscapes.PALETTE,
        table=cityscapes.label_ids_table(),
        train=exported.split("train"),
        evaluation=exported.split(config.eval.split),
        further=further,
        masks_of_lists=False,
    )


def _with_names(data_config: Any, builder: Any) -> Any:
    """`config.data`, with the mask feature's class names where the config has none."""
    import tensorflow_datasets as tfds

    feature = dict(builder.info.features.items()).get(data_config.tfds_mask)
    if data_config.classes or not isinstance(feature, tfds.features.LabeledImage):
        return data_config
    named = data_config.copy_and_resolve_references()
    named.classes = tuple(feature.names)
    return named


def _builder(name: str, data_dir: str) -> Any:
    """TFDS's builder of a data set, prepared or not.

    Raises:
        UserError: TFDS does not know the name.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as error:
        # Before what is wrong TFDS may repeat all that it was called with.
        why = first_line(Exception(str(error).rpartition('}": ')[2])).rstrip(".: ")
        raise UserError(
            f"data.name={PREFIX}{name} is not known to TFDS ({why}): give the name of one of its "
            "data sets, with /CONFIG where it has several and a :VERSION that it has, or in "
            "data.root the folder of one that is prepared."
        ) from error


def _prepare(builder: Any, say: Say) -> None:
    """Has TFDS prepare what needs no download.

    Raises:
        UserError: TFDS would have to download, or misses archives.
    """
    if builder.info.splits:
        return
    name = "/".join(filter(None, (builder.name, getattr(builder.builder_config, "name", ""))))
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise UserError(
            f"{PREFIX}{name} is not prepared in {builder.data_path.parent}, and TFDS would download"
            f" it: run `tfds build {name} --data_dir={builder.data_dir_root}` once, or name the "
            "folder that has it in data.root."
        )
    archives = f"{builder.data_dir_root}/downloads/manual"
    say(f"TFDS prepares {name} from its archives in {archives}.")
    try:
        builder.download_and_prepare()
    except (AssertionError, OSError, ValueError, KeyError) as error:
        reason = first_line(error).rstrip(".: ")
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise UserError(
            f"TFDS cannot prepare {name} ({reason}): put its archives into {archives}, as they "
            f"were downloaded (TFDS: {instructions})"
        ) from error


class _Export:
    """Splits of a TFDS data set as folders below `folder`, each made once.

    Raises a UserError where the data set lacks a feature, or is not prepared and cannot be.

    Attributes:
        folder: images/SPLIT, masks/SPLIT, and SPLIT.json, which is written last.
    """

    def __init__(
        self, builder: Any, features: dict[str, str], id_feature: str, data_config: Any, say: Say
    ):
        self._builder = builder
        self._features = features
        self._id_feature = id_feature
        self._say = say
        for key, feature in features.items():
            if feature not in builder.info.features:
                raise UserError(
                    f"{PREFIX}{builder.name} has no feature {feature}: set data.tfds_{key} to one "
                    f"of {', '.join(sorted(builder.info.features))}."
                )
        _prepare(builder, say)
        made_from = (str(builder.info.full_name), sorted(features.items()), id_feature)
        key = hashlib.sha256(repr((made_from, str(builder.data_path))).encode()).hexdigest()[:12]
        self.folder = cache_dir(data_config) / f"tfds-{builder.name}-{key}"

    def has(self, name: str) -> bool:
        """Whether there is a split of this name; validation answers to val."""
        return not {name, SPLITS.get(name)}.isdisjoint(self._builder.info.splits)

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of a split, exported on first use.

        Raises:
            UserError: there is no such split, or an image is of a kind that cannot be kept.
        """
        if not self.has(name):
            raise UserError(
                f"{PREFIX}{self._builder.name} has no split {name}: set data.tfds_train and "
                f"eval.split to one of {', '.join(self._builder.info.splits)}."
            )
        name = name if name in self._builder.info.splits else SPLITS[name]
        done = self.folder / f"{name}.json"
        if not done.exists():
            total = self._builder.info.splits[name].num_examples
            self._say(f"{total} {name} examples of {self._builder.name} go to {self.folder}, once.")
            ids = [self._write(name, example) for example in self._examples(name)]
            # Not on the disk before the images that it speaks for.
            labels.write_bytes(done, (json.dumps({"ids": len(ids)}) + "\n").encode(), sync=False)
        masks = self.folder / "masks" / name
        return pairs(self.folder / "images" / name, masks)

    def _examples(self, split: str) -> Iterator[dict[str, Any]]:
        """The features that are used, images undecoded where TFDS keeps them as files."""
        import tensorflow_datasets as tfds

        wanted = dict.fromkeys(self._features.values(), True)
        if self._id_feature:
            wanted[self._id_feature] = True
        undecoded = {
            feature: tfds.decode.SkipDecoding()
            for feature in self._features.values()
            if isinstance(self._builder.info.features[feature], tfds.features.Image)
        }
        dataset = self._builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(wanted, decoders=undecoded),
            read_config=tfds.ReadConfig(add_tfds_id=True, try_autocache=False),
        )
        yield from dataset.as_numpy_iterator()

    def _write(self, split: str, example: dict[str, Any]) -> str:
        """Writes one example's files; returns its id."""
        name = example[self._id_feature or "tfds_id"]
        name = name.decode() if isinstance(name, bytes) else str(name)
        # TFDS's own ids have dots that are no ending.
        id_ = safe_id(name) if self._id_feature else name.replace(".", "-")
        for kind, feature in self._features.items():
            content = example[feature]
            if not isinstance(content, bytes):
                content = _encoded(np.asarray(content), feature)
            suffix = _suffix(content, feature)
            # A mask is looked for by this name; it is read by what it is.
            suffix = suffix if kind == "image" else ".png"
            labels.write_bytes(
                self.folder / f"{kind}s" / split / f"{id_}{suffix}", content, sync=False
            )
        return id_


def _encoded(array: np.ndarray, feature: str) -> bytes:
    """A PNG of a decoded feature: [h, w], [h, w, 1] or [h, w, 3], values 0..255."""
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if squeezed.ndim not in (2, 3) or squeezed.min(initial=0) < 0 or squeezed.max(initial=0) > 255:
        raise UserError(
            f"The feature {feature} has shape {array.shape} and values {array.min()} to "
            f"{array.max()}: name an image or a map of ids 0 to 255 in data.tfds_image and "
            "data.tfds_mask."
        )
    buffer = io.BytesIO()
    Image.fromarray(squeezed.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _suffix(content: bytes, feature: str) -> str:
    try:
        kind = Image.open(io.BytesIO(content)).format or ""
    except UnidentifiedImageError:
        kind = ""
    if kind not in SUFFIXES:
        raise UserError(
            f"The feature {feature} holds files of kind {kind or 'unknown'}: name images in "
            "data.tfds_image and data.tfds_mask."
        )
    return SUFFIXES[kind]
