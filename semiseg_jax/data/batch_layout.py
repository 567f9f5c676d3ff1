"""The weak and the strong stream: their images in each step, and the layout of the batch."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Int

from semiseg_jax.data.views import Views
from semiseg_jax.runtime.errors import UserError

KINDS = ("labeled", "pseudo")


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The composition of a stage's batches; static.

    Attributes:
        weak, strong: the kinds of image in each stream, subsets of KINDS; may be empty.
        batch_labeled, batch_pseudo: number of images of that kind in each stream that holds it.
        accum_steps: micro-batches per step; their gradients are accumulated into one update.
        views: the views of unlabelled images, which are in no stream; None without such images.
        batch_unlabeled: number of unlabelled images with views, each with all its views.
        cache_features: the batch holds the backbone's features of its weak images, which the step
            takes in place of these images.
    """

    weak: tuple[str, ...]
    strong: tuple[str, ...]
    batch_labeled: int
    batch_pseudo: int
    accum_steps: int = 1
    views: Views | None = None
    batch_unlabeled: int = 0
    cache_features: bool = False

    def __post_init__(self):
        if (self.views is None) != (self.batch_unlabeled == 0):
            raise ValueError(f"views and batch_unlabeled are given together or not at all: {self}.")

    def size(self, stream: str) -> int:
        """Returns the number of images of a stream, "weak" or "strong", in the global batch."""
        counts = {"labeled": self.batch_labeled, "pseudo": self.batch_pseudo}
        return sum(counts[kind] for kind in getattr(self, stream))

    @property
    def domain(self) -> str:
        """The norms that a batch meets: "weak", "strong" or "both"; strong views meet the strong.

        Without views it is the `domain` argument of the norms.
        """
        present = [stream for stream in ("weak", "strong") if self.size(stream)]
        if self.views is not None and self.views.strong:
            present.append("strong")
        return "both" if len(set(present)) == 2 else present[0]

    @property
    def num_images(self) -> int:
        """Number of images in the global batch; each view counts as one."""
        views = self.views.count if self.views is not None else 0
        return self.size("weak") + self.size("strong") + self.batch_unlabeled * views

    def arrays(self, crop: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], type]]:
        """Returns shape and dtype of each array of the global batch; see `TrainBatch.arrays`.

        Args:
            crop: (height, width) of the images, in pixels.
        """
        images = self.size("weak") + self.size("strong")
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            "image": ((images, *crop, 3), np.uint8),
            "label": ((images, *crop), np.uint8),
            "is_pseudo": ((images,), np.bool_),
        }
        if self.views is not None:
            shape = (self.batch_unlabeled, self.views.count, *crop, 3)
            arrays["views"] = (shape, np.uint8)
            arrays["valid"] = ((self.batch_unlabeled, *crop), np.bool_)
        return arrays


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Properties of each image in a process's shard of the batch, in order; arrays [n].

    Attributes:
        strong: whether the image belongs to the strong stream, hence to the strong domain.
        pseudo: whether the image is pseudo-labelled.
        position: position in the global batch of the image's stream.
        rank: position among the images of the same kind in that stream.
        per_step: number of images of that kind per step of that stream.
    """

    strong: Bool[np.ndarray, " n"]
    pseudo: Bool[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    per_step: Int[np.ndarray, " n"]


def lay_out_batch(
    spec: BatchSpec, groups: int, process_index: int = 0, process_count: int = 1
) -> BatchLayout:
    """Returns the layout of a process's shard of the batch.

    The global batch has `groups` equal blocks, one per device; a block holds its weak images and
    then its strong images. With micro-batches, each block is a sequence of `accum_steps` such
    blocks. A micro-batch consists of one of them from every block, and holds the same images for
    any number of devices.

    Args:
        spec: composition of the batch.
        groups: number of blocks.
        process_index, process_count: which shard; the shards are consecutive blocks.

    Raises:
        UserError: a stream does not divide into the blocks, or the blocks over the processes.
    """
    rows_by_stream: dict[str, list[tuple]] = {"weak": [], "strong": []}
    counts = {"labeled": spec.batch_labeled, "pseudo": spec.batch_pseudo}
    for stream, rows in rows_by_stream.items():
        for kind in getattr(spec, stream):
            for rank in range(counts[kind]):
                strong, pseudo = stream == "strong", kind == "pseudo"
                rows.append((strong, pseudo, len(rows), rank, counts[kind]))
        if len(rows) % (groups * spec.accum_steps):
            raise UserError(
                f"The {stream} stream's {len(rows)} images do not divide over {groups} "
                f"devices{_turns(spec)}: make train.batch_labeled and train.batch_unlabeled "
                f"multiples of {groups * spec.accum_steps}.",
                code="stream-batch-not-divisible",
            )
    shard = []
    for block in _local_blocks(groups, spec.accum_steps, process_index, process_count):
        for rows in rows_by_stream.values():
            size = len(rows) // (groups * spec.accum_steps)
            shard += rows[block * size : (block + 1) * size]
    return BatchLayout(*(np.array(column) for column in zip(*shard, strict=True)))


def lay_out_unlabeled(
    spec: BatchSpec, groups: int, process_index: int = 0, process_count: int = 1
) -> Int[np.ndarray, " m"]:
    """Returns the positions in the global batch of the unlabelled images of a process's shard.

    They are in blocks as in `lay_out_batch`: a block of consecutive images per device, or with
    micro-batches a sequence of `accum_steps` such blocks.

    Args:
        spec, groups, process_index, process_count: as in `lay_out_batch`.

    Raises:
        UserError: the unlabelled images do not divide into the blocks, or with partners from the
            same image into blocks of pairs.
    """
    num_blocks = groups * spec.accum_steps
    if spec.batch_unlabeled % num_blocks:
        raise UserError(
            f"The {spec.batch_unlabeled} unlabelled images do not divide over {groups} "
            f"devices{_turns(spec)}: make train.batch_unlabeled a multiple of {num_blocks}.",
            code="unlabeled-batch-not-divisible",
        )
    if spec.views is not None and spec.views.partner == "same_image":
        check_pairs(spec, groups)
    positions = np.arange(spec.batch_unlabeled).reshape(num_blocks, -1)
    blocks = _local_blocks(groups, spec.accum_steps, process_index, process_count)
    return positions[blocks].reshape(-1)


def check_pairs(spec: BatchSpec, groups: int) -> None:
    """Checks that unlabelled images 2k and 2k + 1 are on one device and in one micro-batch.

    For methods that mix the two: no image leaves its device, and each has a partner.

    Args:
        spec: composition of the batch.
        groups: number of devices.

    Raises:
        UserError: naming the number of images, and the nearest one that works.
    """
    multiple = 2 * groups * spec.accum_steps
    if not spec.batch_unlabeled or spec.batch_unlabeled % multiple:
        nearest = max(1, int(spec.batch_unlabeled / multiple + 0.5)) * multiple
        raise UserError(
            f"train.batch_unlabeled is {spec.batch_unlabeled}, which does not divide into pairs of "
            f"images over {groups} devices{_turns(spec)}, and images are mixed in pairs: make it a "
            f"multiple of {multiple}, such as {nearest}.",
            code="unlabeled-batch-not-in-pairs",
        )


def _turns(spec: BatchSpec) -> str:
    """Returns the words of error messages for micro-batches."""
    return f", {spec.accum_steps} times each" if spec.accum_steps > 1 else ""


def _local_blocks(
    groups: int, accum_steps: int, process_index: int, process_count: int
) -> list[int]:
    """Returns the numbers of a process's blocks in the order in which its shard joins them.

    Block number micro_batch * groups + group belongs to a micro-batch and a device.

    Raises:
        UserError: the devices do not divide over the processes.
    """
    if groups % process_count:
        raise UserError(
            f"{groups} devices do not divide over {process_count} processes.",
            code="devices-not-divisible-over-processes",
        )
    local_groups = range(
        process_index * groups // process_count, (process_index + 1) * groups // process_count
    )
    return [
        micro_batch * groups + group
        for group, micro_batch in itertools.product(local_groups, range(accum_steps))
    ]
