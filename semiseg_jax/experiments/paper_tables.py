"""The paper's tables and figures as data: the run behind each row, and the numbers it reports.

Source: Yuan et al., ICCV 2021, tables 1 to 6, figures 4, 5, 6 and 8. A run is the user's config
(data, network, recipe) with a few keys changed, so every table can be made on any data. Rows that
report stages of the same run share it. Runs whose configs differ only in keys that a teacher does
not depend on share the teacher and its pseudo-labels: the first such run of RUNS trains it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from semiseg_jax.runtime.errors import UserError

# Plain cross-entropy on the pseudo-labels, the loss of every row before SCL is added.
CE = {"loss.unlabeled": "ce"}

# Every training image is labelled, whichever list or share the config names.
ALL_LABELS = {
    "data.labeled_list": "",
    "data.unlabeled_list": "",
    "data.labels": 0.0,
    "data.unlabeled_ratio": 0.0,
}

# The loss, the norm and the magnitudes of the method. Rows change them by name, so a config with
# other values would give rows that are not what their labels say.
METHOD = {"loss.unlabeled": "scl", "model.norm": "dsbn", "sda.magnitude": "uniform"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of Algorithm 1.

    Attributes:
        changes: values of config keys.
        students: students to train: none, one, or all that the config's rounds.count names.
        control: whether to train the control too, for the steps of one student and of all.
        curve: whether to evaluate ten times inside the first student.
        optional: whether the run is left out on data that lack the images for it.
    """

    changes: Mapping[str, Any]
    students: Literal["none", "one", "all"] = "one"
    control: bool = False
    curve: bool = False
    optional: bool = False

    @property
    def has_all_labels(self) -> bool:
        """Whether every training image is labelled."""
        return ALL_LABELS.items() <= self.changes.items()


RUNS: dict[str, Run] = {
    # The unchanged config: the whole method.
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
    # Table 3: true labels or pseudo-labels alone, in the weak stream or in both, one norm or two.
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
    # Figure 5: the loss of pseudo-labels over training; `scl` repeats the first student of `full`.
    "scl": Run({}, curve=True),
    "sce": Run({"loss.unlabeled": "sce"}, curve=True),
    "scl_official": Run({"loss.unlabeled": "scl_official"}, curve=True),
    # The magnitudes of the authors' released code.
    "released_sda": Run({"sda.magnitude": "released"}),
    # Figure 4: unlabelled images per labelled image.
    **{
        f"ratio_{n}": Run({"data.unlabeled_ratio": float(n)}, optional=True)
        for n in (1, 2, 4, 8, 16)
    },
    # The upper bound with all labels, and the method on top of it with images beyond the training
    # set (Cityscapes' train_extra, or data.unlabeled_dir).
    "all_labels": Run(ALL_LABELS, "none"),
    "all_labels_extra": Run(
        ALL_LABELS | {"data.train_extra": True}, "all", control=True, optional=True
    ),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """The data, network and labels behind a number of the paper.

    Attributes:
        data: name of the data, as `data.name`.
        network: head and backbone, such as "v3plus xception65".
        labeled: number of labelled images.
    """

    data: str
    network: str
    labeled: int

    def __str__(self) -> str:
        return f"{self.data}, {self.network}, {self.labeled} labels"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: printed label; {rounds} in it becomes the number of rounds, such as "3 rounds".
        run: key of RUNS.
        stage: kind of the stage that the row reports.
        round: round of that stage: the first, the last, or a table row for each. A row of the last
            round is left out where the table has the same stage's first round and there is one.
        adds_to: run that this row adds a component to; its first student is what the row's step
            is measured from. "" for none.
        paper: `PublishedRow.name` of the paper's result for this row; "" for none.
    """

    label: str
    run: str
    stage: Literal["teacher", "student", "control"] = "student"
    round: Literal["first", "last", "each"] = "first"
    adds_to: str = ""
    paper: str = ""

    def title(self, students: int) -> str:
        """Returns the label with the number of students filled in."""
        return self.label.format(rounds=f"{students} round{'s' if students > 1 else ''}")


# The number of labelled images of each share of labels that the paper has. It calls VOC's train
# list "1,449 images"; VOC's own list has 1,464 (1,449 is its val list).
LABELED = {
    "cityscapes": {"1/8": 372, "1/4": 744, "1/2": 1488, "full": 2975},
    "pascal_voc": {"1.4k": 1464, "full": 10_582},
}

# The paper's names of networks that are here, as head and backbone (sections 3.2, 3.3 and 4).
NETWORKS = {
    "DeepLabV3Plus": "v3plus xception65",
    "DeepLabV2": "v2 resnet101",
    "Xception-65": "v3plus xception65",
    "ResNet-101": "v3plus resnet101",
}

# The setting whose numbers stand beside results on data that the paper does not have.
CITYSCAPES_V3PLUS = Setting("cityscapes", NETWORKS["DeepLabV3Plus"], 372)
CITYSCAPES_V2 = Setting("cityscapes", NETWORKS["DeepLabV2"], 372)
PASCAL_VOC = Setting("pascal_voc", NETWORKS["Xception-65"], 1464)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or a figure of the paper.

    Attributes:
        title: printed title.
        rows: its rows.
        x: horizontal axis of the plot: mIoU, with a line for each "row"; or "step", "round", or
            the "ratio" of unlabelled to labelled images, with mIoU on the vertical axis.
        images_vary: whether its rows may differ in their training images. Otherwise such rows are
            printed apart, as are all rows of different evaluation protocols.
        reference: setting of the paper's numbers on data that the paper does not have.
    """

    title: str
    rows: Sequence[Row]
    x: Literal["row", "step", "round", "ratio"] = "row"
    images_vary: bool = False
    reference: Setting = CITYSCAPES_V3PLUS


TEACHER = Row("labels alone (teacher)", "full", "teacher", paper="labels alone")
CONTROL = Row("control: labels alone, a student's steps longer", "full", "control")
CONTROL_LAST = Row("control: labels alone, all students' steps longer", "full", "control", "last")
SELF_TRAINING = Row("self-training", "self_training", paper="self-training")
SDA = Row("+ SDA", "sda", adds_to="self_training", paper="SDA")
DSBN = Row("+ DSBN", "sda_dsbn", adds_to="sda", paper="DSBN")
SCL = Row("+ SCL (the method, one round)", "full", adds_to="sda_dsbn", paper="SCL")
FULL = Row(
    "+ rounds: the method, {rounds}", "full", round="last", adds_to="full", paper="the method"
)
ALL_LABELS_ROWS = (
    Row("all labels", "all_labels", "teacher", paper="labels alone"),
    Row("all labels, extra images: control", "all_labels_extra", "control", "last"),
    Row(
        "all labels, extra images: the method, {rounds}",
        "all_labels_extra",
        round="last",
        paper="the method",
    ),
)

_COMPONENTS = (
    *(TEACHER, CONTROL, SELF_TRAINING, SDA, DSBN, SCL, FULL, CONTROL_LAST),
    *ALL_LABELS_ROWS,
)
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
            Row("one norm, trained", "sda", paper="SDA"),
            Row("one norm, its statistics frozen", "sda_frozen", adds_to="sda", paper="fixed BN"),
            Row("two norms, one affine (Split-BN)", "sda_shared_affine", adds_to="sda"),
            Row("DSBN", "sda_dsbn", adds_to="sda", paper="DSBN"),
        ),
    ),
    "3": Table(
        "Table 3: SDA and DSBN with true labels or pseudo-labels alone",
        (
            TEACHER,
            Row("true labels, weak", "full", "control", paper="true labels"),
            Row("true labels, SDA", "true_sda", paper="true labels, SDA"),
            Row(
                "true labels, SDA and DSBN",
                "true_dsbn",
                adds_to="true_sda",
                paper="true labels, SDA, DSBN",
            ),
            Row("pseudo-labels, weak", "pseudo_weak", paper="pseudo-labels"),
            Row(
                "pseudo-labels, SDA",
                "pseudo_sda",
                adds_to="pseudo_weak",
                paper="pseudo-labels, SDA",
            ),
            Row(
                "pseudo-labels, SDA and DSBN",
                "pseudo_dsbn",
                adds_to="pseudo_sda",
                paper="pseudo-labels, SDA, DSBN",
            ),
        ),
    ),
    "4": Table("Table 4: labels alone, and the method (the paper's: on Cityscapes)", _COMPARISON),
    "5": Table(
        "Table 5: labels alone, and the method (the paper's: on Pascal VOC)",
        _COMPARISON,
        reference=PASCAL_VOC,
    ),
    "6": Table("Table 6: what each part adds", _COMPONENTS, reference=CITYSCAPES_V2),
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
            Row("SCL", "scl", adds_to="sce"),
            Row("SCL as released", "scl_official", adds_to="sce"),
        ),
        x="step",
    ),
    "figure_6": Table("Figure 6: mIoU by round", _BY_ROUND, x="round"),
    "figure_8": Table("Figure 8: mIoU by round", _BY_ROUND, x="round", reference=CITYSCAPES_V2),
    "augmentation": Table(
        "Magnitudes of SDA",
        (
            CONTROL,
            Row("drawn uniformly (ours)", "full"),
            Row("as released", "released_sda", adds_to="full"),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """A row of a table of the paper, with its numbers.

    Attributes:
        method: name as printed; in tables 1 and 6 the components that are ticked.
        model: network as printed.
        miou: percent by share of labelled images, a key of LABELED; the rest of the training set
            is unlabelled. Shares without a number are absent.
        name: `Row.paper` of our rows for the same result; "" for a method that is not here.
        supervised: percent with every image labelled and none unlabelled, column "Full" of
            table 4; None where the table has no such column.
    """

    method: str
    model: str
    miou: Mapping[str, float]
    name: str = ""
    supervised: float | None = None


@dataclasses.dataclass(frozen=True)
class PublishedTable:
    """A table of the paper: the name of its data, and its rows from top to bottom."""

    data: str
    rows: Sequence[PublishedRow]


def _by_share(*miou: float | None) -> dict[str, float]:
    """Returns mIoU of 1/8, 1/4, 1/2 and all of Cityscapes' labels by share; None is "-"."""
    shares = LABELED["cityscapes"]
    return {share: value for share, value in zip(shares, miou, strict=False) if value is not None}


_V2, _V3PLUS = "DeepLabV2", "DeepLabV3Plus"

# Column "mIoU-Full" of table 1 has train-coarse as its unlabelled images.
_TABLE_1 = (
    PublishedRow("baseline", _V3PLUS, _by_share(68.9, 73.4, 76.9, 78.7), "labels alone"),
    PublishedRow("s.t.", _V3PLUS, _by_share(71.2, 76.2, 78.0, 79.5), "self-training"),
    PublishedRow("s.t. + SDA", _V3PLUS, _by_share(71.3, 76.3, 78.2, 79.7), "SDA"),
    PublishedRow("s.t. + SDA + DSBN", _V3PLUS, _by_share(72.3, 76.9, 78.7, 80.0), "DSBN"),
    PublishedRow("s.t. + SDA + DSBN + SCL", _V3PLUS, _by_share(72.8, 77.4, 78.7, 80.4), "SCL"),
    PublishedRow(
        "s.t. + SDA + DSBN + SCL + iter.",
        _V3PLUS,
        _by_share(74.1, 77.8, 78.7, 80.5),
        "the method",
    ),
)

_TABLE_2 = (
    PublishedRow("ST", _V3PLUS, {"1/8": 71.2}, "self-training"),
    PublishedRow("ST + SDA + Trainable BN", _V3PLUS, {"1/8": 71.3}, "SDA"),
    PublishedRow("ST + SDA + Fixed BN", _V3PLUS, {"1/8": 71.6}, "fixed BN"),
    PublishedRow("ST + SDA + DSBN", _V3PLUS, {"1/8": 72.3}, "DSBN"),
)

_TRUE = ("true labels", "true labels, SDA", "true labels, SDA, DSBN")
_PSEUDO = ("pseudo-labels", "pseudo-labels, SDA", "pseudo-labels, SDA, DSBN")
_TABLE_3 = (
    PublishedRow("1/8-ground truth", _V3PLUS, {"1/8": 68.9}, _TRUE[0]),
    PublishedRow("1/8-ground truth + SDA", _V3PLUS, {"1/8": 68.6}, _TRUE[1]),
    PublishedRow("1/8-ground truth + SDA + DSBN", _V3PLUS, {"1/8": 69.5}, _TRUE[2]),
    PublishedRow("Full-ground truth", _V3PLUS, {"full": 78.7}, _TRUE[0]),
    PublishedRow("Full-ground truth + SDA", _V3PLUS, {"full": 78.7}, _TRUE[1]),
    PublishedRow("Full-ground truth + SDA + DSBN", _V3PLUS, {"full": 79.2}, _TRUE[2]),
    PublishedRow("7/8-pseudo labels", _V3PLUS, {"1/8": 70.6}, _PSEUDO[0]),
    PublishedRow("7/8-pseudo labels + SDA", _V3PLUS, {"1/8": 71.4}, _PSEUDO[1]),
    PublishedRow("7/8-pseudo labels + SDA + DSBN", _V3PLUS, {"1/8": 72.5}, _PSEUDO[2]),
)

_TABLE_4 = (
    PublishedRow("AdvSemiSeg", _V2, _by_share(58.8, 62.3, 65.7), supervised=66.0),
    PublishedRow("S4GAN + MLMT", _V2, _by_share(59.3, 61.9, None), supervised=65.8),
    PublishedRow("CutMix", _V2, _by_share(60.3, 63.87, None), supervised=67.7),
    PublishedRow("DST-CBC", _V2, _by_share(60.5, 64.4, None), supervised=66.9),
    PublishedRow("ClassMix", _V2, _by_share(61.4, 63.6, 66.3), supervised=66.2),
    PublishedRow("ECS", _V3PLUS, _by_share(67.4, 70.7, 72.9), supervised=74.8),
    PublishedRow("Baseline", _V2, _by_share(60.6, 66.7, 69.3), "labels alone", 70.1),
    PublishedRow("Ours", _V2, _by_share(67.6, 69.3, 70.7), "the method", 70.1),
    PublishedRow("Baseline", _V3PLUS, _by_share(68.9, 73.4, 76.9), "labels alone", 78.7),
    PublishedRow("Ours", _V3PLUS, _by_share(74.1, 77.8, 78.7), "the method", 78.7),
)

_TABLE_5 = (
    PublishedRow("GANSeg", "VGG16", {"1.4k": 64.1}),
    PublishedRow("AdvSemSeg", "ResNet-101", {"1.4k": 68.4}),
    PublishedRow("CCT", "ResNet-50", {"1.4k": 69.4}),
    PublishedRow("PseudoSeg", "ResNet-101", {"1.4k": 73.2}),
    PublishedRow("Ours", "ResNet-101", {"1.4k": 75.0}, "the method"),
    PublishedRow("Ours", "Xception-65", {"1.4k": 79.3}, "the method"),
    PublishedRow("Fully supervised", "ResNet-101", {"full": 78.3}, "labels alone"),
    PublishedRow("Fully supervised", "Xception-65", {"full": 79.2}, "labels alone"),
)

_TABLE_6 = (
    PublishedRow("baseline", _V2, {"1/8": 60.6}, "labels alone"),
    PublishedRow("s.t.", _V2, {"1/8": 62.1}, "self-training"),
    PublishedRow("s.t. + SDA", _V2, {"1/8": 62.2}, "SDA"),
    PublishedRow("s.t. + SDA + DSBN", _V2, {"1/8": 63.8}, "DSBN"),
    PublishedRow("s.t. + SDA + DSBN + SCL", _V2, {"1/8": 64.5}, "SCL"),
    PublishedRow("s.t. + SDA + DSBN + SCL + iter.", _V2, {"1/8": 67.6}, "the method"),
    PublishedRow("DeepLabV2-Full", _V2, {"full": 70.1}, "labels alone"),
)

# The paper's mIoU in percent: every row of its tables, by key of TABLES.
PUBLISHED: dict[str, PublishedTable] = {
    "1": PublishedTable("cityscapes", _TABLE_1),
    "2": PublishedTable("cityscapes", _TABLE_2),
    "3": PublishedTable("cityscapes", _TABLE_3),
    "4": PublishedTable("cityscapes", _TABLE_4),
    "5": PublishedTable("pascal_voc", _TABLE_5),
    "6": PublishedTable("cityscapes", _TABLE_6),
}


def published_miou(
    table: Table, row: Row, data: str, network: str, labeled: int
) -> tuple[Setting, float] | None:
    """Returns the paper's result for a row of ours, in percent, and its setting.

    On data of the paper only the same network and number of labels count: the mIoU of another
    share of labels would be read as a target. On other data it is that of the table's reference,
    to compare differences between rows.

    Args:
        table: the table of our row.
        row: our row.
        data: name of our run's data.
        network: head and backbone of our run, as "v3plus xception65".
        labeled: number of labelled images of our run.

    Returns:
        None if the paper has no such result.
    """
    if not row.paper:
        return None
    setting = Setting(data, network, labeled)
    if not any(name in data for name in LABELED):
        setting = table.reference
        if RUNS[row.run].has_all_labels:
            setting = dataclasses.replace(setting, labeled=LABELED[setting.data]["full"])
    wanted = (setting.data, setting.network, row.paper)
    for published in PUBLISHED.values():
        shares = {count: share for share, count in LABELED[published.data].items()}
        share = shares.get(setting.labeled, "")
        for candidate in published.rows:
            result = (published.data, NETWORKS.get(candidate.model), candidate.name)
            if result == wanted and share in candidate.miou:
                return setting, candidate.miou[share]
    return None


def check_method_keys(config: Any, table: str) -> None:
    """Checks that a config has the method's own values of the keys that a table's rows change.

    Raises:
        UserError: another value; the message names the key.
    """
    changed = {key for row in TABLES[table].rows for key in RUNS[row.run].changes}
    for key, expected in METHOD.items():
        value = functools.reduce(getattr, key.split("."), config)
        if key in changed and value != expected:
            raise UserError(
                f"{key} is {value}: the rows of --table={table} change it themselves, from "
                f"{expected}; leave it there.",
                code="table-key-changed",
            )
