"""PASCAL VOC 2012 with its 21 classes, and the further masks of SBD.

    VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
    VOCdevkit/VOC2012/SegmentationClassAug          SBD's masks as PNGs, or else
    benchmark_RELEASE/dataset/cls/*.mat             as SBD has them

VOC's train list has 1,464 images, with SBD's 10,582; its val list, 1,449, is taken out of SBD's.

Source: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).
"""

import hashlib
import io
import os
import zlib
from concurrent import futures
from typing import Any

import numpy as np
import scipy.io
from etils import epath

from semiseg_jax.data import labels
from semiseg_jax.data.examples import Example, Layout, Say, inside
from semiseg_jax.data.places import cache_dir, data_root
from semiseg_jax.data.splits import read_list
from semiseg_jax.errors import UserError

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
LISTS = "ImageSets/Segmentation"


def layout(config: Any, say: Say) -> Layout:
    """VOC below `data.root`, with SBD's masks where `data.voc_augmented`.

    Raises:
        UserError: a folder, list or image is missing, or a .mat file is damaged.
    """
    data = config.data
    root = data_root(
        data,
        "download VOCtrainval_11-May-2012.tar, and SBD's benchmark.tgz or SegmentationClassAug, "
        "and extract them into one folder",
    )
    voc = next((f for f in (root / "VOCdevkit/VOC2012", root / "VOC2012") if f.is_dir()), root)
    if not (voc / "JPEGImages").is_dir():
        raise UserError(
            f"{root} holds neither VOCdevkit/VOC2012 nor JPEGImages: extract "
            "VOCtrainval_11-May-2012.tar into it, or correct data.root."
        )
    train, val = (_ids(voc, name) for name in ("train", "val"))
    masks = {id_: voc / "SegmentationClass" / f"{id_}.png" for id_ in train}
    if data.voc_augmented:
        # VOC's own masks are the better ones, so that SBD's only fill in.
        masks = _augmented_masks(root, voc, data, say) | masks
        train = sorted(masks.keys() - set(val))
    evaluation = val if config.eval.split == "val" else _ids(voc, config.eval.split)
    return Layout(
        name="pascal_voc" if data.voc_augmented else "pascal_voc_1464",
        root=voc,
        classes=CLASSES,
        palette=labels.generated_palette(len(CLASSES)),
        table=labels.id_table(len(CLASSES)),
        train=tuple(_example(voc, id_, masks[id_]) for id_ in train),
        evaluation=tuple(
            _example(voc, id_, voc / "SegmentationClass" / f"{id_}.png") for id_ in evaluation
        ),
        # Lists name SegmentationClass for SBD's masks too, wherever these really are.
        masks_of_lists=False,
    )


def _ids(voc: epath.Path, name: str) -> list[str]:
    return [entry.image for entry in read_list(voc / LISTS / f"{name}.txt")]


def _example(voc: epath.Path, id_: str, mask: epath.Path) -> Example:
    return Example(id_, os.fspath(voc / "JPEGImages" / f"{id_}.jpg"), os.fspath(mask))


def _augmented_masks(
    root: epath.Path, voc: epath.Path, data_config: Any, say: Say
) -> dict[str, epath.Path]:
    """SBD's mask of each image it has one for, as PNG."""
    for png_folder in (voc / "SegmentationClassAug", root / "SegmentationClassAug"):
        if png_folder.is_dir():
            return {m.stem: m for m in inside(png_folder) if m.suffix == ".png"}
    places = [root / p for p in ("benchmark_RELEASE/dataset/cls", "sbd/cls", "dataset/cls", "cls")]
    folder = next((f for f in places if f.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{root} holds no masks of SBD, neither SegmentationClassAug nor "
            "benchmark_RELEASE/dataset/cls: extract one of them there, or train on VOC's own 1,464 "
            "masks with data.voc_augmented=False."
        )
    return _converted(folder, cache_dir(data_config), say)


def _converted(folder: epath.Path, cache: epath.Path, say: Say) -> dict[str, epath.Path]:
    """The label maps of a folder of .mat files as PNGs in the cache, made once."""
    sources = [path for path in inside(folder) if path.suffix == ".mat"]
    key = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:12]
    target = cache / f"sbd-{key}"
    masks = {path.stem: target / f"{path.stem}.png" for path in sources}
    there = {path.name for path in inside(target)} if target.is_dir() else set()
    # Each file is written whole or not at all, so those that are there are done.
    todo = [path for path in sources if f"{path.stem}.png" not in there]
    if todo:
        say(f"{len(todo)} masks of SBD are converted into {target}, once.")
    palette = labels.generated_palette(len(CLASSES))
    with futures.ThreadPoolExecutor() as pool:

        def convert(path: epath.Path) -> None:
            labels.write_bytes(
                masks[path.stem], labels.encode_mask(read_mat(path), palette), sync=False
            )

        for _ in pool.map(convert, todo):
            pass
    return masks


def read_mat(path: epath.PathLike) -> np.ndarray:
    """The label map of one of SBD's files, `GTcls.Segmentation`: class ids, uint8 [h, w].

    Raises:
        UserError: the file is damaged or of another kind.
    """
    try:
        content = scipy.io.loadmat(io.BytesIO(epath.Path(path).read_bytes()))
        mask = content["GTcls"]["Segmentation"][0, 0]
    except (KeyError, ValueError, TypeError, IndexError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} holds no GTcls.Segmentation ({error}): extract SBD's archive again."
        ) from error
    return np.asarray(mask, np.uint8)
