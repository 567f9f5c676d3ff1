"""The work of a run: its parts in order, and how often each part calls each program.

Decided here alone: `forecast` prices the work on a TPU, `run_time` on this machine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from semiseg_jax import stages
from semiseg_jax.planning.workload import Workload
from semiseg_jax.shape_buckets import Size
from semiseg_jax.stages import Stage

LABELS = "labels"


class ProgramId(NamedTuple):
    """Identifies a program, or the programs of inference at all scales together.

    Attributes:
        kind: "teacher step", "student step", "labelling" or "evaluation".
        backbone: of its network.
    """

    kind: str
    backbone: str

    @property
    def is_step(self) -> bool:
        """Whether it trains; inference otherwise."""
        return self.kind.endswith("step")


@dataclasses.dataclass(frozen=True)
class Pass:
    """Passes of inference over a set of images.

    Attributes:
        name: "labelling", "evaluation" or "choosing weights".
        program: that is called.
        count: number of passes; a fraction where a part of one is left.
        sizes: number of images at each padded size.
    """

    name: str
    program: ProgramId
    count: float
    sizes: dict[Size, int]

    @property
    def images(self) -> int:
        """Number of images of one pass."""
        return sum(self.sizes.values())

    def batches(self, images_per_batch: int, size: Size) -> float:
        """Returns the batches of one pass, in batches of the given size.

        Images of another size are weighted by their pixels. The last batch of each size is padded
        to a full batch.
        """
        return sum(
            -(-count // images_per_batch) * (height * width) / (size[0] * size[1])
            for (height, width), count in self.sizes.items()
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run: a stage with its evaluations, or the labelling before a student.

    Attributes:
        name: the name of the stage, or that of the student with "labels for " before it.
        kind: "teacher", "student", "control" or LABELS.
        round: of the stage.
        steps: optimiser steps; 0 for labelling, and for a teacher that another run trained.
        step: the training step; None without one.
        passes: inference; those without an image are left out.
    """

    name: str
    kind: str
    round: int
    steps: int
    step: ProgramId | None
    passes: tuple[Pass, ...]


def name_of_labels(stage: Stage) -> str:
    """Returns the name of the part that labels the images for a student."""
    return f"labels for {stage.name}"


def parts(config: Any, load: Workload, schedule: Sequence[Stage]) -> tuple[Part, ...]:
    """Returns the parts of a run in their order.

    With `eval.select=holdout` each evaluation also reads the held-out images. With `reported` the
    reported evaluation itself selects the weights, and no image is evaluated twice.

    Args:
        config: the whole config.
        load: numbers and sizes of the images.
        schedule: from `stages.schedule`.
    """
    result = []
    for stage in schedule:
        if stage.needs_pseudo_labels:
            result.append(_labels_part(config, load, stage))
        result.append(_stage_part(config, load, stage))
    return tuple(result)


def _labels_part(config: Any, load: Workload, student: Stage) -> Part:
    teacher = "teacher" if student.round == 1 else "student"
    program = ProgramId("labelling", stages.stage_backbone(config, teacher))
    passes = (Pass("labelling", program, 1, load.label_sizes),) if load.unlabeled else ()
    return Part(name_of_labels(student), LABELS, student.round, 0, None, passes)


def _stage_part(config: Any, load: Workload, stage: Stage) -> Part:
    backbone = stages.stage_backbone(config, stage.kind)
    # A control continues the teacher, with a batch like the teacher's.
    step_kind = "student step" if stage.kind == "student" else "teacher step"
    is_imported = stage.kind == "teacher" and bool(config.rounds.teacher_from)
    steps = 0 if is_imported else stage.steps
    count = 1 if is_imported else stages.num_evaluations(config, stage.steps)
    sets = {"evaluation": load.evaluation_sizes}
    if not is_imported:
        sets["choosing weights"] = load.selection_sizes
    passes = tuple(
        Pass(name, ProgramId("evaluation", backbone), count, sizes)
        for name, sizes in sets.items()
        if sum(sizes.values())
    )
    step = ProgramId(step_kind, backbone) if steps else None
    return Part(stage.name, stage.kind, stage.round, steps, step, passes)
