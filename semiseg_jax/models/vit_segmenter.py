"""Networks on vision transformers: images of any size, and the heads `dpt` and `linear`."""

import jax.core
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from semiseg_jax.models import convolutions, dpt, dsbn
from semiseg_jax.models.segmenter import Features, Segmenter, Size

HEADS = ("dpt", "linear")


def nearest_multiple(side: convolutions.Dim, patch: int) -> convolutions.Dim:
    """Returns the multiple of the patch that is nearest to a side, at least one patch.

    A side in the middle of two becomes the larger, as in `evaluate` of UniMatch V2's code.
    """
    patches = (2 * side + patch) // (2 * patch)
    return patch * (jax.core.max_dim(patches, 1) if is_symbolic_dim(side) else max(patches, 1))


class ViTSegmenter(Segmenter):
    """A vision transformer and a head, for images of any size.

    Images whose sides are no multiples of the patch are resized to the nearest, so that no pixel is
    cut off, and their logits are resized back. There is no batch norm: all images meet the same
    network, whatever their domain.

    Attributes:
        patch: side of the backbone's patches in pixels.
    """

    patch: int

    def _stride(self) -> int:
        return self.patch

    def _network_size(self, size: Size) -> Size:
        height, width = size
        return nearest_multiple(height, self.patch), nearest_multiple(width, self.patch)


class DPTSegmenter(ViTSegmenter):
    """The DPT head on the features of four blocks, see `dpt.DPT`.

    Attributes:
        head: widths of the head.
    """

    head: dpt.DPTSpec

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        del layout
        levels = (features.low, *features.middle, features.high)
        merge = dpt.DPT(self.head, self.align_corners, self.remat, self.dtype, name="dpt")
        return self._classifier(1, 1, "classifier")(merge(levels))


class LinearSegmenter(ViTSegmenter):
    """A linear classifier of the last features; the simplest head.

    Source: DINOv2 (Oquab et al., TMLR 2024), the linear head, without its batch norm.
    """

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        del layout
        return self._classifier(1, 1, "classifier")(features.high)
