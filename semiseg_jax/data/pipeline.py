"""Training batches from the two streams, and images for labelling and evaluation.

Every random choice is a pure function of (seed, stage, stream, step, position in the stream's
global batch). Nothing is carried from step to step, so that a run goes on from any step at no
cost, and the number of processes, devices or threads changes no pixel.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath
from jaxtyping import Bool, Int, Int32, Int64, UInt8

from semiseg_jax import distributed
from semiseg_jax.data import labels, sda, weak
from semiseg_jax.data.sources import Dataset, Example
from semiseg_jax.data.streams import Slots, Streams, slots
from semiseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """A process's part of one step's batch.

    Attributes:
        image: RGB, not normalised.
        label: class ids and IGNORE.
        is_pseudo: the label is a pseudo-label, whatever the stream.
        seed: what each view was drawn from; `view_draws` names the draws.
        ids: of the images, to name them when something goes wrong.
    """

    image: UInt8[np.ndarray, "n h w 3"]
    label: UInt8[np.ndarray, "n h w"]
    is_pseudo: Bool[np.ndarray, " n"]
    seed: Int64[np.ndarray, "n 2"]
    ids: tuple[str, ...]


def pseudo_examples(dataset: Dataset, folder: os.PathLike) -> tuple[Example, ...]:
    """The unlabelled images with their pseudo-labels from `folder`."""
    return tuple(
        dataclasses.replace(e, mask=os.fspath(epath.Path(folder) / f"{e.id}.png"))
        for e in dataset.unlabeled
    )


def train_batches(
    config: Any,
    dataset: Dataset,
    pseudo: Sequence[Example],
    streams: Streams,
    seed: Int[np.ndarray, "2"],
    steps: range,
    colour: UInt8[np.ndarray, "3"],
    groups: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[TrainBatch]:
    """This process's batches for the given steps.

    Args:
        config: the whole config; `data` and `sda` are read.
        dataset: its labelled examples, classes and id table are read.
        pseudo: pseudo-labelled examples, masks of class ids; empty where no stream takes any.
        streams: what each step takes.
        seed: of the stage, from `streams.stage_seed`.
        steps: which steps, from the one to go on at.
        colour: of the padding.
        groups: blocks of the joined batch, one a device.
        process_index, process_count: whose part.

    Raises:
        UserError: an image or mask is missing or damaged, or sizes differ.
    """
    places = slots(streams, groups, process_index, process_count)
    examples = {"labeled": list(dataset.labeled), "pseudo": list(pseudo)}
    for kind in {*streams.weak, *streams.strong}:
        if not examples[kind]:
            raise UserError(f"There is no {kind} image to train on: check the split.")
    reader = _Reader(examples["labeled"] + examples["pseudo"], dataset, len(examples["labeled"]))
    counts = {kind: len(part) for kind, part in examples.items()}
    count = len(places.strong)

    @tf.autograph.experimental.do_not_convert
    def element(number: tf.Tensor) -> dict[str, tf.Tensor]:
        step, place = number // count, number % count
        index = _example_index(places, step, place, seed, counts)
        image, label = reader(index)
        strong = tf.gather(places.strong, place)
        position = tf.gather(places.position, place)
        key = _fold(seed, 1, tf.cast(strong, tf.int64), step, position)
        image, label = augment(image, label, strong, key, config, colour)
        return {
            "image": image,
            "label": label,
            "is_pseudo": tf.gather(places.pseudo, place),
            "seed": key,
            "index": index,
        }

    numbers = reader.numbers(steps.start * count, steps.stop * count)
    elements = numbers.map(element, config.data.threads or tf.data.AUTOTUNE, deterministic=True)
    batches = elements.batch(count, drop_remainder=True).prefetch(config.data.prefetch)
    for batch in reader.sentences(batches.with_options(_options(config.data.threads))):
        ids = tuple(reader.examples[i].id for i in batch.pop("index"))
        yield TrainBatch(**batch, ids=ids)


def augment(
    image: tf.Tensor,
    label: tf.Tensor,
    strong: tf.Tensor,
    seed: tf.Tensor,
    config: Any,
    colour: UInt8[np.ndarray, "3"],
) -> tuple[tf.Tensor, tf.Tensor]:
    """One view of an image: weak augmentation, and SDA where `strong`.

    Args:
        image: uint8 [h, w, 3].
        label: uint8 [h, w].
        strong: bool scalar.
        seed: int [2].
        config: the whole config; `data` and `sda` are read.
        colour: of the padding, which SDA never sees.

    Returns:
        image uint8 [crop, 3] and label uint8 [crop].
    """
    geometry_seed, sda_seed = _fold(seed, 0), _fold(seed, 1)

    def strongly(view: tf.Tensor) -> tf.Tensor:
        return tf.cond(strong, lambda: sda.strong_augment(view, sda_seed, config.sda), lambda: view)

    if config.sda.before_geometry:
        image = strongly(image)
    image, label, place = weak.random_crop(image, label, geometry_seed, config.data)
    if not config.sda.before_geometry:
        image = strongly(image)
    return weak.pad(image, label, place, tuple(config.data.crop), colour)


def view_draws(
    seed: Int64[np.ndarray, "2"], strong: bool, size: tuple[int, int], config: Any
) -> tuple[weak.Geometry, list[tuple[str, sda.Magnitude]]]:
    """What `augment` draws with a seed: the geometry, and the operations in order.

    Args:
        seed: of the view, from `TrainBatch.seed`.
        strong: the view is of the strong stream.
        size: (height, width) of the image in pixels.
        config: the whole config; `data` and `sda` are read.
    """
    geometry = weak.draw(tf.constant(size), _fold(seed, 0), config.data)
    return geometry, sda.drawn(_fold(seed, 1), config.sda) if strong else []


def _example_index(
    places: Slots,
    step: tf.Tensor,
    place: tf.Tensor,
    seed: Int[np.ndarray, "2"],
    counts: dict[str, int],
) -> tf.Tensor:
    """Which example stands at a place of a step: a random-access shuffle, new each epoch."""
    strong, pseudo = tf.gather(places.strong, place), tf.gather(places.pseudo, place)
    per_step, rank = tf.gather(places.per_step, place), tf.gather(places.rank, place)
    size = tf.where(pseudo, tf.constant(counts["pseudo"], tf.int64), counts["labeled"])
    drawn = step * per_step + rank
    order = 2 * tf.cast(strong, tf.int64) + tf.cast(pseudo, tf.int64)
    key = _fold(seed, 0, order, drawn // size)
    # int64 sizes need an int64 seed in this op.
    shuffled = tf.random.experimental.index_shuffle(drawn % size, key, size - 1)
    return shuffled + tf.where(pseudo, tf.constant(counts["labeled"], tf.int64), 0)


def _fold(seed: tf.Tensor | np.ndarray, *data: tf.Tensor | int) -> tf.Tensor:
    """A seed [2] int64 that depends on all of `data`."""
    folded = tf.cast(tf.convert_to_tensor(seed), tf.int64)
    for value in data:
        folded = tf.random.experimental.stateless_fold_in(folded, tf.cast(value, tf.int64))
    return folded


# Takes an example that cannot be read, and why; called from the threads that read.
Broken = Callable[[Example, UserError], None]


class _Reader:
    """Reads examples inside tf.data, and turns what goes wrong there into its one sentence.

    Masks of the examples from `first_of_ours` on are class ids; those before, the data set's own.
    With `broken`, an example that cannot be read is told to it and has no pixel; the rest goes on.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dataset: Dataset,
        first_of_ours: int,
        broken: Broken | None = None,
    ):
        self.examples = list(examples)
        self._broken = broken
        self._tables = (dataset.table, labels.id_table(len(dataset.classes)))
        self._first_of_ours = first_of_ours
        self._error: UserError | None = None
        self._stopped = tf.Variable(False, trainable=False)

    def __call__(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(image uint8 [h, w, 3], label uint8 [h, w]) of the example at an index."""
        image, label = tf.numpy_function(self._read, [index], (tf.uint8, tf.uint8))
        return tf.ensure_shape(image, (None, None, 3)), tf.ensure_shape(label, (None, None))

    def _read(self, index: np.integer) -> tuple[np.ndarray, np.ndarray]:
        example = self.examples[int(index)]
        try:
            image = labels.read_image(example.image)
            if example.mask is None:
                return image, np.full(image.shape[:2], labels.IGNORE, np.uint8)
            # Pseudo-labels are written as class ids, whatever the data set's own values are.
            label = labels.read_mask(example.mask, self._tables[int(index) >= self._first_of_ours])
            if label.shape != image.shape[:2]:
                raise UserError(
                    f"{example.mask} and {example.image} differ in size: they must be of one size."
                )
            return image, label
        except UserError as error:
            if self._broken is not None:
                self._broken(example, error)
                return np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)
            # tf.data wraps an exception into a page of text; the sentence is kept beside it.
            self._error = error
            raise

    def numbers(self, start: int, stop: int) -> tf.data.Dataset:
        """start … stop - 1, to read by; fewer where `sentences` is left before its end."""
        running = tf.autograph.experimental.do_not_convert(lambda _: ~self._stopped)
        return tf.data.Dataset.range(start, stop).take_while(running)

    def sentences(self, dataset: tf.data.Dataset) -> Generator[Any]:
        """The data set's elements as numpy; a reading error as the UserError it was."""
        iterator = dataset.as_numpy_iterator()
        try:
            while True:
                try:
                    element = next(iterator)
                except StopIteration:
                    return
                except tf.errors.OpError as error:
                    if self._error is None:
                        raise
                    raise self._error from error
                yield element
        finally:
            self._drain(iterator)

    def _drain(self, iterator: Iterator[Any]) -> None:
        """Lets the reads that are under way end.

        TensorFlow destroys an iterator holding Python's lock, and waits for its reads, which wait
        for that lock: an iterator that is dropped while it reads never returns.
        """
        with tf.init_scope():  # a generator may be collected while some graph is traced
            self._stopped.assign(True)
            while True:
                try:
                    next(iterator)
                except StopIteration:
                    return
                except tf.errors.OpError:
                    continue


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    if threads:
        options.threading.private_threadpool_size = threads
    return options


# (height, width) in pixels.
Size = tuple[int, int]

# A set with no more sizes than this is seen in exactly those, a program compiled for each.
MAX_EXACT_SIZES = 8


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Whole images, padded at the right and the bottom to one size; the tail with empty ones.

    Attributes:
        image: RGB.
        label: class ids and IGNORE; IGNORE throughout where there is no mask, and in the padding.
        ids: of the real images, at most as many as the batch holds.
        sizes: (height, width) of each image in pixels, without padding; 0 of empty ones.
        total: real images of the batch in all processes, of which this is one's part.
    """

    image: UInt8[np.ndarray, "n h w 3"]
    label: UInt8[np.ndarray, "n h w"]
    ids: tuple[str, ...]
    sizes: Int32[np.ndarray, "n 2"]
    total: int


def image_sizes(examples: Sequence[Example]) -> list[Size]:
    """(height, width) of each image in pixels, from the files' headers.

    Each process reads those of its share.

    Raises:
        UserError: an image is missing or damaged.
    """
    with futures.ThreadPoolExecutor() as pool:
        mine = list(pool.map(lambda e: labels.image_size(e.image), distributed.share(examples)))
    return [(h, w) for h, w in distributed.gather_shares("sizes of images", mine)]


def padding_for(examples: Sequence[Example], pad_to: int) -> int:
    """What the sides of these images are padded to multiples of: `pad_to`, or 1 for no padding.

    Every size of image is a program to compile. A set with few sizes is seen as it is; one with
    many is padded to few. Only the files' headers are read.

    Args:
        examples: a whole set.
        pad_to: in pixels; 1 for no padding, however many sizes there are.
    """
    if pad_to == 1:
        return 1
    return 1 if len(set(image_sizes(examples))) <= MAX_EXACT_SIZES else pad_to


def batches_of_one_size(
    sizes: Sequence[Size], padded: Callable[[Size], Size], batch_size: Callable[[Size], int]
) -> list[tuple[Size, list[int]]]:
    """Which images make a batch: (padded size, their indices), each image once.

    Images of a padded size wait until a batch of it is full; the rest comes at the end.
    """
    batches = []
    waiting: dict[Size, list[int]] = {}
    for i, size in enumerate(map(padded, sizes)):
        group = waiting.setdefault(size, [])
        group.append(i)
        if len(group) == batch_size(size):
            batches.append((size, waiting.pop(size)))
    return [*batches, *waiting.items()]


def image_batches(
    examples: Sequence[Example],
    dataset: Dataset,
    batch_size: int,
    pad_to: int,
    colour: UInt8[np.ndarray, "3"],
) -> Iterator[ImageBatch]:
    """Whole, clean images in batches of `batch_size`, each batch of one padded size.

    Every example occurs exactly once, in the batches of `batches_of_one_size`; what is not full is
    filled up with empty images, labelled IGNORE. Each process reads and yields its part of every
    batch, so that all have the same number of them.

    Args:
        examples: what to read.
        dataset: its id table is read.
        batch_size: images in a batch of all processes, a multiple of their number.
        pad_to: sides are padded to multiples of it, in pixels (see `padding_for`).
        colour: of the padding.

    Raises:
        UserError: an image or mask is missing or damaged, or sizes differ.
    """

    def padded(size: Size) -> Size:
        height, width = (-(-side // pad_to) * pad_to for side in size)
        return height, width

    sizes = image_sizes(examples)
    return batches_by_size(examples, sizes, dataset, padded, lambda _: batch_size, colour)


def batches_by_size(
    examples: Sequence[Example],
    sizes: Sequence[Size],
    dataset: Dataset,
    padded: Callable[[Size], Size],
    batch_size: Callable[[Size], int],
    colour: UInt8[np.ndarray, "3"],
    broken: Broken | None = None,
) -> Iterator[ImageBatch]:
    """As `image_batches`, with sizes and counts as one likes.

    Args:
        examples, dataset, colour: as there.
        sizes: (height, width) of each image in pixels.
        padded: the (height, width) that an image of a (height, width) is padded to.
        batch_size: images in a batch of all processes, by their padded size.
        broken: takes the examples that cannot be read, which are left out.

    Raises:
        UserError: as there, unless `broken` takes it.
    """
    batches = batches_of_one_size(sizes, padded, batch_size)
    each = {size: batch_size(size) // distributed.count() for size, _ in batches}

    def mine(size: Size, indices: Sequence[int]) -> Sequence[int]:
        return indices[distributed.index() * each[size] :][: each[size]]

    order = [examples[i] for size, indices in batches for i in mine(size, indices)]
    reader = _Reader(order, dataset, len(order), broken)
    numbers = reader.numbers(0, len(order))
    read = tf.autograph.experimental.do_not_convert(reader)
    ahead = max(each.values(), default=1)
    elements = numbers.map(read, tf.data.AUTOTUNE, deterministic=True).prefetch(ahead)
    with contextlib.closing(reader.sentences(elements.with_options(_options(0)))) as views:
        for size, indices in batches:
            group = [(examples[i], *next(views)) for i in mine(size, indices)]
            whole = [(e, image, label) for e, image, label in group if label.size]
            yield _joined(whole, size, each[size], len(indices), colour)


def _joined(
    group: list[tuple[Example, np.ndarray, np.ndarray]],
    size: Size,
    batch_size: int,
    total: int,
    colour: UInt8[np.ndarray, "3"],
) -> ImageBatch:
    images = np.empty((batch_size, *size, 3), np.uint8)
    images[:] = colour
    masks = np.full((batch_size, *size), labels.IGNORE, np.uint8)
    sizes = np.zeros((batch_size, 2), np.int32)
    for i, (example, image, label) in enumerate(group):
        height, width = sizes[i] = label.shape
        if height > size[0] or width > size[1]:
            raise UserError(f"{example.image} was changed while it was read: start again.")
        images[i, :height, :width], masks[i, :height, :width] = image, label
    return ImageBatch(images, masks, tuple(e.id for e, *_ in group), sizes, total)
