"""Miniatures of the public data sets with the layouts, names and formats of their archives."""

import io
import zipfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

# From the documentation of the data set, independent of the package's table.
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITIES = {"train": "aachen", "val": "frankfurt", "test": "berlin", "train_extra": "bamberg"}


def image(seed: int, height: int, width: int) -> np.ndarray:
    """Returns smooth colours that differ between seeds."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3)).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))


def png(array: np.ndarray, palette: list[int] | None = None, **options) -> bytes:
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette(palette)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def label_ids(seed: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Returns a mask with all 34 labelIds of Cityscapes, in blocks of 4x4 pixels."""
    blocks = np.arange(height // 4 * (width // 4)) % 34
    shuffled = np.random.default_rng(seed).permutation(blocks).reshape(height // 4, width // 4)
    return shuffled.repeat(4, 0).repeat(4, 1).astype(np.uint8)


def train_ids(mask: np.ndarray) -> np.ndarray:
    """Converts a mask of labelIds to labelTrainIds."""
    return np.vectorize(lambda v: CITYSCAPES_TRAIN_IDS.get(v, 255))(mask).astype(np.uint8)


def cityscapes_files(counts: dict[str, int], kind: str = "labelIds"):
    """Yields (path, bytes) of every file of the archives, with gtCoarse, which is never read."""
    seed = 0
    for split, count in counts.items():
        for number in range(count):
            name = f"{CITIES[split]}_{number:06d}_000019"
            folder = f"{split}/{CITIES[split]}/{name}"
            yield f"leftImg8bit/{folder}_leftImg8bit.png", png(image(seed, 32, 64))
            mask = label_ids(seed)
            coarse = np.zeros_like(mask)
            yield f"gtCoarse/{folder}_gtCoarse_labelIds.png", png(coarse)
            if split != "train_extra":
                fine = mask if kind == "labelIds" else train_ids(mask)
                yield f"gtFine/{folder}_gtFine_{kind}.png", png(fine)
                # Files that the package ignores.
                yield f"gtFine/{folder}_gtFine_color.png", png(image(seed, 32, 64))
                yield f"gtFine/{folder}_gtFine_polygons.json", b"{}"
            seed += 1


def write_cityscapes(root: Path, counts: dict[str, int], kind: str = "labelIds") -> Path:
    for name, content in cityscapes_files(counts, kind):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_cityscapes_archives(folder: Path, counts: dict[str, int]) -> None:
    """Writes the zip files that TFDS requires."""
    folder.mkdir(parents=True)
    names = (
        "leftImg8bit_trainvaltest.zip",
        "leftImg8bit_trainextra.zip",
        "gtFine_trainvaltest.zip",
        "gtCoarse.zip",
    )
    archives = {name: zipfile.ZipFile(folder / name, "w") for name in names}
    for name, content in cityscapes_files(counts):
        kind = name.split("/")[0]
        if kind == "leftImg8bit":
            kind += "_trainextra" if "/train_extra/" in name else "_trainvaltest"
        elif kind == "gtFine":
            kind += "_trainvaltest"
        archives[f"{kind}.zip"].writestr(name, content)
    for archive in archives.values():
        archive.close()


def voc_mask(seed: int, height: int, width: int) -> np.ndarray:
    """Returns a VOC mask: background, and two objects outlined with 255."""
    mask = np.zeros((height, width), np.uint8)
    for number, column in ((0, 2), (1, width // 2)):
        mask[4:20, column : column + 12] = 255
        mask[5:19, column + 1 : column + 11] = 1 + (2 * seed + number) % 20
    return mask


def voc_palette(entries: int) -> list[int]:
    """Returns the first entries of VOC's colour map."""
    colours = []
    for index in range(entries):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colours += colour
    return colours


VOC_LISTS = {
    "train": ["2007_000032", "2007_000039", "2007_000063"],
    "val": ["2007_000033", "2007_000042"],
}
LISTED = [*VOC_LISTS["train"], *VOC_LISTS["val"]]
# The images with masks in SBD; 2007_000042 is in VOC's val list and 2007_000032 in its train list.
SBD = ["2007_000032", "2007_000042", "2008_000002", "2008_000007", "2008_000008"]


def voc_size(number: int) -> tuple[int, int]:
    """Returns (height, width), portrait or landscape."""
    return (40, 32) if number % 3 == 0 else (32, 40)


def write_voc(root: Path, sbd: str = "mat") -> Path:
    """Writes a VOCdevkit with 3 training and 2 val images, and 5 masks of SBD, "mat" or "png"."""
    voc = root / "VOCdevkit" / "VOC2012"
    lists = voc / "ImageSets" / "Segmentation"
    cls = root / "benchmark_RELEASE" / "dataset" / "cls"
    folders = ("JPEGImages", "SegmentationClass", "SegmentationObject")
    for folder in (lists, *(voc / f for f in folders)):
        folder.mkdir(parents=True)
    (cls if sbd == "mat" else voc / "SegmentationClassAug").mkdir(parents=True)
    for name, ids in (*VOC_LISTS.items(), ("trainval", LISTED)):
        (lists / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))
    for number, id_ in enumerate(sorted({*LISTED, *SBD})):
        size = voc_size(number)
        Image.fromarray(image(number, *size)).save(voc / "JPEGImages" / f"{id_}.jpg")
        if id_ not in SBD or id_ in LISTED:
            content = png(voc_mask(number, *size), voc_palette(256))
            (voc / "SegmentationClass" / f"{id_}.png").write_bytes(content)
        if id_ in SBD:
            write_sbd_mask(root, id_, sbd_mask(number, *size), sbd)
    return root


def sbd_mask(number: int, height: int, width: int) -> np.ndarray:
    """Returns a mask without outlines, as in SBD, with classes below 16, which fit into 4 bits."""
    mask = np.zeros((height, width), np.uint8)
    mask[6:18, 3:13] = 1 + number % 15
    return mask


def write_sbd_mask(root: Path, id_: str, mask: np.ndarray, kind: str) -> None:
    if kind == "png":
        path = root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug" / f"{id_}.png"
        path.write_bytes(png(mask, voc_palette(16), bits=4))
        return
    content = {"Segmentation": mask, "Boundaries": np.zeros((20, 1)), "CategoriesPresent": [1]}
    path = root / "benchmark_RELEASE" / "dataset" / "cls" / f"{id_}.mat"
    scipy.io.savemat(path, {"GTcls": content}, do_compression=True)
