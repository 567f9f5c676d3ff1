"""The stages of a run: which there are, in which order, with which steps, seeds, batches and names.

    teacher -> [labelling -> student 1] -> [labelling -> student 2] -> ... -> control

Methods that label inside the step have no labelling, and may have no teacher.

Everything that depends on the kind of a stage is decided here. Training, evaluation, planning,
reports and the sweeps over seeds take it from `schedule`.
"""

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.data.views import Views
from semiseg_jax.methods import mixing, registry
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.models import deeplab
from semiseg_jax.runtime import fileio, hashes, json_forms
from semiseg_jax.runtime.errors import UserError

KINDS = ("teacher", "student", "control")
# The file that a finished stage has in its folder, written last.
DONE = "DONE"


_MARKER_FORM = json_forms.record(
    {
        # Either sign: the numbers of `stage_seed` have 32 bits with a sign.
        "seed": json_forms.list_of(json_forms.is_integer),
        "weights": json_forms.is_text,
        "reported": json_forms.is_text,
        "teacher": json_forms.is_text,
        hashes.SEAL: json_forms.is_text,
    }
)


@dataclasses.dataclass(frozen=True)
class Marker:
    """The content of DONE: hashes of what a finished stage ended with; a restart compares them.

    Attributes:
        seed: `Stage.seed`; empty in a marker of older code, which holds nothing.
        weights: `variables_hash` of the weights after the last step.
        reported: the same of the reported weights; others than `weights` with `eval.select`.
        teacher: the same of the reported weights of the stage that this one starts from or takes
            its pseudo-labels from; empty for the first stage.
    """

    seed: tuple[int, ...] = ()
    weights: str = ""
    reported: str = ""
    teacher: str = ""

    @property
    def is_of_older_code(self) -> bool:
        """Whether the marker is empty: older code wrote no hashes."""
        return not self.seed


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: a network trained from its first to its last step.

    Attributes:
        kind: one of KINDS.
        round: 0 for the teacher; the round of a student; for a control, how many rounds it is
            compared with.
        steps: optimiser steps.
        seed: two integers from which the order of the images and all augmentation follow.
        folder: for checkpoints and metrics, such as WORKDIR/round_1/student.
        number: position among the numbered parts of the run, from 1; labelling is a part.
        num_parts: how many numbered parts the run has.
        needs_pseudo_labels: the teacher labels the unlabelled images before this stage.
    """

    kind: str
    round: int
    steps: int
    seed: Int[np.ndarray, "2"]
    folder: epath.Path
    number: int
    num_parts: int
    needs_pseudo_labels: bool

    @property
    def name(self) -> str:
        """The name shown to people: "teacher", "student 2", "control 2"."""
        return stage_name(self.kind, self.round)

    @property
    def log_prefix(self) -> str:
        """What the lines of this stage start with, such as "[3/6] student 1: "."""
        return f"[{self.number}/{self.num_parts}] {self.name}: "

    @property
    def labeling_log_prefix(self) -> str:
        """What the lines of the labelling before this stage start with."""
        return f"[{self.number - 1}/{self.num_parts}] pseudo-labels for {self.name}: "

    @property
    def is_done(self) -> bool:
        """Whether the stage was trained to its end; read from the disk."""
        return (self.folder / DONE).exists()

    def write_marker(self, marker: Marker) -> None:
        """Marks the stage as finished, atomically."""
        content = hashes.sealed(dataclasses.asdict(marker))
        fileio.write_bytes(self.folder / DONE, (json.dumps(content) + "\n").encode())

    def read_marker(self) -> Marker | None:
        """Returns the marker of a finished stage; None if it is missing or damaged.

        Raises:
            UserError: the file is not readable.
        """
        path = self.folder / DONE
        if path.exists() and not path.stat().length:
            return Marker()
        content = fileio.read_json(path, _MARKER_FORM)
        if content is None or not hashes.is_intact(content):
            return None
        known = {field.name for field in dataclasses.fields(Marker)}
        values = {key: value for key, value in content.items() if key in known}
        return Marker(**values | {"seed": tuple(content.get("seed", ()))})


def schedule(
    config: Any, workdir: epath.PathLike, earlier_controls: Collection[int] = ()
) -> tuple[Stage, ...]:
    """The stages of a run in the order in which they are trained.

    Args:
        config: the whole config.
        workdir: of the run; nothing is read from it.
        earlier_controls: rounds of controls that were trained when fewer rounds were configured.
    """
    rounds = config.rounds
    students = range(1, rounds.count + 1)
    controls: tuple[int, ...] = ()
    if rounds.control and rounds.count:
        # As many steps as all students together, from the same teacher.
        controls = (*earlier_controls, rounds.count)
    teachers = int(has_teacher(config))
    parts_per_round = 1 + takes_pseudo_labels(config)
    num_parts = teachers + rounds.count * parts_per_round + bool(controls)

    def stage(kind: str, round_: int, number: int) -> Stage:
        return Stage(
            kind,
            round_,
            stage_steps(config.train, kind, round_),
            stage_seed(config.seed, round_, kind),
            epath.Path(workdir) / f"round_{round_}" / kind,
            number,
            num_parts,
            kind == "student" and takes_pseudo_labels(config),
        )

    return (
        *[stage("teacher", 0, 1)] * teachers,
        *(stage("student", round_, teachers + round_ * parts_per_round) for round_ in students),
        *(stage("control", round_, num_parts) for round_ in controls),
    )


def has_teacher(config: Any) -> bool:
    """Whether a teacher is trained before the students; else these start as new networks."""
    return config.train.teacher_steps > 0


def online_method(config: Any, kind: str) -> OnlineMethod | None:
    """The method that labels images inside the steps of a kind of stage; None without one."""
    method = registry.build(config)
    return method if kind == "student" and isinstance(method, OnlineMethod) else None


def takes_pseudo_labels(config: Any) -> bool:
    """Whether students learn from labels that are made before their stage."""
    return (
        bool(config.rounds.count)
        and online_method(config, "student") is None
        and "pseudo" in (*config.data.weak_stream, *config.data.strong_stream)
    )


def takes_unlabeled_images(config: Any) -> bool:
    """Whether students see unlabelled images, however these are labelled."""
    is_online = bool(config.rounds.count) and online_method(config, "student") is not None
    return is_online or takes_pseudo_labels(config)


def trained_kinds(config: Any) -> tuple[str, ...]:
    """The kinds of stage that have a training step of their own; a control has the teacher's."""
    kinds = ["teacher"] * has_teacher(config) + ["student"] * bool(config.rounds.count)
    return tuple(kinds)


def stage_backbone(config: Any, kind: str) -> str:
    """The backbone of a kind of stage: `rounds.student_model` may give students another one."""
    return (kind == "student" and config.rounds.student_model) or config.model.backbone


def batch_spec(config: Any, kind: str) -> BatchSpec:
    """The images of a step: students take both streams, others labelled images, weakly augmented.

    Args:
        config: the whole config; `data` and `train` are read.
        kind: one of KINDS.
    """
    method = online_method(config, kind)
    takes_streams = kind == "student" and method is None
    weak = tuple(config.data.weak_stream) if takes_streams else ("labeled",)
    return BatchSpec(
        weak=weak,
        strong=tuple(config.data.strong_stream) if takes_streams else (),
        batch_labeled=config.train.batch_labeled,
        batch_pseudo=config.train.batch_unlabeled,
        accum_steps=config.train.accumulate,
        views=_views(config, method) if method else None,
        batch_unlabeled=config.train.batch_unlabeled if method else 0,
        cache_features=config.data.cache_features and bool(weak),
    )


def _views(config: Any, method: OnlineMethod) -> Views:
    return dataclasses.replace(method.views, partner=config.method.views.partner)


# A norm that computes its moments from one value per channel has variance 0: its output is the same
# for every image, training cannot use it, and the running variance tends to 0.
MIN_NORM_VALUES = 2


def norm_values(config: Any, kind: str) -> dict[str, int]:
    """The fewest values per channel from which the batch norms of a stage compute their moments.

    Moments are taken over all devices, separately for each micro-batch and, with norms of their
    own, for each stream. The norm behind the image pooling of a head has one value per image; those
    of a head without image pooling have one per pixel of the last features.

    Args:
        config: the whole config; `data`, `train` and `model` are read.
        kind: one of KINDS.

    Returns:
        The number of values by stream, "weak", "strong", or "weak and strong" if both share a norm;
        empty if the norms are frozen or there are none.
    """
    spec, model = batch_spec(config, kind), config.model
    if model.norm == "frozen" or not deeplab.has_batch_norm(model):
        return {}
    values_per_image = 1
    if model.head == "v2":
        # A crop that is chosen from the images has at least these sides.
        crop = config.data.crop or (model.output_stride + 1,) * 2
        height, width = (-(-side // model.output_stride) for side in crop)
        values_per_image = height * width
    images = {name: spec.size(name) for name in ("weak", "strong") if spec.size(name)}
    if spec.views is not None and spec.views.strong:
        # A pass of its own; methods that mix images may make one of two.
        images["strong"] = max(spec.batch_unlabeled // 2, 1)
    elif model.norm == "shared":
        images = {" and ".join(images): sum(images.values())}
    return {name: n // spec.accum_steps * values_per_image for name, n in images.items()}


def check_norm_values(config: Any) -> None:
    """Refuses training batches with too few values for the moments of a batch norm.

    Raises:
        UserError: names the keys of the batch.
    """
    for kind in trained_kinds(config):
        spec = batch_spec(config, kind)
        for streams, values in norm_values(config, kind).items():
            if values >= MIN_NORM_VALUES:
                continue
            kinds = {k for name in streams.split(" and ") for k in getattr(spec, name)}
            if spec.views is not None and streams == "strong":
                kinds = {"pseudo"}
            keys = {"labeled": "train.batch_labeled", "pseudo": "train.batch_unlabeled"}
            sizes = {
                key: config.train[key.removeprefix("train.")]
                for k, key in keys.items()
                if k in kinds
            }
            given = " and ".join(f"{key} is {size}" for key, size in sizes.items())
            parts = f" in {spec.accum_steps} micro-batches" if spec.accum_steps > 1 else ""
            raise UserError(
                f"{given}{parts}: a batch norm of the {kind} would compute the variance of the "
                f"{streams} images from a single value per channel; make {' or '.join(sizes)} at "
                f"least {MIN_NORM_VALUES * spec.accum_steps}, or take pretrained weights with "
                "model.norm=frozen.",
                code="batch-norm-sees-one-value",
            )


def check_method(config: Any, devices: int) -> None:
    """Refuses batches that the method of the students cannot take.

    Args:
        config: the whole config.
        devices: number of devices.

    Raises:
        UserError: names the key of the batch.
    """
    method = online_method(config, "student")
    if method is None or not config.rounds.count:
        return
    if config.train.accumulate > 1:
        raise UserError(
            f"train.accumulate is {config.train.accumulate}, but method.name={config.method.name} "
            "takes thresholds and means over the whole batch: set it to 1, and lower "
            "train.batch_labeled and train.batch_unlabeled, or set model.remat, to save memory.",
            code="accumulation-with-online-method",
        )
    if (group := method.group_size) > 1:
        mixing.check_group_size(config.train.batch_unlabeled, devices, group_size=group)


def stage_name(kind: str, round_: int) -> str:
    """The name of a stage for people: "teacher", "student 2", "control 2"."""
    return kind if kind == "teacher" else f"{kind} {round_}"


def stage_steps(train_config: Any, kind: str, round_: int) -> int:
    """Optimiser steps of a stage; a control takes those of all students up to its round.

    Args:
        train_config: `config.train`.
        kind: one of KINDS.
        round_: of the student or control.
    """
    return {
        "teacher": train_config.teacher_steps,
        "student": train_config.steps,
        "control": train_config.steps * round_,
    }[kind]


def first_step_of_run(train_config: Any, kind: str, round_: int) -> int:
    """Steps that the weights of a stage had been trained for before the stage began."""
    steps_before = (round_ - 1) * train_config.steps if kind == "student" else 0
    return 0 if kind == "teacher" else train_config.teacher_steps + steps_before


def stage_seed(seed: int, round_: int, kind: str) -> Int[np.ndarray, "2"]:
    """Two integers for one stage of one run, from any integer `seed`."""
    numbers = (seed, round_, KINDS.index(kind))
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(2)
    return state.view(np.int32).astype(np.int64)


def num_evaluations(config: Any, steps: int) -> int:
    """Evaluations of a stage of `steps` steps: every `eval.every` steps, and at its end."""
    every = config.eval.every
    return 1 + ((steps - 1) // every if every else 0)
