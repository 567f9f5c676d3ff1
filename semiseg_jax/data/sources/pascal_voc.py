"""PASCAL VOC 2012 with its 21 classes, and the additional masks of SBD.

    VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
    VOCdevkit/VOC2012/SegmentationClassAug          SBD's masks as PNGs, or
    benchmark_RELEASE/dataset/cls/*.mat             SBD's masks in their original format

The train list of VOC has 1,464 images, 10,582 with SBD. The 1,449 images of VOC's val list are
removed from SBD.

Source: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).
"""

import io
import os
import zlib
from concurrent import futures
from typing import Any

import numpy as np
import scipy.io
from etils import epath

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example, Layout
from semiseg_jax.data.file_content import file_state
from semiseg_jax.data.folder_walk import inside
from semiseg_jax.data.split_lists import read_list
from semiseg_jax.runtime import fileio, hashes
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import cache_dir, data_root

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
LISTS = "ImageSets/Segmentation"


def layout(config: Any) -> Layout:
    """Returns the layout of VOC below `data.root`, with SBD's masks if `data.voc_augmented`.

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
            "VOCtrainval_11-May-2012.tar into it, or correct data.root.",
            code="voc-folder-missing",
        )
    train, val = (_ids(voc, name) for name in ("train", "val"))
    masks = {id_: voc / "SegmentationClass" / f"{id_}.png" for id_ in train}
    if data.voc_augmented:
        # VOC's masks are more accurate, so they take precedence over SBD's.
        masks = _sbd_masks(root, voc, data) | masks
        train = sorted(masks.keys() - set(val))
    evaluation = val if config.eval.split == "val" else _ids(voc, config.eval.split)
    return Layout(
        name="pascal_voc" if data.voc_augmented else "pascal_voc_1464",
        root=voc,
        classes=CLASSES,
        palette=image_io.generated_palette(len(CLASSES)),
        table=image_io.id_table(len(CLASSES)),
        train=tuple(_example(voc, id_, masks[id_]) for id_ in train),
        evaluation=tuple(
            _example(voc, id_, voc / "SegmentationClass" / f"{id_}.png") for id_ in evaluation
        ),
        # Split lists name SegmentationClass for SBD's masks too, wherever these are stored.
        masks_of_lists=False,
    )


def _ids(voc: epath.Path, name: str) -> list[str]:
    return [entry.image for entry in read_list(voc / LISTS / f"{name}.txt")]


def _example(voc: epath.Path, id_: str, mask: epath.Path) -> Example:
    return Example(id_, os.fspath(voc / "JPEGImages" / f"{id_}.jpg"), os.fspath(mask))


def _sbd_masks(root: epath.Path, voc: epath.Path, data_config: Any) -> dict[str, epath.Path]:
    """Returns SBD's masks as PNG files, by image id; converts .mat files once."""
    for png_folder in (voc / "SegmentationClassAug", root / "SegmentationClassAug"):
        if png_folder.is_dir():
            return {m.stem: m for m in inside(png_folder) if m.suffix.lower() == ".png"}
    subfolders = ("benchmark_RELEASE/dataset/cls", "sbd/cls", "dataset/cls", "cls")
    mat_folder = next((root / f for f in subfolders if (root / f).is_dir()), None)
    if mat_folder is None:
        raise UserError(
            f"{root} holds no masks of SBD, neither SegmentationClassAug nor "
            "benchmark_RELEASE/dataset/cls: extract one of them there, or train on VOC's own 1,464 "
            "masks with data.voc_augmented=False.",
            code="sbd-masks-missing",
        )
    mat_files = [path for path in inside(mat_folder) if path.suffix.lower() == ".mat"]
    digest = hashes.hash_bytes(os.fsencode(os.path.realpath(mat_folder)), 12)
    png_folder = cache_dir(data_config) / f"sbd-{digest}"
    masks = {path.stem: png_folder / f"{path.stem}.png" for path in mat_files}
    # Files are written atomically, so every existing file is complete.
    pending = [path for path in mat_files if _is_outdated(masks[path.stem], path)]
    if pending:
        logger.info(f"{len(pending)} masks of SBD are converted into {png_folder}, once.")
    palette = image_io.generated_palette(len(CLASSES))

    def convert(path: epath.Path) -> None:
        png = image_io.encode_mask(read_mat(path), palette)
        fileio.write_bytes(masks[path.stem], png, sync=False)

    with futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(convert, pending):
            pass
    return masks


def _is_outdated(png: epath.Path, source: epath.Path) -> bool:
    """Returns whether a converted file is missing, or its source was changed since.

    By the time of the source's last change, which no program sets: the time of modification is that
    in an archive. Converted again, an unchanged source gives an equal file.
    """
    state, source_state = file_state(os.fspath(png)), file_state(os.fspath(source))
    return state is None or (source_state is not None and source_state[-2] > state[1])


def read_mat(path: epath.PathLike) -> np.ndarray:
    """Reads the label map `GTcls.Segmentation` of an SBD file: class ids, uint8 [h, w].

    Raises:
        UserError: the file is damaged or has another format.
    """
    try:
        content = scipy.io.loadmat(io.BytesIO(epath.Path(path).read_bytes()))
        mask = content["GTcls"]["Segmentation"][0, 0]
    except (KeyError, ValueError, TypeError, IndexError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} holds no GTcls.Segmentation ({error}): extract SBD's archive again.",
            code="sbd-mask-malformed",
        ) from error
    return np.asarray(mask, np.uint8)
