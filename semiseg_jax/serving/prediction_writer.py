"""Predicts the label maps of images with the model of a run, and writes them.

    OUTPUT/predictions.json            model, protocol, unreadable images, and the files written
    OUTPUT/NAME.png                    class ids; palette PNG in the colours of the classes
    OUTPUT/overlays/NAME.jpg           the image overlaid with its classes, with a legend
    OUTPUT/probabilities/NAME.npz      class probabilities (optional)

NAME is the path of the image in the input folder, without its suffix. The results have the size of
the image, also where the network predicts a downscaled copy of it (`config.data.downscale`).
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from semiseg_jax import workdir
from semiseg_jax.data import image_io, input_pipeline, visualize
from semiseg_jax.data.dataset import Dataset, Example, check_name
from semiseg_jax.data.input_pipeline import ImageBatch
from semiseg_jax.data.sources.downscale import shrink_image, shrunk
from semiseg_jax.inference import pipelined_map
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import downscaling, model_bundle, output_folder, tiling
from semiseg_jax.serving.model_bundle import ModelBundle
from semiseg_jax.serving.trained_model import TrainedModel, assign_classes
from semiseg_jax.shape_buckets import ShapeBuckets, Size


@dataclasses.dataclass(frozen=True)
class _LargeImage:
    """An image that is predicted in tiles, and the arrays that the tiles' results are written to.

    Attributes:
        id: name of the output files.
        image: RGB, downscaled.
        classes: class ids.
        levels: class probabilities as 0..255; without classes if they are not written.
    """

    id: str
    image: visualize.Picture
    classes: UInt8[np.ndarray, "h w"]
    levels: UInt8[np.ndarray, "h w classes"]


class PredictionWriter:
    """Predicts images and writes label maps, overlays and probabilities."""

    def __init__(
        self,
        bundle: ModelBundle,
        protocol: model_bundle.InferenceConfig,
        mesh: Mesh,
        output: epath.PathLike,
        overlays: bool = True,
        probabilities: bool = False,
    ):
        """Copies the weights to the devices.

        Args:
            bundle: the model.
            protocol: the settings of inference.
            mesh: the images of a batch are split over it.
            output: the folder to write to.
            overlays: whether to write overlays.
            probabilities: whether to write class probabilities.
        """
        self._bundle = bundle
        self._protocol = protocol
        self._mesh = mesh
        self._output = epath.Path(output)
        self._overlays = overlays
        self._probabilities = probabilities
        # The hash of each file that predictions wrote, by its path in the output folder.
        self._written: dict[str, str | None] = {}
        self._model = TrainedModel(bundle, protocol, mesh)
        # (height, width) of the images by id, before downscaling; of the present call.
        self._file_sizes: dict[str, Size] = {}
        self._quantize = jax.jit(self._quantize_outputs)

    def __call__(
        self,
        examples: Sequence[Example],
        progress: Callable[[int], None] = lambda count: None,
    ) -> dict[str, str]:
        """Predicts the images and writes the results, replacing files of earlier predictions only.

        Args:
            examples: the images; their ids are the names of the output files.
            progress: called with the number of images, unreadable ones included, that have been
                processed since the last call.

        Returns:
            The error message of each unreadable image, by the path of its file.

        Raises:
            UserError: the output folder cannot be written, or a file of the user is in the way.
            Preempted: the command must stop; the files written so far remain.
        """
        names = {name for e in examples for name in self._file_names(e.id)}
        self._written = output_folder.claim_files(self._output, names)
        # If the command is killed, the next one knows that these files are predictions.
        planned = self._written | dict.fromkeys(names)
        self._write_record({"ended": False, "files": planned})
        fileio.remove_leftovers(self._output)
        errors: dict[str, str] = {}

        def on_read_error(example: Example, error: UserError) -> None:
            errors[example.image] = str(error)
            progress(1)

        file_sizes = _read_sizes(examples, on_read_error)
        self._file_sizes = {e.id: file_sizes[e.image] for e in examples if e.image in file_sizes}
        factor = self._bundle.downscale
        image_sizes = {image: shrunk(size, factor) for image, size in file_sizes.items()}
        buckets = model_bundle.make_shape_buckets(
            self._bundle, self._protocol, list(image_sizes.values()), self._mesh.size
        )
        tile_sizes = {image: buckets.tile_size(size) for image, size in image_sizes.items()}
        # Sorted by size, so that few images wait in memory for others of their size.
        readable = sorted(
            (e for e in examples if e.image in image_sizes),
            key=lambda e: (buckets.padded_size(tile_sizes[e.image]), e.id),
        )
        small = [e for e in readable if tile_sizes[e.image] == image_sizes[e.image]]
        large = [e for e in readable if tile_sizes[e.image] != image_sizes[e.image]]
        batches = self._image_batches(small, image_sizes, buckets, on_read_error)
        for batch in pipelined_map(batches, self._dispatch, self._write_batch):
            progress(len(batch.ids))
        tile_batches = self._tile_batches(large, buckets, on_read_error)
        for _, tiles in pipelined_map(tile_batches, self._dispatch_tiles, self._write_tiles):
            progress(int(tiles.is_last))
        # Sorted, because the reading threads report errors in any order.
        errors = dict(sorted(errors.items()))
        outcome = {"ended": True, "images": len(examples) - len(errors), "broken": errors}
        self._write_record(outcome | {"files": dict(sorted(self._written.items()))})
        return errors

    def _write_record(self, progress: dict[str, Any]) -> None:
        """Writes predictions.json; the first call also checks that the folder is writable."""
        bundle = self._bundle
        content = {
            "classes": list(bundle.classes),
            "palette": [list(colour) for colour in bundle.palette],
            "downscale": bundle.downscale,
            "protocol": dataclasses.asdict(self._protocol),
            "as_evaluated": self._protocol
            == model_bundle.evaluation_config(bundle, self._mesh.size),
            "model": {k: bundle.description[k] for k in ("trained_on", "miou", "protocol")},
            "code_version": workdir.code_version(),
        }
        text = json.dumps(content | progress, indent=1) + "\n"
        fileio.write_bytes(self._output / output_folder.RECORD, text.encode())

    def _file_names(self, name: str) -> list[str]:
        """Returns the files of an image, relative to the output folder; the label map last."""
        overlays = [f"{output_folder.OVERLAYS}/{name}.jpg"] * self._overlays
        probabilities = [f"{output_folder.PROBABILITIES}/{name}.npz"] * self._probabilities
        return [*overlays, *probabilities, f"{name}.png"]

    def _write_file(self, name: str, content: bytes) -> None:
        """Writes a file of the output folder, and remembers it for the record."""
        fileio.write_bytes(self._output / name, content, sync=False)
        self._written[name] = output_folder.content_hash(content)

    def _image_batches(
        self,
        examples: Sequence[Example],
        image_sizes: Mapping[str, Size],
        buckets: ShapeBuckets,
        on_read_error: input_pipeline.OnReadError,
    ) -> Iterator[ImageBatch]:
        """Returns the batches of the images that are predicted without tiles."""
        bundle = self._bundle
        table = image_io.id_table(len(bundle.classes))
        dataset = Dataset("", bundle.classes, bundle.palette, table, (), tuple(examples), ())
        return input_pipeline.batches_by_size(
            examples,
            [image_sizes[e.image] for e in examples],
            dataset,
            buckets.padded_size,
            buckets.batch_size,
            bundle.pad_value,
            on_read_error,
            bundle.downscale,
        )

    def _tile_batches(
        self,
        examples: Sequence[Example],
        buckets: ShapeBuckets,
        on_read_error: input_pipeline.OnReadError,
    ) -> Iterator[tuple[_LargeImage, tiling.TileBatch]]:
        """Yields the batches of the images that are predicted in tiles, image after image."""
        num_classes = len(self._bundle.classes) if self._probabilities else 0
        for example in examples:
            try:
                file_image = image_io.read_image(example.image)
            except UserError as error:
                on_read_error(example, error)
                continue
            image = shrink_image(file_image, self._bundle.downscale)
            size = image.shape[:2]
            levels = np.zeros((*size, num_classes), np.uint8)
            source = _LargeImage(example.id, image, np.zeros(size, np.uint8), levels)
            for tiles in tiling.tile_batches(image, buckets, self._bundle.pad_value):
                yield source, tiles

    def _dispatch(self, batch: ImageBatch) -> tuple[Array, Array]:
        """Starts the computation of a batch; returns as `_quantize_outputs` does."""
        return self._quantize(self._model.start_batch(batch.image))

    def _dispatch_tiles(self, batch: tuple[_LargeImage, tiling.TileBatch]) -> tuple[Array, Array]:
        """Starts the computation of a batch of tiles; returns as `_quantize_outputs` does."""
        return self._quantize(self._model.start_batch(batch[1].images))

    def _quantize_outputs(
        self, probabilities: Float[Array, "n h w classes"]
    ) -> tuple[UInt8[Array, "n h w"], UInt8[Array, "n h w _"]]:
        """Returns class ids as evaluation computes them, and probabilities as 0..255.

        The probabilities have no classes if they are not written.
        """
        classes = assign_classes(probabilities)
        levels = jnp.round(255 * probabilities).astype(jnp.uint8)
        return classes, levels if self._probabilities else levels[..., :0]

    def _write_batch(
        self, batch: ImageBatch, outputs: tuple[Array, Array]
    ) -> Iterator[Callable[[], None]]:
        """Yields a function for each image of a batch that writes its files."""
        classes, levels = map(np.asarray, outputs)
        for i, name in enumerate(batch.ids):
            height, width = batch.sizes[i]
            region = (i, slice(height), slice(width))
            yield functools.partial(
                self._write, name, batch.image[region], classes[region], levels[region]
            )

    def _write_tiles(
        self, batch: tuple[_LargeImage, tiling.TileBatch], outputs: tuple[Array, Array]
    ) -> Iterable[Callable[[], None]]:
        """Copies the middle of each tile to the image; returns its writer with the last batch."""
        source, tiles = batch
        for target, values in zip((source.classes, source.levels), outputs, strict=True):
            tiling.paste(tiles, np.asarray(values), target)
        if not tiles.is_last:
            return []
        return [
            functools.partial(self._write, source.id, source.image, source.classes, source.levels)
        ]

    def _write(
        self,
        name: str,
        image: visualize.Picture,
        classes: UInt8[np.ndarray, "h w"],
        levels: UInt8[np.ndarray, "h w _"],
    ) -> None:
        """Writes the files of an image in the size of its file; the label map last."""
        bundle = self._bundle
        if bundle.downscale > 1:
            size = self._file_sizes[name]
            image = downscaling.enlarge_image(image, size)
            classes, levels = (downscaling.enlarge(a, size) for a in (classes, levels))
        if self._overlays:
            picture = visualize.with_legend(image, classes, bundle.classes, bundle.palette)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            self._write_file(f"{output_folder.OVERLAYS}/{name}.jpg", buffer.getvalue())
        if self._probabilities:
            buffer = io.BytesIO()
            names = np.array(bundle.classes)
            np.savez_compressed(buffer, probabilities=levels, classes=names)
            self._write_file(f"{output_folder.PROBABILITIES}/{name}.npz", buffer.getvalue())
        self._write_file(f"{name}.png", image_io.encode_mask(classes, bundle.palette))


def _read_sizes(
    examples: Sequence[Example], on_read_error: input_pipeline.OnReadError
) -> dict[str, Size]:
    """Returns (height, width) in pixels by file, read from the headers of the readable files."""

    def read_size(example: Example) -> Size | None:
        try:
            check_name(example)
            return image_io.image_size(example.image)
        except UserError as error:
            on_read_error(example, error)
            return None

    with futures.ThreadPoolExecutor() as pool:
        sizes = zip(examples, pool.map(read_size, examples), strict=True)
        return {example.image: size for example, size in sizes if size is not None}
