"""Predictions of a trained model on NumPy arrays.

    from semiseg_jax.serving.trained_model import TrainedModel

    model = TrainedModel.load("runs/streets")
    class_map = model.predict(image)

This module and all that it imports work without TensorFlow. `prediction_writer` predicts files with
the same network, padding rule and tiles, so that both give the same classes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped, UInt8

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.inference import Predictor, lookahead
from semiseg_jax.runtime import paths, rules
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import downscaling, model_bundle, tiling
from semiseg_jax.serving.model_bundle import InferenceConfig, ModelBundle
from semiseg_jax.shape_buckets import ShapeBuckets, Size

# From class probabilities [n, h, w, classes] on the devices to the output [n, h, w, …].
_Finish = Callable[[Array], Array]


def assign_classes(probabilities: Float[Array, "n h w classes"]) -> UInt8[Array, "n h w"]:
    """Returns the class id of each pixel, as evaluation computes it."""
    return jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Images that are padded to one size; a batch that is not full ends with empty images.

    Attributes:
        images: RGB, padded.
        positions: of the images in the list of all images.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    positions: Sequence[int]


class TrainedModel:
    """A trained network on the devices of this process; predicts images of any size.

    A program is compiled for each image size, and stays compiled. From the ninth size on, images of
    a new size are padded to multiples of the evaluation's `eval.pad_to`, as in any set of many
    sizes (see `shape_buckets`), so that few programs are compiled. Padding changes classes near the
    border: with `pad_to=N`, every image is padded to multiples of N, and the prediction of an image
    does not depend on the sizes that came before.

    Attributes:
        bundle: the network, its weights and their description.
        variables: the weights, on the devices.
        config: the settings of inference; those of the evaluation unless others were given.
        mesh: the images of a batch are split over it.
    """

    def __init__(self, bundle: ModelBundle, config: InferenceConfig, mesh: Mesh):
        """Copies the weights to the devices; compiles nothing yet."""
        self.bundle = bundle
        self.config = config
        self.mesh = mesh
        self._predictor = Predictor(
            bundle.model,
            mesh,
            config.scales,
            config.flip,
            window=config.window,
            window_stride=config.window_stride,
        )
        self.variables = jax.device_put(bundle.variables, mesh_lib.replicated(mesh))
        self._assign_classes = jax.jit(assign_classes)
        # (height, width) of all images so far, downscaled, and of those that were not padded.
        self._sizes: set[Size] = set()
        self._exact_sizes: frozenset[Size] = frozenset()

    @classmethod
    def load(
        cls,
        folder: epath.PathLike,
        devices: Sequence[jax.Device] | None = None,
        **settings: Any,
    ) -> "TrainedModel":
        """Loads the model of a finished run.

        Args:
            folder: of the run, or any other folder with a copy of its model/, or that model/
                itself.
            devices: that compute; by default all of this process.
            **settings: fields of `InferenceConfig` that differ from the evaluation's, such as
                scales=(0.5, 1.0) or flip=True.

        Raises:
            UserError: there is no model, it is damaged, or a setting is not accepted.
        """
        settings = {name: rules.to_tuples(value) for name, value in settings.items()}
        model_bundle.check_settings(settings)
        bundle = model_bundle.load(epath.Path(paths.expand_home(str(folder))))
        mesh = mesh_lib.make_mesh(jax.local_devices() if devices is None else devices)
        config = model_bundle.evaluation_config(bundle, mesh.size)
        return cls(bundle, dataclasses.replace(config, **settings), mesh)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in id order."""
        return self.bundle.classes

    @property
    def palette(self) -> UInt8[np.ndarray, "classes 3"]:
        """RGB of each class: `palette[class_map]` is a picture of a class map."""
        return np.array(self.bundle.palette, np.uint8)

    @overload
    def predict(self, images: np.ndarray) -> np.ndarray: ...
    @overload
    def predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    def predict(self, images: Any) -> Any:
        """Predicts the class of each pixel.

        Args:
            images: RGB, uint8, upright: an image [h, w, 3], a batch [n, h, w, 3], or a sequence of
                images [h, w, 3] of any sizes.

        Returns:
            Class ids, uint8, in the size of the images: [h, w], [n, h, w], or a list of [h, w].

        Raises:
            UserError: an image has another shape or dtype.
        """
        return self._predict(images, self._assign_classes, (), np.uint8)

    @overload
    def predict_probabilities(self, images: np.ndarray) -> np.ndarray: ...
    @overload
    def predict_probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    def predict_probabilities(self, images: Any) -> Any:
        """Predicts the probability of each class at each pixel.

        Args:
            images: as in `predict`.

        Returns:
            Probabilities in 0..1, float32: [h, w, classes], [n, h, w, classes], or a list of
            [h, w, classes]. `predict` returns their arg max.

        Raises:
            UserError: an image has another shape or dtype.
        """
        return self._predict(images, lambda p: p, (len(self.classes),), np.float32)

    def start_batch(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[Array, "n h w classes"]:
        """Starts the computation of class probabilities; the result is split over the devices.

        Args:
            images: RGB, downscaled and padded; n is a multiple of the number of devices.
        """
        on_devices = mesh_lib.shard_batch({"image": images}, self.mesh)["image"]
        return self._predictor(self.variables, on_devices)

    def _predict(self, images: Any, finish: _Finish, tail: tuple[int, ...], dtype: Any) -> Any:
        """Predicts images in any form that `predict` accepts.

        Args:
            images: as in `predict`.
            finish: computes the output from the probabilities.
            tail, dtype: the output of an image is [h, w, *tail] of this dtype.
        """
        if not (hasattr(images, "__array__") or hasattr(images, "__array_interface__")):
            return self._predict_all(_checked(images), finish)
        array = np.asarray(images)
        if array.ndim < 4 and array.dtype != object:
            return self._predict_all([_checked_image("The image", array)], finish)[0]
        outputs = self._predict_all(_checked(array), finish)
        if array.dtype == object:
            return outputs
        return np.stack(outputs) if outputs else np.zeros((0, *array.shape[1:3], *tail), dtype)

    def _predict_all(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], finish: _Finish
    ) -> list[np.ndarray]:
        """Returns the outputs of images of any sizes, in the sizes of the images."""
        small = [shrink_image(image, self.bundle.downscale) for image in images]
        sizes: list[Size] = [image.shape[:2] for image in small]
        buckets = self._shape_buckets(sizes)
        outputs: dict[int, np.ndarray] = {}
        whole = [i for i, size in enumerate(sizes) if buckets.tile_size(size) == size]
        for batch, values in lookahead(
            self._batches(small, whole, buckets), lambda b: finish(self.start_batch(b.images))
        ):
            for i, output in zip(batch.positions, np.asarray(values), strict=False):
                height, width = sizes[i]
                # A copy, so that the padded batch is freed.
                outputs[i] = output[:height, :width].copy()
        for i in sorted(set(range(len(small))) - set(whole)):
            outputs[i] = self._predict_tiles(small[i], buckets, finish)
        if self.bundle.downscale == 1:
            return [outputs[i] for i in range(len(images))]
        return [downscaling.enlarge(outputs[i], image.shape[:2]) for i, image in enumerate(images)]

    def _predict_tiles(
        self, image: UInt8[np.ndarray, "h w 3"], buckets: ShapeBuckets, finish: _Finish
    ) -> Shaped[np.ndarray, "h w ..."]:
        """Returns the output of an image that is too large for one pass of the network."""
        target: np.ndarray | None = None
        for tiles, values in lookahead(
            tiling.tile_batches(image, buckets, self.bundle.pad_value),
            lambda batch: finish(self.start_batch(batch.images)),
        ):
            results = np.asarray(values)
            if target is None:
                target = np.zeros((*image.shape[:2], *results.shape[3:]), results.dtype)
            tiling.paste(tiles, results, target)
        assert target is not None
        return target

    def _shape_buckets(self, sizes: Sequence[Size]) -> ShapeBuckets:
        """Returns the array shapes for the next images, and remembers their sizes.

        A size that was not padded once is never padded: its program exists.
        """
        exact_sizes = self.bundle.exact_sizes | self._exact_sizes
        buckets = model_bundle.make_shape_buckets(
            dataclasses.replace(self.bundle, exact_sizes=exact_sizes),
            self.config,
            [*self._sizes, *sizes],
            self.mesh.size,
        )
        self._sizes.update(sizes)
        tile_sizes = map(buckets.tile_size, sizes)
        self._exact_sizes |= {size for size in tile_sizes if buckets.padded_size(size) == size}
        return buckets

    def _batches(
        self,
        images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
        positions: Sequence[int],
        buckets: ShapeBuckets,
    ) -> Iterator[_Batch]:
        """Yields batches of the images at these positions, padded size after padded size.

        The number of places in a batch is a power of two times the number of devices or that of a
        full batch, so that few programs are compiled for calls with any number of images.
        """
        members: dict[Size, list[int]] = {}
        for i in positions:
            members.setdefault(buckets.padded_size(images[i].shape[:2]), []).append(i)
        for size, group in members.items():
            full = min(buckets.batch_size(size), self.config.batch)
            for first in range(0, len(group), full):
                chosen = group[first : first + full]
                per_device = -(-len(chosen) // self.mesh.size)
                places = min(full, self.mesh.size * (1 << (per_device - 1).bit_length()))
                pixels = np.empty((places, *size, 3), np.uint8)
                pixels[:] = self.bundle.pad_value
                for place, i in enumerate(chosen):
                    height, width = images[i].shape[:2]
                    pixels[place, :height, :width] = images[i]
                yield _Batch(pixels, chosen)


def _checked(images: Any) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Returns images as NumPy arrays.

    Raises:
        UserError: the images are no sequence, or one has another shape or dtype.
    """
    if isinstance(images, str | bytes | dict) or not hasattr(images, "__iter__"):
        raise UserError(
            f"The images are a {type(images).__name__}: give an array [height, width, 3], or a "
            "list of such arrays; semiseg_jax.data.image_io.read_image reads a file.",
            code="images-not-a-sequence",
        )
    return [_checked_image(f"Image {i}", image) for i, image in enumerate(images)]


def _checked_image(name: str, image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image as a NumPy array; `name` is its name in the error message.

    Raises:
        UserError: it has another shape or dtype.
    """
    try:
        array = np.asarray(image)
    except ValueError:  # Nested lists of several lengths.
        array = np.asarray(None)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        hint = ""
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
            hint = "; repeat a grey image three times, as in np.dstack([grey] * 3)"
        elif array.ndim == 3 and array.shape[2] == 4:
            hint = "; take the colours alone, as in image[..., :3]"
        elif array.ndim == 0:
            hint = "; semiseg_jax.data.image_io.read_image reads a file"
        raise UserError(
            f"{name} has the shape {list(array.shape)}: make it [height, width, 3], RGB{hint}.",
            code="image-shape-invalid",
        )
    if array.dtype != np.uint8:
        is_float = np.issubdtype(array.dtype, np.floating)
        hint = ", such as np.round(255 * image).astype(np.uint8) for values in 0..1" * is_float
        raise UserError(
            f"{name} has the dtype {array.dtype}: convert it to uint8, 0 to 255{hint}.",
            code="image-dtype-invalid",
        )
    return array
