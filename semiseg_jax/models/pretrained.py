"""Weights from a file: the layout is recognised, its names are translated, all of it must fit.

A layout is one entry of `LAYOUTS`: how a file of it is recognised, what its network expects of the
input, and what its tensors are called here. Names here are those of a network with one norm, such
as "backbone/stem/conv/kernel" and "backbone/stem/norm/mean"; whatever has a norm for each domain
takes both from the one in the file.
"""

import dataclasses
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from semiseg_jax.errors import UserError
from semiseg_jax.models.dsbn import DOMAINS, stats_collection

# Part of the network that belongs to one set of classes.
_CLASSIFIER = "classifier/"


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What a layout's network expects.

    Attributes:
        layout: name of the layout.
        input_normalization: name of it, as in `deeplab.INPUT_NORMALIZATIONS`; None: not known.
        align_corners: how it resizes; None where the weights do not depend on it.
        scope: names of the network that a file must have, all that start with this.
    """

    layout: str
    input_normalization: str | None
    align_corners: bool | None
    scope: str


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


@dataclasses.dataclass(frozen=True)
class _File:
    """A file's tensors by name, and the description in its header, if it has one."""

    tensors: Mapping[str, np.ndarray]
    description: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One naming of weights; see the module's docstring."""

    recognises: Callable[[_File], bool]
    conventions: Callable[[_File], Conventions]
    # (name, tensor) -> (name here, tensor here), or None for what has no use here.
    translate: Callable[[str, np.ndarray], tuple[str, np.ndarray] | None]
    # Names here that a file may have though the network does not.
    optional: tuple[str, ...] = ()


# ---------------------------------------------------------------- layouts

_TORCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _from_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Leaf name and tensor: kernels OIHW become HWIO, [c, 1, k, k] becomes [k, k, 1, c]."""
    if tensor.ndim == 4:
        return ("kernel", tensor.transpose(2, 3, 1, 0)) if name == "weight" else None
    return (_TORCH_NORM[name], tensor) if name in _TORCH_NORM else None


_EFFICIENTNET_LAYERS = {
    "_conv_stem": "stem/conv",
    "_bn0": "stem/norm",
    "_conv_head": "head/conv",
    "_bn1": "head/norm",
}
_EFFICIENTNET_BLOCK_LAYERS = {
    "_expand_conv": "expand/conv",
    "_bn0": "expand/norm",
    "_depthwise_conv": "depthwise/conv",
    "_bn1": "depthwise/norm",
    "_project_conv": "project/conv",
    "_bn2": "project/norm",
}


def _is_efficientnet_lite(file: _File) -> bool:
    # Without squeeze-and-excitation: the full EfficientNets have the same names and that.
    names = file.tensors.keys()
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= names and not any(
        "._se_" in name for name in names
    )


def _translate_efficientnet_lite(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    layer, _, leaf = name.rpartition(".")
    converted = _from_torch(leaf, tensor)
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
    if block:
        place = _EFFICIENTNET_BLOCK_LAYERS.get(block[2])
        place = place and f"block_{block[1]}/{place}"
    else:
        place = _EFFICIENTNET_LAYERS.get(layer)
    if converted is None or place is None:
        return None
    return f"backbone/{place}/{converted[0]}", converted[1]


def _is_own(file: _File) -> bool:
    return any(name.startswith("params/") for name in file.tensors)


def _own_conventions(file: _File) -> Conventions:
    model = file.description.get("model", {})
    return Conventions(
        "semiseg_jax", model.get("input_normalization"), model.get("align_corners"), scope=""
    )


def _translate_own(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    path = tuple(name.split("/"))
    return None if _domain(path) == "strong" else (_name_here(path), tensor)


LAYOUTS: dict[str, _Layout] = {
    "semiseg_jax": _Layout(_is_own, _own_conventions, _translate_own),
    "efficientnet_lite": _Layout(
        _is_efficientnet_lite,
        lambda _: Conventions("efficientnet_lite", "lite", None, scope="backbone/"),
        _translate_efficientnet_lite,
        optional=("backbone/head/",),
    ),
}


# ---------------------------------------------------------------- files


_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    safetensors.SafetensorError,
)


def _read(path: epath.PathLike) -> _File:
    path = epath.Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise UserError(
            f"{path} is neither .npz nor .safetensors: save the weights as one of the two."
        )
    try:
        return readers[path.suffix](path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: correct the path to the weights, or leave model.pretrained empty."
        ) from error
    except _DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated, corrupt or no such file; get it "
            "again."
        ) from error


def _read_npz(path: epath.Path) -> _File:
    # Without pickles: they run what they hold.
    archive = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("one array instead of an archive of arrays")
    return _File({name: archive[name] for name in archive.files}, {})


def _read_safetensors(path: epath.Path) -> _File:
    content = path.read_bytes()
    tensors = safetensors.numpy.load(content)
    # The header, sound if the tensors could be read: its length in 8 bytes, then JSON.
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return _File(tensors, json.loads(metadata.get("description", "{}")))


def _layout_of(path: epath.PathLike, file: _File) -> _Layout:
    for layout in LAYOUTS.values():
        if layout.recognises(file):
            return layout
    raise UserError(
        f"{path} holds weights of a layout that is not known (its names: "
        f"{_shortened(tuple(file.tensors))}): known are {', '.join(LAYOUTS)}."
    )


# ---------------------------------------------------------------- the public surface


def inspect(path: epath.PathLike) -> Conventions:
    """What the network of a file's weights expects, from the file's names and header.

    Raises:
        UserError: the file is missing, damaged, or of an unknown layout.
    """
    file = _read(path)
    return _layout_of(path, file).conventions(file)


def load(path: epath.PathLike, variables: dict[str, Any]) -> tuple[dict[str, Any], Report]:
    """The variables with what the file has, and a report.

    A norm of the file goes to both domains. Of a file with a classifier of another number of
    classes, the classifier is left; everything else must fit.

    Args:
        path: .npz or .safetensors.
        variables: of the network, as `deeplab.build(…).init(…, domain="both")` makes them; the
            loaded ones keep their dtypes and shardings.

    Returns:
        (variables, report); the variables passed in stay as they are.

    Raises:
        UserError: the file is missing or damaged, or its names and shapes are not those of the
            network.
    """
    file = _read(path)
    layout = _layout_of(path, file)
    conventions = layout.conventions(file)
    here = {name: layout.translate(name, tensor) for name, tensor in file.tensors.items()}
    # By name here: the name in the file, the tensor.
    given = {target[0]: (name, target[1]) for name, target in here.items() if target}
    flat = traverse_util.flatten_dict(variables)
    wanted = {_name_here(place): leaf for place, leaf in flat.items()}
    if _other_classes(given, wanted):
        given = {name: value for name, value in given.items() if not name.startswith(_CLASSIFIER)}
    _check_fits(path, layout, conventions, given, wanted)

    loaded = {place: given[_name_here(place)][1] for place in flat if _name_here(place) in given}
    used = {name for target, (name, _) in given.items() if target in wanted}
    report = Report(
        conventions,
        loaded=tuple("/".join(place) for place in loaded),
        left=tuple(name for name in here if name not in used),
        unmatched=tuple("/".join(place) for place in flat if place not in loaded),
    )
    merged = {p: _like(loaded[p], leaf) if p in loaded else leaf for p, leaf in flat.items()}
    return traverse_util.unflatten_dict(merged), report


# ---------------------------------------------------------------- from here to there


def _domain(place: tuple[str, ...]) -> str | None:
    """The domain that a variable belongs to; None for one of the whole network."""
    for domain in DOMAINS:
        if place[0] == stats_collection(domain) or domain in place:
            return domain
    return None


def _name_here(place: tuple[str, ...]) -> str:
    """Name in a network with one norm: without the collection and the domain."""
    return "/".join(part for part in place[1:] if part not in DOMAINS)


def _other_classes(given: Mapping[str, tuple[str, np.ndarray]], wanted: Mapping[str, Any]) -> bool:
    """Whether file and network both have a classifier, of different numbers of classes."""
    name = _CLASSIFIER + "bias"
    return name in given and name in wanted and given[name][1].shape != wanted[name].shape


def _check_fits(
    path: epath.PathLike,
    layout: _Layout,
    conventions: Conventions,
    given: Mapping[str, tuple[str, np.ndarray]],
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
        raise UserError(
            f"{path} (layout {conventions.layout}) does not fit the network: "
            f"{'; '.join(problems)}: give weights of the same network, or change `model`."
        )


def _is_floating(tensor: np.ndarray) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating)


def _like(tensor: np.ndarray, leaf: Any) -> Any:
    """The tensor with dtype and place of a leaf."""
    tensor = np.ascontiguousarray(tensor, leaf.dtype)
    return jax.device_put(tensor, leaf.sharding) if isinstance(leaf, jax.Array) else tensor


def _shortened(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
