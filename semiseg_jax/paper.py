"""The paper's tables and figures as rows: what each run changes, and what a row reports of it.

Source: Yuan et al., ICCV 2021, tables 1 to 6, figures 4, 5, 6 and 8. A run is the config that it is
given, data, network and recipe, with a few keys changed; so every table can be made on any data.
Rows that report stages of the same run share it, and runs that differ behind the teacher alone
share the teacher and its pseudo-labels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of Algorithm 1.

    Attributes:
        changes: values of config keys.
        students: "one", "all" that rounds.count says, or "none".
        control: also train the control, of one student and of all of them.
        curve: also evaluate ten times inside each stage.
    """

    changes: Mapping[str, Any]
    students: Literal["none", "one", "all"] = "one"
    control: bool = False
    curve: bool = False


# Plain cross-entropy on the pseudo-labels: what the loss is before SCL comes in.
CE = {"loss.unlabeled": "ce"}

RUNS: dict[str, Run] = {
    # The config as it is: the whole method.
    "full": Run({}, "all", control=True, curve=True),
    # Table 1, row by row.
    "self_training": Run(
        CE | {"data.weak_stream": ("labeled", "pseudo"), "data.strong_stream": ()}
    ),
    "sda": Run(CE | {"model.norm": "shared"}),
    "sda_dsbn": Run(CE),
    # Table 2.
    "sda_frozen": Run(CE | {"model.norm": "frozen"}),
    "sda_shared_affine": Run(CE | {"model.norm": "dsbn_shared_affine"}),
    # Table 3: one source of labels in both streams, or in the weak one alone.
    "true_sda": Run(
        {"data.weak_stream": (), "data.strong_stream": ("labeled",), "model.norm": "shared"}
    ),
    "true_dsbn": Run({"data.weak_stream": ("labeled",), "data.strong_stream": ("labeled",)}),
    "pseudo_weak": Run(CE | {"data.weak_stream": ("pseudo",), "data.strong_stream": ()}),
    "pseudo_sda": Run(
        CE | {"data.weak_stream": (), "data.strong_stream": ("pseudo",)} | {"model.norm": "shared"}
    ),
    "pseudo_dsbn": Run(CE | {"data.weak_stream": ("pseudo",), "data.strong_stream": ("pseudo",)}),
    # Figure 5 and the forms of the loss.
    "sce": Run({"loss.unlabeled": "sce"}, curve=True),
    "scl_official": Run({"loss.unlabeled": "scl_official"}, curve=True),
    # The authors' magnitudes.
    "released_sda": Run({"sda.magnitude": "released"}),
    # Figure 4: unlabelled images for each labelled one.
    **{f"ratio_{n}": Run({"data.unlabeled_ratio": float(n)}) for n in (1, 2, 4, 8, 16)},
    # The ceiling: every training image labelled.
    "all_labels": Run({"data.labeled_list": "", "data.labels": 0.0}, "none"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: for people.
        run: of RUNS.
        stage: "teacher", "student" or "control".
        round: "first", "last", or "each" for a line per round.
        paper: the name of the paper's own result in PUBLISHED, "" where it has none.
    """

    label: str
    run: str
    stage: Literal["teacher", "student", "control"] = "student"
    round: Literal["first", "last", "each"] = "first"
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or a figure of the paper.

    Attributes:
        title: what it shows.
        rows: its lines.
        x: what a figure's horizontal axis has: "row", or "step" for curves over training.
    """

    title: str
    rows: Sequence[Row]
    x: Literal["row", "step"] = "row"


TEACHER = Row("labels alone (teacher)", "full", "teacher", paper="labels alone")
CONTROL = Row("control: labels alone, a student's steps longer", "full", "control")
CONTROL_LAST = Row("control: labels alone, all students' steps longer", "full", "control", "last")
SELF_TRAINING = Row("self-training", "self_training")
SDA = Row("+ SDA", "sda")
DSBN = Row("+ DSBN", "sda_dsbn")
SCL = Row("+ SCL", "full")
FULL = Row("+ rounds (the method)", "full", round="last", paper="the method")
CEILING = Row("all labels", "all_labels", "teacher")

_COMPONENTS = (TEACHER, CONTROL, SELF_TRAINING, SDA, DSBN, SCL, FULL, CONTROL_LAST, CEILING)
_COMPARISON = (TEACHER, FULL, CONTROL_LAST)
_BY_ROUND = (TEACHER, Row("student", "full", round="each"), CONTROL_LAST)

TABLES: dict[str, Table] = {
    "1": Table("Table 1: what each part adds", _COMPONENTS),
    "2": Table(
        "Table 2: batch norm under strong augmentation",
        (
            TEACHER,
            CONTROL,
            Row("one norm, trained", "sda"),
            Row("one norm, its statistics frozen", "sda_frozen"),
            Row("two norms, one affine (Split-BN)", "sda_shared_affine"),
            Row("DSBN", "sda_dsbn"),
        ),
    ),
    "3": Table(
        "Table 3: SDA and DSBN with true labels or pseudo-labels alone",
        (
            TEACHER,
            Row("true labels, weak", "full", "control"),
            Row("true labels, SDA", "true_sda"),
            Row("true labels, SDA and DSBN", "true_dsbn"),
            Row("pseudo-labels, weak", "pseudo_weak"),
            Row("pseudo-labels, SDA", "pseudo_sda"),
            Row("pseudo-labels, SDA and DSBN", "pseudo_dsbn"),
        ),
    ),
    "4": Table("Table 4: Cityscapes, the paper's own rows", _COMPARISON),
    "5": Table("Table 5: Pascal VOC, the paper's own rows", _COMPARISON),
    "6": Table("Table 6: what each part adds", _COMPONENTS),
    "figure_4": Table(
        "Figure 4: unlabelled images for each labelled one",
        (
            TEACHER,
            CONTROL,
            *(Row(f"{n} : 1", f"ratio_{n}") for n in (1, 2, 4, 8, 16)),
            Row("all there are", "full"),
        ),
    ),
    "figure_5": Table(
        "Figure 5: the loss of pseudo-labels, over training",
        (
            Row("SCE", "sce"),
            Row("SCL", "full"),
            Row("SCL as released", "scl_official"),
        ),
        x="step",
    ),
    "figure_6": Table("Figure 6: mIoU by round", _BY_ROUND),
    "figure_8": Table("Figure 8: mIoU by round", _BY_ROUND),
    "augmentation": Table(
        "Magnitudes of SDA",
        (Row("drawn uniformly (ours)", "full"), Row("as released", "released_sda")),
    ),
}

# The paper's mIoU in percent, by (data, backbone, labelled images), and by Row.paper.
# On Cityscapes Xception-65 is DeepLabV3+, ResNet-101 DeepLabV2.
PUBLISHED: dict[tuple[str, str, int], Mapping[str, float]] = {
    ("cityscapes", "xception65", 372): {"labels alone": 68.9, "the method": 74.1},
    ("cityscapes", "xception65", 744): {"labels alone": 73.4, "the method": 77.8},
    ("cityscapes", "xception65", 1488): {"labels alone": 76.9, "the method": 78.7},
    ("cityscapes", "resnet101", 372): {"labels alone": 60.6, "the method": 67.6},
    ("cityscapes", "resnet101", 744): {"labels alone": 66.7, "the method": 69.3},
    ("cityscapes", "resnet101", 1488): {"labels alone": 69.3, "the method": 70.7},
    ("pascal_voc", "xception65", 1464): {"the method": 79.3},
    ("pascal_voc", "resnet101", 1464): {"the method": 75.0},
}
# Beside results on other data.
REFERENCE = ("cityscapes", "xception65", 372)


def published(name: str, data: str, backbone: str, labels: int) -> tuple[str, float | None]:
    """(setting, mIoU in percent) of the paper's result to stand beside one of ours.

    Args:
        name: Row.paper.
        data: of our run, as are the others.
        backbone: as in model.backbone.
        labels: labelled images.
    """
    key = (data, backbone, labels)
    key = key if key in PUBLISHED else REFERENCE
    setting = f"{key[0]}, {key[1]}, {key[2]} labels"
    return setting, PUBLISHED[key].get(name)
