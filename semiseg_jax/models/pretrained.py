"""Weights from a file: the layout is recognised, its names are translated, all of it must fit.

Whatever has a norm for each domain takes both from the one in the file.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from semiseg_jax.errors import UserError
from semiseg_jax.models import weight_files
from semiseg_jax.models.weight_files import NO_WEIGHT, File
from semiseg_jax.models.weight_layouts import LAYOUTS, Conventions, Layout, name_here

# Part of the network that belongs to one set of classes: "classifier", "classifier1", …
_CLASSIFIER = "classifier"

# Of a file, by the name here: the name there, and the tensor.
_Given = Mapping[str, tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a file's tensors and of a network's variables; prints as a table.

    Attributes:
        conventions: of the file.
        loaded: variables that come from the file, such as "params/backbone/stem/conv/kernel".
        left: names in the file that were not used.
        unmatched: variables that are not in the file, and stay as drawn.
    """

    conventions: Conventions
    loaded: tuple[str, ...]
    left: tuple[str, ...]
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        """A line for each kind."""
        parts, fresh = (
            ", ".join(sorted({name.split("/")[1] for name in names}))
            for names in (self.loaded, self.unmatched)
        )
        norm = self.conventions.input_normalization or "not known"
        rows = [
            ("loaded", self.loaded, f"into {parts}"),
            ("left in the file", self.left, _shortened(self.left)),
            ("kept as drawn", self.unmatched, f"in {fresh}"),
        ]
        return f"weights of layout {self.conventions.layout}, input normalisation {norm}\n" + (
            "\n".join(
                f"  {what:16s} {len(names):4d} tensors {where if names else ''}".rstrip()
                for what, names, where in rows
            )
        )


def inspect(path: epath.PathLike) -> Conventions:
    """What the network of a file's weights expects, from the file's names and header.

    Raises:
        UserError: the file is missing, damaged, or of an unknown layout.
    """
    file = weight_files.read(path)
    return _layout_of(path, file).conventions(file)


def load(path: epath.PathLike, variables: dict[str, Any]) -> tuple[dict[str, Any], Report]:
    """The variables with what the file has, and a report.

    A norm of the file goes to both domains. Of a file with a classifier of another number of
    classes, the classifier is left; everything else must fit.

    Args:
        path: see `config.model.pretrained`.
        variables: of the network, as `deeplab.build(…).init(…, domain="both")` makes them; the
            loaded ones keep their dtypes and shardings.

    Returns:
        (variables, report); the variables passed in stay as they are.

    Raises:
        UserError: the file is missing or damaged, or its names and shapes are not those of the
            network.
    """
    file = weight_files.read(path)
    given = _fitting(path, file, variables)
    flat = traverse_util.flatten_dict(variables)
    wanted = {name_here(place) for place in flat}
    loaded = {place: given[name_here(place)][1] for place in flat if name_here(place) in given}
    used = {name for target, (name, _) in given.items() if target in wanted}
    report = Report(
        _layout_of(path, file).conventions(file),
        loaded=tuple("/".join(place) for place in loaded),
        left=tuple(
            name for name in file.tensors if name not in used and not NO_WEIGHT.search(name)
        ),
        unmatched=tuple("/".join(place) for place in flat if place not in loaded),
    )
    merged = {p: _like(loaded[p], leaf) if p in loaded else leaf for p, leaf in flat.items()}
    return traverse_util.unflatten_dict(merged), report


def check(path: epath.PathLike, shapes: dict[str, Any]) -> None:
    """Refuses weights that `load` would refuse, without loading them.

    Args:
        path: as there.
        shapes: shapes and dtypes of the network's variables.

    Raises:
        UserError: as there.
    """
    _fitting(path, weight_files.read(path), shapes)


def _fitting(path: epath.PathLike, file: File, variables: dict[str, Any]) -> _Given:
    """What the file has for the network, by its name here."""
    layout = _layout_of(path, file)
    here = {name: layout.translate(name, tensor) for name, tensor in file.tensors.items()}
    given = {target[0]: (name, target[1]) for name, target in here.items() if target}
    flat = traverse_util.flatten_dict(variables)
    wanted = {name_here(place): leaf for place, leaf in flat.items()}
    if _other_classes(given, wanted):
        given = {name: value for name, value in given.items() if not name.startswith(_CLASSIFIER)}
    _check_fits(path, layout, layout.conventions(file), given, wanted)
    return given


def _layout_of(path: epath.PathLike, file: File) -> Layout:
    for layout in LAYOUTS.values():
        if layout.recognises(file):
            return layout
    raise UserError(
        f"{path} holds weights of a layout that is not known (its names: "
        f"{_shortened(tuple(file.tensors))}): known are {', '.join(LAYOUTS)}."
    )


def _other_classes(given: _Given, wanted: Mapping[str, Any]) -> bool:
    """Whether file and network both have a classifier, of different numbers of classes."""
    return any(
        target in wanted and tensor.shape != wanted[target].shape
        for target, (_, tensor) in given.items()
        if target.startswith(_CLASSIFIER) and target.endswith("/bias")
    )


def _check_fits(
    path: epath.PathLike,
    layout: Layout,
    conventions: Conventions,
    given: _Given,
    wanted: Mapping[str, Any],
) -> None:
    """Raises a UserError that names what is missing, too much or of another shape."""
    no_classifier = not any(name.startswith(_CLASSIFIER) for name in given)
    missing = tuple(
        f"{name} {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name.startswith(conventions.scope)
        and name not in given
        and not (no_classifier and name.startswith(_CLASSIFIER))
    )
    extra = tuple(
        f"{name} {list(tensor.shape)}"
        for target, (name, tensor) in given.items()
        if target not in wanted and not target.startswith(layout.optional)
    )
    differing = tuple(
        f"{name} gives {tensor.dtype}{list(tensor.shape)} for {target} {list(wanted[target].shape)}"
        for target, (name, tensor) in given.items()
        if target in wanted
        # Integers would be quantised weights, whose scale is not in the tensor.
        and (tensor.shape != wanted[target].shape or not _is_floating(tensor))
    )
    problems = [
        f"{what} {_shortened(names, 4)}"
        for what, names in (
            ("the file lacks", missing),
            ("the network has no place for", extra),
            ("shapes or types differ:", differing),
        )
        if names
    ]
    if problems:
        of = [
            f"model.{key}={value}"
            for key, value in (("backbone", conventions.backbone), ("head", conventions.head))
            if value
        ]
        raise UserError(
            f"{path} (layout {conventions.layout}{', of ' if of else ''}{' '.join(of)}) does not "
            f"fit the network: {'; '.join(problems)}: give weights of the same network, or change "
            "`model`."
        )


def _is_floating(tensor: np.ndarray) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating)


def _like(tensor: np.ndarray, leaf: Any) -> Any:
    """The tensor with dtype and place of a leaf."""
    tensor = np.ascontiguousarray(tensor, leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return tensor
    return jax.make_array_from_callback(tensor.shape, leaf.sharding, lambda part: tensor[part])


def _shortened(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
