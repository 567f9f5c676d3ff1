"""What a layout of weight files is: how it is detected, its conventions, and its translation."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from semiseg_jax.models.dsbn import DOMAINS, stats_collection
from semiseg_jax.models.weight_files import File


@dataclasses.dataclass(frozen=True)
class Conventions:
    """The conventions of a file's network; None: not known, or without effect.

    Attributes:
        layout: name of the layout.
        input_normalization: key of `deeplab.INPUT_NORMALIZATIONS`.
        align_corners: see `layers.interpolation_matrix`.
        first_dilation: see `layers.dilated_stages`.
        epsilon_backbone, epsilon_head: epsilon of the norms.
        backbone, head: of the network, as in `config.model`.
        license: of the weights, where it is not one of the usual open licences.
        scope: the file must contain every variable whose name starts with this prefix.
    """

    layout: str
    input_normalization: str | None = None
    align_corners: bool | None = None
    first_dilation: str | None = None
    epsilon_backbone: float | None = None
    epsilon_head: float | None = None
    backbone: str | None = None
    head: str | None = None
    license: str | None = None
    scope: str = "backbone/"

    def settings(self) -> dict[str, Any]:
        """Returns the known conventions by key of `config.model`."""
        values = {
            "input_normalization": self.input_normalization,
            "align_corners": self.align_corners,
            "first_dilation": self.first_dilation,
            "norm_epsilon.backbone": self.epsilon_backbone,
            "norm_epsilon.head": self.epsilon_head,
        }
        return {key: value for key, value in values.items() if value is not None}


# (name in the file, name of the part, tensor)
Part = tuple[str, str, np.ndarray]


class UnsupportedNetworkError(Exception):
    """A file of a known layout holds a network that is not supported; the message describes it."""


def whole_tensors(file: File) -> Iterable[Part]:
    """Returns the tensors of a file, each as one part with its own name."""
    return ((name, name, tensor) for name, tensor in file.tensors.items())


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """A layout of weight files; see the module's docstring.

    Attributes:
        matches: whether a file has the layout.
        conventions: of the network that a file was saved from.
        translate: (name, tensor) in the file -> (name, tensor) in our network, or None for a tensor
            that our networks do not have.
        optional: prefixes of names that a file may contain and the network may lack.
        parts: the tensors to translate, of a file: (name in the file, name of the part, tensor);
            for files that fuse tensors which our networks have apart.
    """

    matches: Callable[[File], bool]
    conventions: Callable[[File], Conventions]
    translate: Callable[[str, np.ndarray], tuple[str, np.ndarray] | None]
    optional: tuple[str, ...] = ()
    parts: Callable[[File], Iterable[Part]] = whole_tensors


def domain_of(path: tuple[str, ...]) -> str | None:
    """Returns the domain of a variable; None for a variable that both domains share."""
    for domain in DOMAINS:
        if path[0] == stats_collection(domain) or domain in path:
            return domain
    return None


def canonical_name(path: tuple[str, ...]) -> str:
    """Returns a variable's name in a network with one norm: without collection and domain."""
    return "/".join(key for key in path[1:] if key not in DOMAINS)
