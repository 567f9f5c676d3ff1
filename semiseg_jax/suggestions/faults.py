"""Images that look unsure to a network because they show nothing: black, constant or blurred."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

# An image with less than these shares of the median of its set is set aside. The sharpness is a
# variance, so that a twentieth is a detail of 1/4.5 of the usual contrast.
_CONTRAST_SHARE, _SHARPNESS_SHARE = 0.1, 0.05
# Grey levels: below this standard deviation an image is constant in any set.
_LEAST_CONTRAST = 2.0


@dataclasses.dataclass(frozen=True)
class Detail:
    """How much an image shows.

    Attributes:
        contrast: standard deviation of its grey levels, 0 to 127.5.
        sharpness: variance of the Laplacian of its grey levels.
        brightness: mean grey level, 0 to 255.
    """

    contrast: float
    sharpness: float
    brightness: float


def measure(image: UInt8[np.ndarray, "h w 3"]) -> Detail:
    """Measures the detail of an RGB image."""
    grey = image.mean(axis=-1, dtype=np.float32)
    laplacian = _laplacian(grey)
    sharpness = float(laplacian.var()) if laplacian.size else 0.0
    return Detail(float(grey.std()), sharpness, float(grey.mean()))


def _laplacian(grey: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "_ _"]:
    """Returns the sum of the four neighbours less four times the pixel, without the border."""
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return neighbours - 4 * grey[1:-1, 1:-1]


def find(details: Mapping[str, Detail]) -> dict[str, str]:
    """Returns the reason for each image that shows too little, by its id.

    Args:
        details: of all images of a set, by id; what is usual is their median.
    """
    if not details:
        return {}
    contrast = float(np.median([d.contrast for d in details.values()]))
    sharpness = float(np.median([d.sharpness for d in details.values()]))
    faults = {}
    for id_, detail in details.items():
        if detail.contrast < max(_LEAST_CONTRAST, _CONTRAST_SHARE * contrast):
            kind = "black" if detail.brightness < 16 else "constant"
            faults[id_] = (
                f"almost {kind}: the standard deviation of its grey levels is "
                f"{detail.contrast:.1f}, the median of all images {contrast:.1f}"
            )
        elif detail.sharpness < _SHARPNESS_SHARE * sharpness:
            faults[id_] = (
                f"blurred: the variance of its Laplacian is {detail.sharpness:.1f}, the median of "
                f"all images {sharpness:.1f}"
            )
    return faults
