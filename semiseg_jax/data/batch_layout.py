"""The weak and the strong stream: their images in each step, and the layout of the batch."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Int

from semiseg_jax.runtime.errors import UserError

KINDS = ("labeled", "pseudo")


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The composition of a stage's batches; static.

    Attributes:
        weak, strong: the kinds of image in each stream, subsets of KINDS; may be empty.
        batch_labeled, batch_pseudo: number of images of that kind in each stream that holds it.
        accum_steps: micro-batches per step; their gradients are accumulated into one update.
    """

    weak: tuple[str, ...]
    strong: tuple[str, ...]
    batch_labeled: int
    batch_pseudo: int
    accum_steps: int = 1

    def size(self, stream: str) -> int:
        """Returns the number of images of a stream, "weak" or "strong", in the global batch."""
        counts = {"labeled": self.batch_labeled, "pseudo": self.batch_pseudo}
        return sum(counts[kind] for kind in getattr(self, stream))

    @property
    def domain(self) -> str:
        """The `domain` argument of the norms for a batch: "weak", "strong" or "both"."""
        present = [stream for stream in ("weak", "strong") if self.size(stream)]
        return "both" if len(present) == 2 else present[0]


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
            turns = f", {spec.accum_steps} times each" if spec.accum_steps > 1 else ""
            raise UserError(
                f"The {stream} stream's {len(rows)} images do not divide over {groups} "
                f"devices{turns}: make train.batch_labeled and train.batch_unlabeled multiples of "
                f"{groups * spec.accum_steps}.",
                code="stream-batch-not-divisible",
            )
    if groups % process_count:
        raise UserError(
            f"{groups} devices do not divide over {process_count} processes.",
            code="devices-not-divisible-over-processes",
        )
    shard = []
    local_groups = range(
        process_index * groups // process_count, (process_index + 1) * groups // process_count
    )
    for group, micro_batch in itertools.product(local_groups, range(spec.accum_steps)):
        block = micro_batch * groups + group
        for rows in rows_by_stream.values():
            size = len(rows) // (groups * spec.accum_steps)
            shard += rows[block * size : (block + 1) * size]
    return BatchLayout(*(np.array(column) for column in zip(*shard, strict=True)))
