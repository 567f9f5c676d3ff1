"""Settings that a config leaves open, chosen from the sizes of its labelled and unlabelled images.

    data.downscale = 0     the smallest factor that leaves a median image at most MAX_PIXELS
    data.crop = ()         of the shape of the images, at most 257x257 pixels in area
    data.scale = ()        from the scale at which a crop just fits into an image, to 1.5
    model.aspp_rates = ()  where one of these is open: the head's usual rates, shrunk to the crop;
                           vision transformers have none

The reference is not the median size, but one that three of four images reach in height and three of
four in width: crops from these images contain no padding, at any scale. The choice depends on the
set of sizes alone, not on the names or the order of files. Image files are not decoded for it.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from semiseg_jax.data import image_io, load
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.data.sources.downscale import MAX_DOWNSCALE, shrunk
from semiseg_jax.models import deeplab, vit
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines, logger
from semiseg_jax.shape_buckets import Size

# The keys that may be open, with the value that says so.
OPEN_VALUES = {"downscale": 0, "crop": (), "scale": ()}

# Half a megapixel, such as 836x627: a crop of MAX_CROP_PIXELS then sees a quarter of each side of
# an image at the largest scale, and two cores label an image in seconds. Photographs of 12
# megapixels are downscaled by 5.
MAX_PIXELS = 2**19
# A warning names images of more than so many times as many pixels after downscaling. The memory of
# labelling and evaluation grows with the pixels of the largest image.
LARGE = 4
# 16 of these in a step, a student's batch in configs/folder.py, take 2.4 GB (EfficientNet-Lite0).
MAX_CROP_PIXELS = 257 * 257
# Of each side of the reference, so that a crop has half of its area: smaller crops lack context,
# larger ones differ too little from each other. configs/camvid.py:half and configs/streets.py,
# which were tuned, have .67 to .71 and .60 to .67.
CROP_SHARE = 0.7
# Prediction is at scale 1; the range lies around it.
MIN_SCALE, MAX_SCALE = 0.5, 1.5
# Scales are rounded up to multiples of 1 / 20, so that a crop that fits still does.
_SCALE_STEPS = 20
# The outermost dilation rate, relative to the shorter side of a crop's features: taps that reach
# farther read mostly padding, and from 1 on nothing else. The configs named above have .63 and .75.
ASPP_REACH = 0.6


@dataclasses.dataclass(frozen=True)
class Choice:
    """The values of the open settings of a config.

    Attributes:
        values: by key, such as "data.crop"; empty if no setting is open.
        sentence: says what was chosen from which sizes; "" if no setting is open.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    sentence: str = ""


def is_open(config: Any) -> bool:
    """Returns whether a config leaves a setting of OPEN_VALUES open."""
    return any(config.data[key] == value for key, value in OPEN_VALUES.items())


def resolve(config: Any) -> Any:
    """Returns a copy of a config with a value for each open setting; logs what was chosen.

    All processes must call the function.

    Raises:
        UserError: as `load.plan_dataset`, or no image can be read.
    """
    return with_values(config, choose(config).values)


def choose(config: Any) -> Choice:
    """Returns the values of the open settings of a config; logs what was chosen.

    All processes must call the function. Nothing is read if no setting is open.

    Raises:
        UserError: as `resolve`.
    """
    if not is_open(config):
        return Choice()
    with capture_lines():  # `load.load_dataset` logs them again.
        dataset, _ = load.plan_dataset(config)
    sizes = read_sizes(dataset)
    values = choose_from_sizes(config, sizes)
    choice = Choice(values, describe(values, sizes))
    logger.info(choice.sentence)
    _warn_of_large_images(config, values, sizes)
    return choice


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """Returns a copy of a config with these values, by key such as "data.crop"."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config


def read_sizes(dataset: Dataset) -> list[Size]:
    """Returns the sizes of labelled and unlabelled images, from the headers of their files.

    Images whose header is not readable are left out: loading the data set refuses them, or leaves
    them out too. Each process reads its shard of the files; all processes return all sizes.

    Raises:
        UserError: no image can be read.
    """

    def read(example: Example) -> Size | None:
        try:
            return image_io.image_size(example.image)
        except UserError:
            return None

    examples = (*dataset.labeled, *dataset.unlabeled)
    with futures.ThreadPoolExecutor() as pool:
        local = list(pool.map(read, multihost.local_shard(examples)))
    gathered = multihost.all_gather_shards("sizes to choose a crop from", local)
    sizes = [(size[0], size[1]) for size in gathered if size is not None]
    return sizes or [image_io.image_size(examples[0].image)]


def _warn_of_large_images(config: Any, values: dict[str, Any], sizes: Sequence[Size]) -> None:
    """Logs a warning of images that are far larger than the one that the factor was chosen for."""
    if "data.downscale" not in values or (config.eval.window and config.pseudo.window):
        return
    height, width = largest = max(sizes, key=lambda size: (math.prod(size), size))
    if math.prod(shrunk(largest, values["data.downscale"])) > LARGE * MAX_PIXELS:
        logger.info(
            f"Warning: an image of {width}x{height} is far larger than most, and its labelling "
            "takes as much more memory: where that is too much, set "
            f"data.downscale={_choose_downscale([largest])}, or eval.window and pseudo.window."
        )


def choose_from_sizes(config: Any, sizes: Sequence[Size]) -> dict[str, Any]:
    """Returns the values of the open settings for images of these sizes, by key.

    Args:
        config: the whole config; `data` and `model` are read.
        sizes: (height, width) of each image in pixels, before downscaling; at least one.
    """
    data, model = config.data, config.model
    values: dict[str, Any] = {}
    factor = data.downscale
    if factor == OPEN_VALUES["downscale"]:
        factor = values["data.downscale"] = _choose_downscale(sizes)
    reference = _reference_size([shrunk(size, factor) for size in sizes])
    crop = tuple(data.crop)
    if not crop:
        lowest_scale = data.scale[0] if data.scale else 1.0
        crop = values["data.crop"] = _choose_crop(reference, lowest_scale, _grid(model))
    if not data.scale:
        values["data.scale"] = _choose_scale(reference, crop)
    if is_open(config) and not model.aspp_rates and model.backbone not in vit.SPECS:
        values["model.aspp_rates"] = _choose_aspp_rates(model, crop)
    return values


def describe(values: dict[str, Any], sizes: Sequence[Size]) -> str:
    """Returns a sentence on what was chosen from which sizes."""
    counts = collections.Counter(sizes)
    (height, width), _ = min(counts.items(), key=lambda item: (-item[1], item[0]))
    images = f"{len(sizes)} image{'' if len(sizes) == 1 else 's'} of {width}x{height}"
    if len(counts) > 1:
        (h0, w0), (h1, w1) = (end(counts, key=lambda s: (math.prod(s), s)) for end in (min, max))
        images = f"{len(sizes)} images of {w0}x{h0} to {w1}x{h1}, most often {width}x{height}"
    crop, scale = values.get("data.crop"), values.get("data.scale")
    chosen = [
        f"crops of {crop[1]}x{crop[0]}" if crop else "",
        f"scales of {scale[0]:g} to {scale[1]:g}" if scale else "",
        f"ASPP rates of {', '.join(map(str, rates))}"
        if (rates := values.get("model.aspp_rates"))
        else "",
        f"images downscaled by {factor}" if (factor := values.get("data.downscale", 1)) > 1 else "",
    ]
    settings = "; ".join(filter(None, chosen)) or "images of their own size"
    return f"Chosen from {images}: {settings}."


def _choose_downscale(sizes: Sequence[Size]) -> int:
    """Returns the smallest factor that leaves the median image at most MAX_PIXELS."""
    # The smaller of two middle values: many small images shall not become tiny.
    median = sorted(sizes, key=lambda size: (math.prod(size), size))[(len(sizes) - 1) // 2]
    factors = range(1, MAX_DOWNSCALE)
    return next((f for f in factors if math.prod(shrunk(median, f)) <= MAX_PIXELS), MAX_DOWNSCALE)


def _reference_size(sizes: Sequence[Size]) -> Size:
    """Returns a height and a width that three of four images reach each."""
    heights, widths = (sorted(sides)[(len(sizes) - 1) // 4] for sides in zip(*sizes, strict=True))
    return heights, widths


def _grid(model_config: Any) -> tuple[int, int]:
    """Returns (s, r): a network of this config wants crops whose sides are multiples of s, plus r.

    Vision transformers see whole patches. The features of other crops have their corners at those
    of the crop, with and without `model.align_corners`.
    """
    if model_config.backbone in vit.SPECS:
        return vit.SPECS[model_config.backbone].patch, 0
    return model_config.output_stride, 1


def _choose_crop(reference: Size, lowest_scale: float, grid: tuple[int, int]) -> Size:
    """Returns a crop that is no larger than the reference, unless this is smaller than the stride.

    Args:
        reference: (height, width) of the images, in pixels.
        lowest_scale: of the images.
        grid: from `_grid`.
    """
    stride, rest = grid
    smallest = stride + rest
    within = [min(lowest_scale, 1.0) * side for side in reference]
    wanted = [
        max(min(CROP_SHARE * side, limit), smallest)
        for side, limit in zip(reference, within, strict=True)
    ]
    shorter, longer = sorted(wanted)
    if shorter * longer > MAX_CROP_PIXELS:
        # Of panoramas the longer side alone is cut, as long as it stays twice the shorter side.
        longest = min(longer, max(MAX_CROP_PIXELS / shorter, 2 * shorter))
        shrink = min(math.sqrt(MAX_CROP_PIXELS / (shorter * longest)), 1.0)
        wanted = [shrink * min(side, longest) for side in wanted]

    def candidates(side: float, limit: float) -> list[int]:
        below = max(math.floor((side - rest) / stride), 1) * stride + rest
        above = below + stride
        return [below, above] if above <= limit else [below]

    heights, widths = map(candidates, wanted, within)

    def distance(crop: Size) -> float:
        ratios = [math.log(side / target) for side, target in zip(crop, wanted, strict=True)]
        # Rounded, so that a crop and its transpose do not differ by the order of the sum.
        return round(math.fsum(ratio**2 for ratio in ratios), 9)

    crops = [(h, w) for h in heights for w in widths if h * w <= MAX_CROP_PIXELS]
    # The smallest of both is left where a side is extremely long.
    return min(crops or [(heights[0], widths[0])], key=lambda c: (distance(c), -min(c), -max(c)))


def _choose_scale(reference: Size, crop: Size) -> tuple[float, float]:
    """Returns the range of scales at which crops lie within images of the reference size."""
    fitting = max(c / side for c, side in zip(crop, reference, strict=True))
    rounded = math.ceil(_SCALE_STEPS * fitting - 1e-9) / _SCALE_STEPS
    return min(max(rounded, MIN_SCALE), 1.0), MAX_SCALE


def _choose_aspp_rates(model_config: Any, crop: Size) -> tuple[int, ...]:
    """Returns the usual rates of the head, shrunk so that the outermost reaches ASPP_REACH."""
    usual = deeplab.default_rates(model_config.head, model_config.output_stride)
    features = min(-(-side // model_config.output_stride) for side in crop)
    factor = min(round(ASPP_REACH * features) / max(usual), 1.0)
    return tuple(max(round(factor * rate), 1) for rate in usual)
