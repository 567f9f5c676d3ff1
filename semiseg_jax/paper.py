"""The paper's tables and figures as rows: what each run changes, and what a row reports of it.

Source: Yuan et al., ICCV 2021, tables 1 to 6, figures 4, 5, 6 and 8. A run is the config that it is
given, data, network and recipe, with a few keys changed; so every table can be made on any data.
Rows that report stages of the same run share it, and runs that differ behind the teacher alone
share the teacher and its pseudo-labels. Its teacher is made by the first run here that has it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from semiseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of Algorithm 1.

    Attributes:
        changes: values of config keys.
        students: "one", "all" that rounds.count says, or "none".
        control: also train the control, of one student and of all of them.
        curve: also evaluate ten times inside each student.
        optional: not all data have the images for it; it is left out where they lack.
    """

    changes: Mapping[str, Any]
    students: Literal["none", "one", "all"] = "one"
    control: bool = False
    curve: bool = False
    optional: bool = False


# What the rows mean by the method's own loss, norm and magnitudes. A config with others would have
# labels in its tables that are not true.
METHOD = {"loss.unlabeled": "scl", "model.norm": "dsbn", "sda.magnitude": "uniform"}

# Plain cross-entropy on the pseudo-labels: what the loss is before SCL comes in.
CE = {"loss.unlabeled": "ce"}

# Every training image labelled, whatever was listed or drawn.
ALL_LABELS = {
    "data.labeled_list": "",
    "data.unlabeled_list": "",
    "data.labels": 0.0,
    "data.unlabeled_ratio": 0.0,
}

RUNS: dict[str, Run] = {
    # The config as it is: the whole method.
    "full": Run({}, "all", control=True),
    # Table 1, row by row.
    "self_training": Run(
        CE | {"data.weak_stream": ("labeled", "pseudo"), "data.strong_stream": ()}
    ),
    "sda": Run(CE | {"model.norm": "shared"}),
    "sda_dsbn": Run(CE),
    # Table 2.
    "sda_frozen": Run(CE | {"model.norm": "frozen"}),
    "sda_shared_affine": Run(CE | {"model.norm": "dsbn_shared_affine"}),
    # Table 3: one source of labels, weak alone or in both streams, with one norm or with two.
    "true_sda": Run(
        {"data.weak_stream": ("labeled",), "data.strong_stream": ("labeled",)}
        | {"model.norm": "shared"}
    ),
    "true_dsbn": Run({"data.weak_stream": ("labeled",), "data.strong_stream": ("labeled",)}),
    "pseudo_weak": Run(CE | {"data.weak_stream": ("pseudo",), "data.strong_stream": ()}),
    "pseudo_sda": Run(
        CE
        | {"data.weak_stream": ("pseudo",), "data.strong_stream": ("pseudo",)}
        | {"model.norm": "shared"}
    ),
    "pseudo_dsbn": Run(CE | {"data.weak_stream": ("pseudo",), "data.strong_stream": ("pseudo",)}),
    # Figure 5: the forms of the loss, over training; `scl` is the first student of `full`.
    "scl": Run({}, curve=True),
    "sce": Run({"loss.unlabeled": "sce"}, curve=True),
    "scl_official": Run({"loss.unlabeled": "scl_official"}, curve=True),
    # The authors' magnitudes.
    "released_sda": Run({"sda.magnitude": "released"}),
    # Figure 4: unlabelled images for each labelled one.
    **{
        f"ratio_{n}": Run({"data.unlabeled_ratio": float(n)}, optional=True)
        for n in (1, 2, 4, 8, 16)
    },
    # The ceiling, and what images beyond the training set add to it (Cityscapes' train_extra, or
    # those of data.unlabeled_dir).
    "all_labels": Run(ALL_LABELS, "none"),
    "all_labels_extra": Run(
        ALL_LABELS | {"data.train_extra": True}, "all", control=True, optional=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: for people; {rounds} in it is how many there are, as "3 rounds".
        run: of RUNS.
        stage: "teacher", "student" or "control".
        round: "first", "last", or "each" for a line per round; "last" is left out where it is the
            first.
        over: the run whose first student this row is a step over, "" where there is none.
        paper: the name of the paper's own result in PUBLISHED, "" where it has none.
    """

    label: str
    run: str
    stage: Literal["teacher", "student", "control"] = "student"
    round: Literal["first", "last", "each"] = "first"
    over: str = ""
    paper: str = ""

    def title(self, students: int) -> str:
        """The label, with the count of students."""
        return self.label.format(rounds=f"{students} round{'s' if students > 1 else ''}")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or a figure of the paper.

    Attributes:
        title: what it shows.
        rows: its lines.
        x: what a picture has on its horizontal axis: mIoU, with a line for each "row", or mIoU over
            "step", "round", or the "ratio" of unlabelled to labelled images.
        images_vary: its rows differ in the images that they train on; else such rows, like all of
            different protocols, stand apart.
    """

    title: str
    rows: Sequence[Row]
    x: Literal["row", "step", "round", "ratio"] = "row"
    images_vary: bool = False


TEACHER = Row("labels alone (teacher)", "full", "teacher", paper="labels alone")
CONTROL = Row("control: labels alone, a student's steps longer", "full", "control")
CONTROL_LAST = Row("control: labels alone, all students' steps longer", "full", "control", "last")
SELF_TRAINING = Row("self-training", "self_training")
SDA = Row("+ SDA", "sda", over="self_training")
DSBN = Row("+ DSBN", "sda_dsbn", over="sda")
SCL = Row("+ SCL (the method, one round)", "full", over="sda_dsbn")
FULL = Row("+ rounds: the method, {rounds}", "full", round="last", over="full", paper="the method")
CEILING = (
    Row("all labels", "all_labels", "teacher"),
    Row("all labels, extra images: control", "all_labels_extra", "control", "last"),
    Row("all labels, extra images: the method, {rounds}", "all_labels_extra", round="last"),
)

_COMPONENTS = (TEACHER, CONTROL, SELF_TRAINING, SDA, DSBN, SCL, FULL, CONTROL_LAST, *CEILING)
_COMPARISON = (
    TEACHER,
    Row("the method, round 1", "full"),
    Row("the method, {rounds}", "full", round="last", paper="the method"),
    CONTROL,
    CONTROL_LAST,
)
_BY_ROUND = (TEACHER, Row("student", "full", round="each"), CONTROL, CONTROL_LAST)

TABLES: dict[str, Table] = {
    "1": Table("Table 1: what each part adds", _COMPONENTS),
    "2": Table(
        "Table 2: batch norm under strong augmentation",
        (
            TEACHER,
            CONTROL,
            Row("one norm, trained", "sda"),
            Row("one norm, its statistics frozen", "sda_frozen", over="sda"),
            Row("two norms, one affine (Split-BN)", "sda_shared_affine", over="sda"),
            Row("DSBN", "sda_dsbn", over="sda"),
        ),
    ),
    "3": Table(
        "Table 3: SDA and DSBN with true labels or pseudo-labels alone",
        (
            TEACHER,
            Row("true labels, weak", "full", "control"),
            Row("true labels, SDA", "true_sda"),
            Row("true labels, SDA and DSBN", "true_dsbn", over="true_sda"),
            Row("pseudo-labels, weak", "pseudo_weak"),
            Row("pseudo-labels, SDA", "pseudo_sda", over="pseudo_weak"),
            Row("pseudo-labels, SDA and DSBN", "pseudo_dsbn", over="pseudo_sda"),
        ),
    ),
    "4": Table("Table 4: labels alone, and the method (the paper's: on Cityscapes)", _COMPARISON),
    "5": Table("Table 5: labels alone, and the method (the paper's: on Pascal VOC)", _COMPARISON),
    "6": Table("Table 6: what each part adds", _COMPONENTS),
    "figure_4": Table(
        "Figure 4: unlabelled images for each labelled one",
        (
            TEACHER,
            CONTROL,
            *(Row(f"{n} : 1", f"ratio_{n}") for n in (1, 2, 4, 8, 16)),
            Row("all there are", "full"),
        ),
        x="ratio",
        images_vary=True,
    ),
    "figure_5": Table(
        "Figure 5: the loss of pseudo-labels, over training",
        (
            Row("SCE", "sce"),
            Row("SCL", "scl", over="sce"),
            Row("SCL as released", "scl_official", over="sce"),
        ),
        x="step",
    ),
    "figure_6": Table("Figure 6: mIoU by round", _BY_ROUND, x="round"),
    "figure_8": Table("Figure 8: mIoU by round", _BY_ROUND, x="round"),
    "augmentation": Table(
        "Magnitudes of SDA",
        (
            CONTROL,
            Row("drawn uniformly (ours)", "full"),
            Row("as released", "released_sda", over="full"),
        ),
    ),
}

# The paper's mIoU in percent, by (data, head and backbone, labelled images), and by Row.paper.
PUBLISHED: dict[tuple[str, str, int], Mapping[str, float]] = {
    ("cityscapes", "v3plus xception65", 372): {"labels alone": 68.9, "the method": 74.1},
    ("cityscapes", "v3plus xception65", 744): {"labels alone": 73.4, "the method": 77.8},
    ("cityscapes", "v3plus xception65", 1488): {"labels alone": 76.9, "the method": 78.7},
    ("cityscapes", "v2 resnet101", 372): {"labels alone": 60.6, "the method": 67.6},
    ("cityscapes", "v2 resnet101", 744): {"labels alone": 66.7, "the method": 69.3},
    ("cityscapes", "v2 resnet101", 1488): {"labels alone": 69.3, "the method": 70.7},
    ("pascal_voc", "v3plus xception65", 1464): {"the method": 79.3},
    ("pascal_voc", "v3plus resnet101", 1464): {"the method": 75.0},
}
# Beside results on data that the paper has not.
REFERENCE = ("cityscapes", "v3plus xception65", 372)


def refuse_another_method(config: Any, table: str) -> None:
    """Refuses a config that has already changed what the rows of a table change.

    Raises:
        UserError: naming the key.
    """
    changed = {key for row in TABLES[table].rows for key in RUNS[row.run].changes}
    for key, value in METHOD.items():
        found = functools.reduce(getattr, key.split("."), config)
        if key in changed and found != value:
            raise UserError(
                f"{key} is {found}: the rows of --table={table} change it themselves, from "
                f"{value}; leave it there."
            )


def published(data: str, network: str, labels: int) -> tuple[str, Mapping[str, float]]:
    """(setting, mIoU in percent by Row.paper) of the paper, to stand beside ours.

    Args:
        data: of our run, as are the others.
        network: its head and backbone, as "v3plus xception65".
        labels: labelled images.
    """
    key = (data, network, labels)
    if key not in PUBLISHED:
        if any(theirs in data for theirs, *_ in PUBLISHED):
            # Another share of its data is no reference: its height would be taken for ours.
            return "none with this network and these labels", {}
        key = REFERENCE
    return f"{key[0]}, {key[1]}, {key[2]} labels", PUBLISHED[key]
