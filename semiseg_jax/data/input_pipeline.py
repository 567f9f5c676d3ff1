"""Input pipelines: training batches of both streams and of views, and batches of whole images.

Every random choice is a pure function of (seed, stage, stream, step, position in the stream's
global batch). The pipeline has no state between steps. Hence a run resumes at any step at no
cost, and no pixel depends on the number of processes, devices or threads.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float64, Int, Int32, Int64, UInt8

from semiseg_jax.data import image_io, label_maps, sda, view_augment, weak_augment
from semiseg_jax.data.batch_layout import BatchLayout, BatchSpec, lay_out_batch, lay_out_unlabeled
from semiseg_jax.data.load import Dataset, Example
from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.losses import balanced_class_weights
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.shape_buckets import Size, pad_size


@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """A process's shard of one step's batch.

    Attributes:
        image: RGB, not normalised.
        label: class ids and IGNORE.
        is_pseudo: whether the image is pseudo-labelled, in either stream.
        seed: random seed of each view; `sample_view` returns the values drawn from it.
        ids: ids of the images, for error reports.
        views: the views of the unlabelled images by `BatchSpec.views`, the weak one first; None for
            a stage without views.
        valid: which pixels of each unlabelled image are not padding, in all its views; None without
            views.
        unlabeled_ids: ids of the unlabelled images.
        features: the backbone's features of the weak images of the shard, in their order, arrays
            [k, ...] in a `segmenter.Features`; None unless they are cached.
    """

    image: UInt8[np.ndarray, "n h w 3"]
    label: UInt8[np.ndarray, "n h w"]
    is_pseudo: Bool[np.ndarray, " n"]
    seed: Int64[np.ndarray, "n 2"]
    ids: tuple[str, ...]
    views: UInt8[np.ndarray, "m v h w 3"] | None = None
    valid: Bool[np.ndarray, "m h w"] | None = None
    unlabeled_ids: tuple[str, ...] = ()
    features: Any = None

    def arrays(self) -> dict[str, Any]:
        """Returns the arrays that a step takes, by name; "features" is a tree of arrays."""
        arrays: dict[str, Any] = {
            "image": self.image,
            "label": self.label,
            "is_pseudo": self.is_pseudo,
        }
        if self.views is not None and self.valid is not None:
            arrays |= {"views": self.views, "valid": self.valid}
        if self.features is not None:
            arrays["features"] = self.features
        return arrays


def pseudo_examples(dataset: Dataset, folder: os.PathLike) -> tuple[Example, ...]:
    """Returns the unlabelled examples with the pseudo-labels in `folder` as their masks."""
    return tuple(
        dataclasses.replace(
            e, mask=os.fspath(epath.Path(folder) / f"{e.id}.png"), label_kind="pseudo"
        )
        for e in dataset.unlabeled
    )


def train_batches(
    config: Any,
    dataset: Dataset,
    pseudo: Sequence[Example],
    spec: BatchSpec,
    seed: Int[np.ndarray, "2"],
    steps: range,
    pad_value: UInt8[np.ndarray, "3"],
    groups: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[TrainBatch]:
    """Yields this process's shard of the batch of each step.

    Args:
        config: the whole config; `data` and `sda` are read, with views also `method.views`.
        dataset: its labelled examples, classes and id table are read, with views also its
            unlabelled examples.
        pseudo: pseudo-labelled examples; may be empty if no stream holds any.
        spec: composition of each batch.
        seed: seed of the stage, from `stages.stage_seed`.
        steps: the steps to yield; a resumed run starts at a later step.
        pad_value: RGB of the padding.
        groups: blocks of the global batch, one per device.
        process_index, process_count: which shard.

    Raises:
        UserError: an image or mask is missing or damaged, or their sizes differ.
    """
    layout = lay_out_batch(spec, groups, process_index, process_count)
    examples = {
        "labeled": list(dataset.labeled),
        "pseudo": list(pseudo),
        "unlabeled": list(dataset.unlabeled) if spec.views else [],
    }
    for kind in {*spec.weak, *spec.strong, *(("unlabeled",) if spec.views else ())}:
        if not examples[kind]:
            raise UserError(
                f"There is no {kind} image to train on: check the split.",
                code="train-images-missing",
            )
    reader = _Reader(list(itertools.chain(*examples.values())), dataset)
    counts = {kind: len(examples[kind]) for kind in examples}
    class_weights = _crop_weights(config, dataset)
    shard_size = len(layout.strong)

    @tf.autograph.experimental.do_not_convert
    def load_view(number: tf.Tensor) -> dict[str, tf.Tensor]:
        step, slot = number // shard_size, number % shard_size
        index = _example_index(layout, step, slot, seed, counts)
        image, label = reader(index)
        strong = tf.gather(layout.strong, slot)
        position = tf.gather(layout.position, slot)
        view_seed = _fold_in(seed, 1, tf.cast(strong, tf.int64), step, position)
        is_pseudo = tf.gather(layout.pseudo, slot)
        weights = tf.where(is_pseudo, tf.zeros_like(class_weights), class_weights)
        image, label = augment(image, label, strong, view_seed, config, pad_value, weights)
        return {
            "image": image,
            "label": label,
            "is_pseudo": is_pseudo,
            "seed": view_seed,
            "index": index,
        }

    def in_batches(load: Callable[[tf.Tensor], dict[str, tf.Tensor]], size: int) -> tf.data.Dataset:
        numbers = reader.index_range(steps.start * size, steps.stop * size)
        loaded = numbers.map(load, config.data.threads or tf.data.AUTOTUNE, deterministic=True)
        return loaded.batch(size, drop_remainder=True)

    batches = in_batches(load_view, shard_size)
    if spec.views:
        positions = lay_out_unlabeled(spec, groups, process_index, process_count)
        first = counts["labeled"] + counts["pseudo"]
        load_views = _view_loader(
            reader, positions, spec, seed, config, pad_value, range(first, len(reader.examples))
        )
        both = tf.data.Dataset.zip(batches, in_batches(load_views, len(positions)))
        batches = both.map(tf.autograph.experimental.do_not_convert(lambda a, b: a | b))
    batches = batches.prefetch(config.data.prefetch)
    for batch in reader.iterate(batches.with_options(_options(config.data.threads))):
        ids, unlabeled_ids = (
            tuple(reader.examples[i].id for i in batch.pop(key, ()))
            for key in ("index", "unlabeled_index")
        )
        yield TrainBatch(**batch, ids=ids, unlabeled_ids=unlabeled_ids)


def _view_loader(
    reader: "_Reader",
    positions: Int[np.ndarray, " m"],
    spec: BatchSpec,
    seed: Int[np.ndarray, "2"],
    config: Any,
    pad_value: UInt8[np.ndarray, "3"],
    indices: range,
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the function that loads the views of an unlabelled image, from its number.

    Args:
        reader: reads the images.
        positions: of the images of the shard in the global batch.
        spec, seed, config, pad_value: as in `train_batches`.
        indices: the unlabelled examples of the reader.
    """
    assert spec.views is not None
    views, num_positions = spec.views, len(positions)

    @tf.autograph.experimental.do_not_convert
    def load_views(number: tf.Tensor) -> dict[str, tf.Tensor]:
        step, position = number // num_positions, tf.gather(positions, number % num_positions)
        index = indices.start + _unlabeled_index(step, position, spec, seed, len(indices))
        image, _ = reader(index)
        image_seed = _fold_in(seed, 1, 2, step, position)
        color_seed = _fold_in(image_seed, 1)
        if config.method.views.per_batch:
            color_seed = _fold_in(seed, 2, step)
        stack, valid = view_augment.augment_views(
            image, views, _fold_in(image_seed, 0), color_seed, config, pad_value
        )
        return {"views": stack, "valid": valid, "unlabeled_index": index}

    return load_views


def augment(
    image: tf.Tensor,
    label: tf.Tensor,
    strong: tf.Tensor,
    seed: tf.Tensor,
    config: Any,
    pad_value: UInt8[np.ndarray, "3"],
    class_weights: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns one view of an image: weak augmentation and, if `strong`, SDA (section 2.1).

    Args:
        image: uint8 [h, w, 3].
        label: uint8 [h, w].
        strong: bool [].
        seed: int [2].
        config: the whole config; `data` and `sda` are read.
        pad_value: RGB of the padding, which SDA never changes.
        class_weights: with `data.balance_crops`, the weights of `weak_augment.around_rare`, all 0
            for pseudo-labelled images; float64 [classes].

    Returns:
        image uint8 [crop, 3] and label uint8 [crop].
    """
    geometry_seed, sda_seed = _fold_in(seed, 0), _fold_in(seed, 1)

    def augment_if_strong(view: tf.Tensor) -> tf.Tensor:
        return tf.cond(strong, lambda: sda.strong_augment(view, sda_seed, config.sda), lambda: view)

    if config.sda.before_geometry:
        image = augment_if_strong(image)
    geometry = weak_augment.draw_view(tf.shape(label), strong, geometry_seed, config.data)
    if config.data.balance_crops and class_weights is not None:
        geometry = weak_augment.around_rare(geometry, label, class_weights, _fold_in(seed, 2))
    image, label, offset = weak_augment.crop(image, label, geometry)
    if not config.sda.before_geometry:
        image = augment_if_strong(image)
    return weak_augment.pad(image, label, offset, tuple(config.data.crop), pad_value)


def sample_view(
    seed: Int64[np.ndarray, "2"], strong: bool, size: tuple[int, int], config: Any
) -> tuple[weak_augment.Geometry, list[tuple[str, sda.Magnitude]]]:
    """Returns what `augment` draws from a seed: the geometry, and the operations in order.

    With `data.balance_crops` the label of an image moves its crop: the corner is another then.

    Args:
        seed: seed of the view, from `TrainBatch.seed`.
        strong: whether the view belongs to the strong stream.
        size: (height, width) of the image in pixels.
        config: the whole config; `data` and `sda` are read.
    """
    geometry = weak_augment.draw_view(tf.constant(size), strong, _fold_in(seed, 0), config.data)
    return geometry, sda.sample_ops(_fold_in(seed, 1), config.sda) if strong else []


def _crop_weights(config: Any, dataset: Dataset) -> Float64[np.ndarray, " classes"]:
    """Returns the weights by which classes are drawn for crops; 0 without `data.balance_crops`."""
    if not config.data.balance_crops:
        return np.zeros(len(dataset.classes))
    pixels = np.array(dataset.labeled_pixels, np.int64)
    weights = balanced_class_weights(pixels, dataset.classes, absent="zero")
    return np.asarray(weights, np.float64)


def _example_index(
    layout: BatchLayout,
    step: tf.Tensor,
    slot: tf.Tensor,
    seed: Int[np.ndarray, "2"],
    counts: dict[str, int],
) -> tf.Tensor:
    """Returns the index of the example in a slot of a step's shard, int64 [].

    Each kind of image in each stream runs through its examples in a random-access shuffle with
    another order in every epoch.
    """
    strong, pseudo = tf.gather(layout.strong, slot), tf.gather(layout.pseudo, slot)
    per_step, rank = tf.gather(layout.per_step, slot), tf.gather(layout.rank, slot)
    size = tf.where(pseudo, tf.constant(counts["pseudo"], tf.int64), counts["labeled"])
    number = step * per_step + rank
    sequence = 2 * tf.cast(strong, tf.int64) + tf.cast(pseudo, tf.int64)
    epoch_seed = _fold_in(seed, 0, sequence, number // size)
    # With an int64 size, index_shuffle requires an int64 seed.
    shuffled = tf.random.experimental.index_shuffle(number % size, epoch_seed, size - 1)
    return shuffled + tf.where(pseudo, tf.constant(counts["labeled"], tf.int64), 0)


def _unlabeled_index(
    step: tf.Tensor,
    position: tf.Tensor,
    spec: BatchSpec,
    seed: Int[np.ndarray, "2"],
    size: int,
) -> tf.Tensor:
    """Returns the index of the unlabelled example at a position of the global batch, int64 [].

    The examples are in another order in every epoch. Neighbours in the sequence of all epochs
    differ if there are at least two examples, so that the partner of an image is another image.
    With partners from the same image, the sequence has one entry for each pair.
    """
    assert spec.views is not None
    per_step = spec.batch_unlabeled
    if spec.views.partner == "same_image":
        per_step, position = per_step // 2, position // 2
    number = step * per_step + position
    if size <= 2:
        return number % size  # Two examples take turns: there is no other order.

    def shuffled(place: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        return tf.random.experimental.index_shuffle(
            tf.cast(place, tf.int64), _fold_in(seed, 0, 4, epoch), tf.constant(size - 1, tf.int64)
        )

    place, epoch = number % size, number // size
    # The last example of an epoch may come first in the next one, which then exchanges its first
    # two. Its last is another, so that the exchange affects no further epoch.
    repeats = shuffled(tf.zeros_like(place), epoch) == shuffled(
        tf.fill(tf.shape(place), tf.constant(size - 1, tf.int64)), epoch - 1
    )
    return shuffled(tf.where(repeats & (place < 2), 1 - place, place), epoch)


def _fold_in(seed: tf.Tensor | np.ndarray, *data: tf.Tensor | int) -> tf.Tensor:
    """Returns a seed, int64 [2], that is a function of `seed` and of all integers in `data`."""
    folded = tf.cast(tf.convert_to_tensor(seed), tf.int64)
    for value in data:
        folded = tf.random.experimental.stateless_fold_in(folded, tf.cast(value, tf.int64))
    return folded


# Called with an unreadable example and its error, from the reading threads.
OnReadError = Callable[[Example, UserError], None]


class _Reader:
    """Reads examples inside tf.data and raises read errors as UserErrors outside of it.

    With `on_read_error`, the callback receives each unreadable example; the example gets an image
    and a label without pixels, and reading continues.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dataset: Dataset,
        on_read_error: OnReadError | None = None,
        downscale: int = 1,
    ):
        self.examples = list(examples)
        self._on_read_error = on_read_error
        self._downscale = downscale
        # Pseudo-labels hold class ids, whatever the mask values of the data set are.
        self._tables = {"true": dataset.table, "pseudo": image_io.id_table(len(dataset.classes))}
        self._mask_format = dataset.mask_format
        self._error: UserError | None = None
        self._stopped = tf.Variable(False, trainable=False)

    def __call__(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (image uint8 [h, w, 3], label uint8 [h, w]) of the example at an index."""
        image, label = tf.numpy_function(self._read, [index], (tf.uint8, tf.uint8))
        return tf.ensure_shape(image, (None, None, 3)), tf.ensure_shape(label, (None, None))

    def _read(self, index: np.integer) -> tuple[np.ndarray, np.ndarray]:
        example = self.examples[int(index)]
        try:
            image = shrink_image(image_io.read_image(example.image), self._downscale)
            if example.mask is None or example.label_kind is None:
                return image, np.full(image.shape[:2], image_io.IGNORE, np.uint8)
            table = self._tables[example.label_kind]
            if example.label_kind == "pseudo":
                label = label_maps.read(example.mask, example.id, table)
            else:
                label = image_io.read_mask(example.mask, table, self._mask_format)
            if label.shape != image.shape[:2]:
                raise UserError(
                    f"{example.mask} and {example.image} differ in size: they must be of one size.",
                    code="mask-size-changed",
                )
            return image, label
        except UserError as error:
            if self._on_read_error is not None:
                self._on_read_error(example, error)
                return np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)
            # tf.data raises its own exception with a page of text; `iterate` raises this one.
            self._error = error
            raise

    def index_range(self, start: int, stop: int) -> tf.data.Dataset:
        """Returns the numbers start … stop - 1; they end early when `iterate` is closed early."""
        running = tf.autograph.experimental.do_not_convert(lambda _: ~self._stopped)
        return tf.data.Dataset.range(start, stop).take_while(running)

    def iterate(self, dataset: tf.data.Dataset) -> Generator[Any]:
        """Yields the elements of a data set as NumPy arrays; raises read errors as UserErrors."""
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
        """Waits until the reads in progress have ended.

        When TensorFlow destroys an iterator, it holds Python's global interpreter lock and waits
        for the reads in progress, which wait for that lock. Dropping an iterator during a read
        therefore deadlocks.
        """
        with tf.init_scope():  # The generator may be closed while a graph is traced.
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


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """A process's shard of a batch of whole images, padded to one size at the right and bottom.

    A shard that is not full ends with empty images.

    Attributes:
        image: RGB.
        label: class ids and IGNORE; all IGNORE for images without a mask, and in the padding.
        ids: ids of the images without the empty ones.
        sizes: (height, width) of each image in pixels, without padding; 0 for empty images.
        total: number of images of the batch in all processes, without the empty ones.
    """

    image: UInt8[np.ndarray, "n h w 3"]
    label: UInt8[np.ndarray, "n h w"]
    ids: tuple[str, ...]
    sizes: Int32[np.ndarray, "n 2"]
    total: int


def image_sizes(examples: Sequence[Example]) -> list[Size]:
    """Returns (height, width) of each image in pixels, from the headers of the files.

    Each process reads its shard of the files; all processes return all sizes.

    Raises:
        UserError: an image is missing or damaged.
    """
    with futures.ThreadPoolExecutor() as pool:
        local = list(
            pool.map(lambda e: image_io.image_size(e.image), multihost.local_shard(examples))
        )
    return [(h, w) for h, w in multihost.all_gather_shards("sizes of images", local)]


def batches_of_one_size(
    sizes: Sequence[Size], padded_size: Callable[[Size], Size], batch_size: Callable[[Size], int]
) -> list[tuple[Size, list[int]]]:
    """Groups images into batches of one padded size: (padded size, indices of the images).

    Each image is in exactly one batch. Full batches are in the order in which they fill up;
    incomplete batches follow.
    """
    batches = []
    incomplete: dict[Size, list[int]] = {}
    for i, size in enumerate(map(padded_size, sizes)):
        indices = incomplete.setdefault(size, [])
        indices.append(i)
        if len(indices) == batch_size(size):
            batches.append((size, incomplete.pop(size)))
    return [*batches, *incomplete.items()]


def image_batches(
    examples: Sequence[Example],
    dataset: Dataset,
    batch_size: int,
    pad_to: int,
    pad_value: UInt8[np.ndarray, "3"],
) -> Iterator[ImageBatch]:
    """Yields whole images without augmentation in batches of one padded size each.

    Every example occurs exactly once, in the batches of `batches_of_one_size`. Incomplete batches
    are filled up with empty images, labelled IGNORE. Each process reads and yields its shard of
    every batch, so that all processes yield the same number of batches.

    Args:
        examples: the examples to read.
        dataset: its classes and id table are read.
        batch_size: images in the global batch, a multiple of the number of processes.
        pad_to: sides are padded to multiples of this number of pixels (see `pad_multiple`).
        pad_value: RGB of the padding.

    Raises:
        UserError: an image or mask is missing or damaged, or their sizes differ.
    """
    return batches_by_size(
        examples,
        image_sizes(examples),
        dataset,
        functools.partial(pad_size, multiple=pad_to),
        lambda _: batch_size,
        pad_value,
    )


def batches_by_size(
    examples: Sequence[Example],
    sizes: Sequence[Size],
    dataset: Dataset,
    padded_size: Callable[[Size], Size],
    batch_size: Callable[[Size], int],
    pad_value: UInt8[np.ndarray, "3"],
    on_read_error: OnReadError | None = None,
    downscale: int = 1,
) -> Iterator[ImageBatch]:
    """Yields batches as `image_batches` does, with any rule for padded sizes and batch sizes.

    Args:
        examples, dataset, pad_value: as in `image_batches`.
        sizes: (height, width) of each image in pixels, downscaled.
        padded_size: from the size of an image to the size that it is padded to.
        batch_size: images in the global batch, by padded size.
        on_read_error: receives the unreadable examples, which the batches then leave out.
        downscale: factor by which images without a mask are downscaled after reading.

    Raises:
        UserError: as `image_batches`; with `on_read_error` not for unreadable examples.
    """
    batches = batches_of_one_size(sizes, padded_size, batch_size)
    shard_sizes = {size: batch_size(size) // multihost.process_count() for size, _ in batches}

    def local_shard(size: Size, members: Sequence[int]) -> Sequence[int]:
        return members[multihost.process_index() * shard_sizes[size] :][: shard_sizes[size]]

    local_examples = [examples[i] for size, members in batches for i in local_shard(size, members)]
    reader = _Reader(local_examples, dataset, on_read_error, downscale)
    read = tf.autograph.experimental.do_not_convert(reader)
    indices = reader.index_range(0, len(local_examples))
    loaded = indices.map(read, tf.data.AUTOTUNE, deterministic=True)
    loaded = loaded.prefetch(max(shard_sizes.values(), default=1))
    with contextlib.closing(reader.iterate(loaded.with_options(_options(0)))) as pixels:
        for size, members in batches:
            shard = [(examples[i], *next(pixels)) for i in local_shard(size, members)]
            readable = [(e, image, label) for e, image, label in shard if label.size]
            yield _image_batch(readable, size, shard_sizes[size], len(members), pad_value)


def _image_batch(
    shard: list[tuple[Example, np.ndarray, np.ndarray]],
    size: Size,
    shard_size: int,
    total: int,
    pad_value: UInt8[np.ndarray, "3"],
) -> ImageBatch:
    """Pads (example, image, label) triples to one size and adds empty images."""
    images = np.empty((shard_size, *size, 3), np.uint8)
    images[:] = pad_value
    masks = np.full((shard_size, *size), image_io.IGNORE, np.uint8)
    sizes = np.zeros((shard_size, 2), np.int32)
    for i, (example, image, label) in enumerate(shard):
        height, width = sizes[i] = label.shape
        if height > size[0] or width > size[1]:
            raise UserError(
                f"{example.image} was changed while it was read: start again.",
                code="image-changed-while-read",
            )
        images[i, :height, :width], masks[i, :height, :width] = image, label
    return ImageBatch(images, masks, tuple(e.id for e, *_ in shard), sizes, total)
