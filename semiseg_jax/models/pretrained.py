"""Loading of pretrained weights: detects the layout, translates the names, and checks the fit.

A network with a norm for each domain gets both from the one norm in the file.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from semiseg_jax.models import weight_files
from semiseg_jax.models.weight_files import NO_WEIGHT, File
from semiseg_jax.models.weight_layout import (
    Conventions,
    UnsupportedNetworkError,
    WeightLayout,
    canonical_name,
)
from semiseg_jax.models.weight_layouts import LAYOUTS
from semiseg_jax.runtime.errors import UserError

# Prefix of the modules that depend on the set of classes: "classifier", "classifier1", …
_CLASSIFIER = "classifier"

# The images that DINOv3's weights were trained on, in the names of files.
_SATELLITE, _PHOTOGRAPHS = "sat493m", "lvd1689m"

# By name in a network with one norm: the name in the file, and the tensor.
_Tensors = Mapping[str, tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The tensors that were loaded, and those that were not; prints as a table.

    Attributes:
        conventions: of the file.
        loaded: variables with values from the file, such as "params/backbone/stem/conv/kernel".
        unused: names in the file that the network does not use.
        initial: variables that are not in the file and keep their initial values.
    """

    conventions: Conventions
    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    initial: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the layout, and a line for each kind of tensor."""
        into, initial = (
            ", ".join(sorted({name.split("/")[1] for name in names}))
            for names in (self.loaded, self.initial)
        )
        norm = self.conventions.input_normalization or "not known"
        rows = [
            ("loaded", self.loaded, f"into {into}"),
            ("not used", self.unused, _shortened(self.unused)),
            ("newly initialised", self.initial, f"in {initial}"),
        ]
        terms = f", {self.conventions.license}" if self.conventions.license else ""
        heading = f"weights of layout {self.conventions.layout}, input normalisation {norm}{terms}"
        return f"{heading}\n" + (
            "\n".join(
                f"  {title:17s} {len(names):4d} tensors {note if names else ''}".rstrip()
                for title, names, note in rows
            )
        )


def inspect(path: epath.PathLike) -> Conventions:
    """Returns the conventions of a file's network; reads the file's header.

    Raises:
        UserError: the file is missing, damaged, or of an unknown layout.
    """
    file = weight_files.read_header(path)
    layout = _detect_layout(path, file)
    with _layout_errors(path):
        return _conventions(path, layout, file)


def load(path: epath.PathLike, variables: dict[str, Any]) -> tuple[dict[str, Any], LoadReport]:
    """Returns the variables with the values from a file, and a report.

    Both domains get the norm in the file. A classifier for another number of classes is not loaded;
    everything else must fit.

    Args:
        path: see `config.model.pretrained`.
        variables: of the network, from `deeplab.build(…).init(…, domain="both")`. They are not
            modified; loaded variables have the same dtypes and shardings.

    Raises:
        UserError: the file is missing or damaged, or its names and shapes do not fit the network.
    """
    file = weight_files.read(path)
    tensors, conventions = _translate(path, file, variables)
    flat = traverse_util.flatten_dict(variables)
    loaded = {key: tensors[canonical_name(key)] for key in flat if canonical_name(key) in tensors}
    for name, tensor in loaded.values():
        # float16 and bfloat16 sums would overflow; min and max propagate NaN.
        if tensor.size and not np.isfinite([tensor.min(), tensor.max()]).all():
            raise UserError(
                f"{path} holds NaN or infinite values in {name}: give weights of a training that "
                "did not diverge.",
                code="weights-not-finite",
            )
    used = {name for name, _ in loaded.values()}
    report = LoadReport(
        conventions,
        loaded=tuple("/".join(key) for key in loaded),
        unused=tuple(
            name for name in file.tensors if name not in used and not NO_WEIGHT.search(name)
        ),
        initial=tuple("/".join(key) for key in flat if key not in loaded),
    )
    merged = {
        key: _match_leaf(loaded[key][1], leaf) if key in loaded else leaf
        for key, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(merged), report


def check(path: epath.PathLike, shapes: dict[str, Any]) -> None:
    """Raises the errors of `load` for weights that do not fit; reads the file's header.

    Args:
        path: see `load`.
        shapes: shapes and dtypes of the network's variables.

    Raises:
        UserError: see `load`.
    """
    _translate(path, weight_files.read_header(path), shapes)


def _translate(
    path: epath.PathLike, file: File, variables: dict[str, Any]
) -> tuple[_Tensors, Conventions]:
    """Returns the file's tensors by name in the network, and its conventions; checks the fit."""
    layout = _detect_layout(path, file)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    with _layout_errors(path):
        conventions = _conventions(path, layout, file)
        for name, part, tensor in layout.parts(file):
            if translated := layout.translate(part, tensor):
                tensors[translated[0]] = name, translated[1]
    leaves = {
        canonical_name(key): leaf for key, leaf in traverse_util.flatten_dict(variables).items()
    }
    if _has_other_classes(tensors, leaves):
        tensors = {k: v for k, v in tensors.items() if not k.startswith(_CLASSIFIER)}
    _check_fit(path, layout, conventions, tensors, leaves)
    return tensors, conventions


def _conventions(path: epath.PathLike, layout: WeightLayout, file: File) -> Conventions:
    """The conventions of a file, by its content, and where that does not say it by its name.

    DINOv3's weights for satellite images have the tensors of those for photographs, and were
    trained with another mean and deviation. The published files, or their folders, have the name of
    the images: SAT-493M, or LVD-1689M for photographs.
    """
    conventions = layout.conventions(file)
    *folders, name = str(path).lower().split("/")
    named = name if _PHOTOGRAPHS in name else "/".join((*folders, name))
    if "dinov3" in (conventions.backbone or "") and _SATELLITE in named:
        return dataclasses.replace(conventions, input_normalization="dinov3_satellite")
    return conventions


def _detect_layout(path: epath.PathLike, file: File) -> WeightLayout:
    with _layout_errors(path):
        for layout in LAYOUTS.values():
            if layout.matches(file):
                return layout
    raise UserError(
        f"{path} holds weights of a layout that is not known (its names: "
        f"{_shortened(tuple(file.tensors))}): known are {', '.join(LAYOUTS)}.",
        code="weights-layout-unknown",
    )


@contextlib.contextmanager
def _layout_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns the errors of a layout about tensors and descriptions of any form into a UserError."""
    try:
        yield
    except UnsupportedNetworkError as error:
        raise UserError(
            f"{path} holds {error}: give weights of one of these networks.",
            code="weights-network-unsupported",
        ) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has tensors or a description that do not fit the names of its tensors "
            f"({error!r}): get the file again.",
            code="weights-layout-malformed",
        ) from error


def _has_other_classes(tensors: _Tensors, leaves: Mapping[str, Any]) -> bool:
    """Whether file and network both have a classifier, for different numbers of classes."""
    return any(
        name in leaves and tensor.shape != leaves[name].shape
        for name, (_, tensor) in tensors.items()
        if name.startswith(_CLASSIFIER) and name.endswith("/bias")
    )


def _check_fit(
    path: epath.PathLike,
    layout: WeightLayout,
    conventions: Conventions,
    tensors: _Tensors,
    leaves: Mapping[str, Any],
) -> None:
    """Raises a UserError that names missing tensors, extra tensors and differing shapes."""
    no_classifier = not any(name.startswith(_CLASSIFIER) for name in tensors)
    missing = tuple(
        f"{name} {list(leaf.shape)}"
        for name, leaf in leaves.items()
        if name.startswith(conventions.scope)
        and name not in tensors
        and not (no_classifier and name.startswith(_CLASSIFIER))
    )
    extra = tuple(
        f"{file_name} {list(tensor.shape)}"
        for name, (file_name, tensor) in tensors.items()
        if name not in leaves and not name.startswith(layout.optional)
    )
    differing = tuple(
        f"{file_name} gives {tensor.dtype}{list(tensor.shape)} for {name} "
        f"{list(leaves[name].shape)}"
        for name, (file_name, tensor) in tensors.items()
        if name in leaves
        # Integers would be quantised weights, whose scale is not in the tensor.
        and (tensor.shape != leaves[name].shape or not jnp.issubdtype(tensor.dtype, jnp.floating))
    )
    problems = [
        f"{problem} {_shortened(names, 4)}"
        for problem, names in (
            ("the file lacks", missing),
            ("the network has no place for", extra),
            ("shapes or types differ:", differing),
        )
        if names
    ]
    if problems:
        network = " ".join(
            f"model.{key}={value}"
            for key, value in (("backbone", conventions.backbone), ("head", conventions.head))
            if value
        )
        raise UserError(
            f"{path} (layout {conventions.layout}{', of ' if network else ''}{network}) does not "
            f"fit the network: {'; '.join(problems)}: give weights of the same network, or change "
            "`model`.",
            code="weights-do-not-fit",
        )


def _match_leaf(tensor: np.ndarray, leaf: Any) -> Any:
    """Returns the tensor with the dtype and sharding of a leaf."""
    tensor = np.ascontiguousarray(tensor, leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return tensor
    return jax.make_array_from_callback(tensor.shape, leaf.sharding, lambda index: tensor[index])


def _shortened(names: Iterable[str], count: int = 6) -> str:
    """Joins the first names, and adds the number of the others."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
