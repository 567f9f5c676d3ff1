"""How many views of each unlabelled image a method sees that labels inside the training step."""

import dataclasses
from typing import Literal, get_args

Partner = Literal["other_image", "same_image"]


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of each unlabelled image in a batch; static.

    All views of an image have one geometry: scale, crop and mirror are drawn once for each image
    and step. Every strong view then draws its own colour augmentation, by `config.method.views`.

    Attributes:
        weak: 1 for the crop itself, without a change of colour; 0 for none.
        strong: number of strong views.
        partner: what images 2k and 2k + 1 of the global batch are. "other_image": two images of a
            shuffle of all unlabelled images; they differ unless there is only one. "same_image":
            two independent crops of one image, as in the published code of UniMatch.
    """

    weak: int
    strong: int
    partner: Partner = "other_image"

    def __post_init__(self):
        if self.weak not in (0, 1):
            raise ValueError(f"There is one weak view or none, because all are equal: {self.weak}.")
        if self.strong < 0 or not self.count:
            raise ValueError(f"There must be a view of each image: {self}.")
        if self.partner not in get_args(Partner):
            raise ValueError(f"partner is one of {get_args(Partner)}, not {self.partner!r}.")

    @property
    def count(self) -> int:
        """Number of views of an image: the weak one is the first."""
        return self.weak + self.strong
