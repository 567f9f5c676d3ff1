"""The weak and the strong stream: what a step takes from each, and in which order."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from semiseg_jax.errors import UserError

KINDS = ("labeled", "pseudo")
STAGES = ("teacher", "student", "control")


@dataclasses.dataclass(frozen=True)
class Streams:
    """Which kinds of image the weak and the strong stream of a stage hold; static.

    Attributes:
        weak, strong: subsets of KINDS; an empty stream takes no part.
        batch_labeled, batch_pseudo: images of the kind in each stream that holds it.
        parts: micro-batches that a step goes through one after the other, with one update.
    """

    weak: tuple[str, ...]
    strong: tuple[str, ...]
    batch_labeled: int
    batch_pseudo: int
    parts: int = 1

    def size(self, stream: str) -> int:
        """Images of one stream, "weak" or "strong", in the global batch."""
        counts = {"labeled": self.batch_labeled, "pseudo": self.batch_pseudo}
        return sum(counts[kind] for kind in getattr(self, stream))

    @property
    def domain(self) -> str:
        """The norm's `domain` for the joined batch."""
        present = [s for s in ("weak", "strong") if self.size(s)]
        return "both" if len(present) == 2 else present[0]


def of_stage(config: Any, stage: str) -> Streams:
    """What a stage takes: students both streams, the others labelled images weakly augmented.

    Args:
        config: the whole config; `data` and `train` are read.
        stage: one of STAGES.
    """
    student = stage == "student"
    return Streams(
        weak=tuple(config.data.weak_stream) if student else ("labeled",),
        strong=tuple(config.data.strong_stream) if student else (),
        batch_labeled=config.train.batch_labeled,
        batch_pseudo=config.train.batch_unlabeled,
        parts=config.train.accumulate,
    )


@dataclasses.dataclass(frozen=True)
class Slots:
    """The places of the images in a process's part of the joined batch, in order; arrays [n].

    Attributes:
        strong: the image is strongly augmented and meets the strong norm.
        pseudo: its label is a pseudo-label.
        position: its position in its stream's global batch.
        rank: its position among the images of its kind there.
        per_step: how many of its kind its stream takes in a step.
    """

    strong: Bool[np.ndarray, " n"]
    pseudo: Bool[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    per_step: Int[np.ndarray, " n"]


def slots(streams: Streams, groups: int, process_index: int = 0, process_count: int = 1) -> Slots:
    """The joined batch: `groups` equal blocks, each with its weak images, then its strong ones.

    With micro-batches every block is made of as many such blocks. A micro-batch takes its turn of
    every block, and holds the same images whatever the number of blocks.

    Raises:
        UserError: a stream does not divide into the blocks, or the blocks over the processes.
    """
    by_stream: dict[str, list[tuple]] = {"weak": [], "strong": []}
    counts = {"labeled": streams.batch_labeled, "pseudo": streams.batch_pseudo}
    for stream, rows in by_stream.items():
        for kind in getattr(streams, stream):
            for rank in range(counts[kind]):
                strong, pseudo = stream == "strong", kind == "pseudo"
                rows.append((strong, pseudo, len(rows), rank, counts[kind]))
        if len(rows) % (groups * streams.parts):
            turns = f", {streams.parts} times each" if streams.parts > 1 else ""
            raise UserError(
                f"The {stream} stream's {len(rows)} images do not divide over {groups} "
                f"devices{turns}: make train.batch_labeled and train.batch_unlabeled multiples of "
                f"{groups * streams.parts}."
            )
    if groups % process_count:
        raise UserError(f"{groups} devices do not divide over {process_count} processes.")
    joined = []
    mine = range(
        process_index * groups // process_count, (process_index + 1) * groups // process_count
    )
    for group, part in itertools.product(mine, range(streams.parts)):
        block = part * groups + group
        for rows in by_stream.values():
            size = len(rows) // (groups * streams.parts)
            joined += rows[block * size : (block + 1) * size]
    return Slots(*(np.array(column) for column in zip(*joined, strict=True)))


def stage_name(stage: str, round_: int) -> str:
    """For people: "teacher", "student 2", "control 2"."""
    return stage if stage == "teacher" else f"{stage} {round_}"


def stage_steps(train_config: Any, stage: str, round_: int) -> int:
    """Optimiser steps of a stage; a control has those of all students up to its round.

    Args:
        train_config: `config.train`.
        stage: one of STAGES.
        round_: of the student or control.
    """
    return {
        "teacher": train_config.teacher_steps,
        "student": train_config.steps,
        "control": train_config.steps * round_,
    }[stage]


def stage_seed(seed: int, round_: int, stage: str) -> Int[np.ndarray, "2"]:
    """Two integers for one stage of one run, from any integer `seed`."""
    numbers = (seed, round_, STAGES.index(stage))
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2)
    return state.view(np.int32).astype(np.int64)
