"""Runs the network of a run on images: class probabilities of each view, and pooled features."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example
from semiseg_jax.data.sources.downscale import shrink_image, shrunk
from semiseg_jax.runtime import preemption
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle
from semiseg_jax.serving.model_bundle import ModelBundle
from semiseg_jax.serving.trained_model import TrainedModel
from semiseg_jax.suggestions import faults, uncertainty
from semiseg_jax.suggestions.faults import Detail
from semiseg_jax.suggestions.uncertainty import Uncertainty

# Probabilities of so many pixels and classes are in memory at a time, for each view.
_MAX_VALUES = 2**25
# Features are computed from images of one size, whose longer side is at most so many pixels.
_FEATURE_SIDE, _FEATURE_MULTIPLE = 256, 32


@dataclasses.dataclass(frozen=True)
class Scored:
    """What is known of an image; `measures` is None for labelled images, which are not predicted.

    Attributes:
        detail: how much it shows.
        features: of the backbone, the mean over all positions.
        measures: how unsure the network is.
    """

    detail: Detail
    features: Float[np.ndarray, " d"]
    measures: Uncertainty | None


class Scorer:
    """Measures images with the network of a run, by the views with which it labels images."""

    def __init__(self, bundle: ModelBundle, config: Any, images: Sequence[Example]):
        """Copies the weights to the devices.

        Args:
            bundle: the network.
            config: of the run; `pseudo` is read.
            images: all images that will be scored; their sizes are read.
        """
        self._downscale = bundle.downscale
        # Images are shrunk here, once for all views.
        bundle = dataclasses.replace(bundle, downscale=1)
        self._num_classes = len(bundle.classes)
        mesh = mesh_lib.make_mesh()
        self._batch = mesh_lib.round_up_batch(config.pseudo.batch, mesh.size)
        evaluated = model_bundle.evaluation_config(bundle, mesh.size)
        self._models = [
            TrainedModel(
                bundle,
                dataclasses.replace(
                    evaluated,
                    scales=(scale,),
                    flip=False,
                    window=tuple(config.pseudo.window),
                    window_stride=tuple(config.pseudo.window_stride),
                    batch=self._batch,
                ),
                mesh,
            )
            for scale in config.pseudo.scales
        ]
        self._flip = config.pseudo.flip
        self._encode = _Encoder(bundle)
        self._sizes = _small_sizes(images, self._downscale)
        self._feature_size = _feature_size(list(self._sizes.values()))

    def small_image(self, example: Example) -> UInt8[np.ndarray, "h w 3"]:
        """Reads an image as the network sees it.

        Raises:
            UserError: it is not readable.
        """
        return shrink_image(image_io.read_image(example.image), self._downscale)

    def views(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> list[list[Float[np.ndarray, "_ _ classes"]]]:
        """Returns the class probabilities of each image, a list of all its views.

        Args:
            images: as `small_image` returns them.
        """
        views = [model.predict_probabilities(list(images)) for model in self._models]
        if self._flip:
            mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]
            views += [
                [p[:, ::-1] for p in model.predict_probabilities(mirrored)]
                for model in self._models
            ]
        return [list(of_image) for of_image in zip(*views, strict=True)]

    def labeled(self, examples: Iterable[Example]) -> dict[str, Scored]:
        """Returns detail and features of labelled images, by id.

        Raises:
            UserError: an image is not readable.
        """
        scored = {}
        for example in examples:
            image = self.small_image(example)
            scored[example.id] = Scored(faults.measure(image), self._features(image), None)
        return scored

    def unlabeled(
        self, examples: Sequence[Example], progress: Callable[[int], None]
    ) -> tuple[dict[str, Scored], dict[str, str]]:
        """Measures images.

        Args:
            examples: the images.
            progress: called with the number of images that were done since the last call.

        Returns:
            By id, what is known of each image, and the error of each unreadable one.

        Raises:
            Preempted: the command must stop.
        """
        scored, errors = {}, {}
        for chunk in self._chunks(examples):
            preemption.raise_if_stopping()
            read = []
            for example in chunk:
                try:
                    read.append((example.id, self.small_image(example)))
                except UserError as error:
                    errors[example.id] = str(error)
            for (id_, image), views in zip(read, self.views([i for _, i in read]), strict=True):
                measures = uncertainty.measure(views)
                scored[id_] = Scored(faults.measure(image), self._features(image), measures)
            progress(len(chunk))
        return scored, errors

    def _chunks(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Yields images of similar sizes, as many as fit into a batch and into memory."""
        chunk: list[Example] = []
        ordered = sorted(examples, key=lambda e: (self._sizes.get(e.id, (1, 1)), e.id))
        for example in ordered:
            height, width = self._sizes.get(example.id, (1, 1))
            most = max(1, _MAX_VALUES // (height * width * self._num_classes))
            if chunk and len(chunk) >= min(self._batch, most):
                yield chunk
                chunk = []
            chunk.append(example)
        if chunk:
            yield chunk

    def _features(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " d"]:
        height, width = self._feature_size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return self._encode(np.asarray(resized))


class _Encoder:
    """Computes the mean of the backbone's last features over all positions, float32."""

    def __init__(self, bundle: ModelBundle):
        model = bundle.model

        def encode(variables: Any, image: Any) -> Any:
            features = model.apply(
                variables, image[None], domain="weak", train=False, method="encode"
            )
            return features.high.astype(np.float32).mean(axis=(0, 1, 2))

        self._variables = jax.device_put(bundle.variables, jax.local_devices()[0])
        self._jitted = jax.jit(encode)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " d"]:
        return np.asarray(self._jitted(self._variables, image))


def _small_sizes(examples: Iterable[Example], downscale: int) -> dict[str, tuple[int, int]]:
    """Returns (height, width) of the readable images as the network sees them, by id."""
    sizes = {}
    for example in examples:
        try:
            sizes[example.id] = shrunk(image_io.image_size(example.image), downscale)
        except UserError:
            continue  # Reported where the image is read.
    return sizes


def _feature_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the size from which features are computed: the median, reduced and rounded."""
    height, width = np.median(np.array(sizes or [(1, 1)]), axis=0)
    factor = min(1.0, _FEATURE_SIDE / max(height, width))

    def rounded(side: float) -> int:
        return max(1, round(factor * side / _FEATURE_MULTIPLE)) * _FEATURE_MULTIPLE

    return rounded(height), rounded(width)
