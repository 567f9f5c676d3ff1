"""Label maps of any images by a run's model: what is read, how it is seen, what is written.

    OUTPUT/predictions.json            by which model and protocol; what could not be read
    OUTPUT/NAME.png                    class ids, with the classes' colours as palette
    OUTPUT/overlays/NAME.jpg           the image with these colours over it, and their legend
    OUTPUT/probabilities/NAME.npz      where they are asked for

NAME is the image's path below the input folder, without its ending.
"""

import dataclasses
import functools
import io
import itertools
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

from semiseg_jax import interruption, provenance, seeing
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import labels, pictures, pipeline
from semiseg_jax.data.examples import Dataset, Example
from semiseg_jax.data.inputs import RECORD
from semiseg_jax.data.pipeline import ImageBatch, Size
from semiseg_jax.deployed import Deployed
from semiseg_jax.errors import UserError
from semiseg_jax.inference import Predictor, one_behind

OVERLAYS, PROBABILITIES = "overlays", "probabilities"
# A damaged header can say anything; this is more than any camera or scanner makes.
MOST_PIXELS = 2**29


@dataclasses.dataclass(frozen=True)
class _Large:
    """An image that is seen in tiles, and what is known of it so far."""

    id: str
    image: pictures.Picture
    classes: UInt8[np.ndarray, "h w"]
    levels: UInt8[np.ndarray, "h w classes"]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """A few tiles of one large image; what fills the batch is empty."""

    of: _Large
    image: UInt8[np.ndarray, "n th tw 3"]
    places: Sequence[tuple[seeing.Span, ...]]
    last: bool


class Writer:
    """Predicts images and writes what is seen in them."""

    def __init__(
        self,
        deployed: Deployed,
        protocol: seeing.Protocol,
        mesh: Mesh,
        output: epath.PathLike,
        overlays: bool = True,
        probabilities: bool = False,
    ):
        self._deployed = deployed
        self._protocol = protocol
        self._mesh = mesh
        self._output = epath.Path(output)
        self._overlays = overlays
        self._probabilities = probabilities
        self._predictor = Predictor(
            deployed.model,
            mesh,
            protocol.scales,
            protocol.flip,
            window=protocol.window,
            window_stride=protocol.window_stride,
        )
        self._variables = jax.device_put(deployed.variables, mesh_lib.replicated(mesh))
        self._decide = jax.jit(self._most_likely)

    def __call__(
        self,
        examples: Sequence[Example],
        progress: Callable[[int], None] = lambda count: None,
        asked: interruption.Asked = interruption.never,
    ) -> dict[str, str]:
        """Writes what is seen in each image; files of an earlier call are written over.

        Args:
            examples: the images, of which the ids are the names to write.
            progress: called with how many more images are done, broken ones included.
            asked: whether to stop.

        Returns:
            Of the images that cannot be read: why, by file.

        Raises:
            UserError: the output folder cannot be written.
            Interrupted: that was asked for; what is written stays.
        """
        self._record({"ended": False})
        labels.remove_leftovers(self._output)
        broken: dict[str, str] = {}

        def note(example: Example, error: UserError) -> None:
            broken[example.image] = str(error)
            progress(1)

        known = _read_sizes(examples, note)
        sizes = seeing.Sizes(list(known.values()), self._deployed, self._protocol, self._mesh.size)
        seen = {image: sizes.seen(size) for image, size in known.items()}
        # By size, so that few images wait for others of their size to fill a batch.
        ordered = sorted(
            (e for e in examples if e.image in known),
            key=lambda e: (sizes.padded(seen[e.image]), e.id),
        )
        whole = [e for e in ordered if seen[e.image] == known[e.image]]
        large = [e for e in ordered if seen[e.image] != known[e.image]]
        for batch in one_behind(
            self._batches(whole, known, sizes, note), self._start, self._write_batch, asked
        ):
            progress(len(batch.ids))
        for part in one_behind(
            self._tiles(large, sizes, note), self._start, self._write_tiles, asked
        ):
            progress(int(part.last))
        # Threads found them, in any order; the record is the same each time.
        broken = dict(sorted(broken.items()))
        self._record({"ended": True, "images": len(examples) - len(broken), "broken": broken})
        return broken

    def _record(self, how: dict[str, Any]) -> None:
        """Says in the output folder whose predictions these are; an early test of writing, too."""
        deployed = self._deployed
        content = {
            "classes": list(deployed.classes),
            "palette": [list(colour) for colour in deployed.palette],
            "protocol": dataclasses.asdict(self._protocol),
            "as_evaluated": self._protocol == seeing.as_evaluated(deployed, self._mesh.size),
            "model": {k: deployed.description[k] for k in ("trained_on", "miou", "protocol")},
            "code_version": provenance.code_version(),
        }
        text = json.dumps(content | how, indent=1) + "\n"
        labels.write_bytes(self._output / RECORD, text.encode())

    def _batches(
        self,
        examples: Sequence[Example],
        known: Mapping[str, Size],
        sizes: seeing.Sizes,
        note: pipeline.Broken,
    ) -> Iterator[ImageBatch]:
        """Images that are seen whole."""
        deployed = self._deployed
        table = labels.id_table(len(deployed.classes))
        dataset = Dataset("", deployed.classes, deployed.palette, table, (), tuple(examples), ())
        return pipeline.batches_by_size(
            examples,
            [known[e.image] for e in examples],
            dataset,
            sizes.padded,
            sizes.batch,
            deployed.colour,
            note,
        )

    def _tiles(
        self, examples: Sequence[Example], sizes: seeing.Sizes, note: pipeline.Broken
    ) -> Iterator[_Tiles]:
        """Images that are seen in tiles, one after the other."""
        num_classes = len(self._deployed.classes) if self._probabilities else 0
        for example in examples:
            try:
                image = labels.read_image(example.image)
            except UserError as error:
                note(example, error)
                continue
            size = image.shape[:2]
            levels = np.zeros((*size, num_classes), np.uint8)
            of = _Large(example.id, image, np.zeros(size, np.uint8), levels)
            tile = sizes.seen(size)
            padded = sizes.padded(tile)
            places = list(itertools.product(*map(seeing.spans, size, tile)))
            count = sizes.batch(padded)
            for first in range(0, len(places), count):
                some = places[first : first + count]
                pixels = np.empty((count, *padded, 3), np.uint8)
                pixels[:] = self._deployed.colour
                for i, (down, across) in enumerate(some):
                    rows = slice(down.start, down.start + tile[0])
                    columns = slice(across.start, across.start + tile[1])
                    pixels[i, : tile[0], : tile[1]] = image[rows, columns]
                yield _Tiles(of, pixels, some, last=first + count >= len(places))

    def _start(self, batch: ImageBatch | _Tiles) -> tuple[Array, Array]:
        """Sets the devices to work on a batch."""
        images = mesh_lib.to_devices({"image": batch.image}, self._mesh)["image"]
        return self._decide(self._predictor(self._variables, images))

    def _most_likely(
        self, probabilities: Float[Array, "n h w classes"]
    ) -> tuple[UInt8[Array, "n h w"], UInt8[Array, "n h w _"]]:
        """Class ids as evaluation decides on them; and, if asked for, probabilities as 0..255."""
        classes = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
        levels = jnp.round(255 * probabilities).astype(jnp.uint8)
        return classes, levels if self._probabilities else levels[..., :0]

    def _write_batch(
        self, batch: ImageBatch, decided: tuple[Array, Array]
    ) -> Iterator[Callable[[], None]]:
        classes, levels = (np.asarray(part) for part in decided)
        for i, name in enumerate(batch.ids):
            height, width = batch.sizes[i]
            cut = (i, slice(height), slice(width))
            yield functools.partial(self._write, name, batch.image[cut], classes[cut], levels[cut])

    def _write_tiles(
        self, part: _Tiles, decided: tuple[Array, Array]
    ) -> Iterable[Callable[[], None]]:
        """Each tile decides on its middle; with an image's last ones there is a file to write."""
        of = part.of
        for places, *seen in zip(part.places, *map(np.asarray, decided), strict=False):
            here = tuple(slice(p.low, p.high) for p in places)
            in_tile = tuple(slice(p.low - p.start, p.high - p.start) for p in places)
            for whole, tile in zip((of.classes, of.levels), seen, strict=True):
                whole[here] = tile[in_tile]
        if not part.last:
            return []
        return [functools.partial(self._write, of.id, of.image, of.classes, of.levels)]

    def _write(
        self,
        name: str,
        image: pictures.Picture,
        classes: UInt8[np.ndarray, "h w"],
        levels: UInt8[np.ndarray, "h w _"],
    ) -> None:
        """The files of an image, its label map last."""
        deployed = self._deployed
        if self._overlays:
            picture = pictures.with_legend(image, classes, deployed.classes, deployed.palette)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            labels.write_bytes(
                self._output / OVERLAYS / f"{name}.jpg", buffer.getvalue(), sync=False
            )
        if self._probabilities:
            buffer = io.BytesIO()
            names = np.array(deployed.classes)
            np.savez_compressed(buffer, probabilities=levels, classes=names)
            labels.write_bytes(
                self._output / PROBABILITIES / f"{name}.npz", buffer.getvalue(), sync=False
            )
        png = labels.encode_mask(classes, deployed.palette)
        labels.write_bytes(self._output / f"{name}.png", png, sync=False)


def _read_sizes(examples: Sequence[Example], note: pipeline.Broken) -> dict[str, Size]:
    """(height, width) by file, from the headers alone; files without a sound one are noted."""

    def read(example: Example) -> Size | None:
        try:
            height, width = labels.image_size(example.image)
            if height * width > MOST_PIXELS:
                raise UserError(
                    f"{example.image} is {width}x{height} by its header, more than the "
                    f"{MOST_PIXELS:,} pixels that are read: cut it into parts, if it is no damage."
                )
        except UserError as error:
            note(example, error)
            return None
        return height, width

    with futures.ThreadPoolExecutor() as pool:
        found = zip(examples, pool.map(read, examples), strict=True)
        return {example.image: size for example, size in found if size is not None}
