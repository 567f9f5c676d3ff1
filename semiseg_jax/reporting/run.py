"""Reads the workdir of a run: config, result rows, and the state of each stage."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from semiseg_jax import fitted_settings, results, stages
from semiseg_jax.comparison import kept_stage
from semiseg_jax.data import image_io
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.reporting import artifacts
from semiseg_jax.reporting.markup import colour_code
from semiseg_jax.results import ResultRow
from semiseg_jax.runtime import fileio, json_forms, metric_writer
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle

# What a report reads of config.json; the rest is printed.
_STREAM = json_forms.list_of(json_forms.is_text)
_CONFIG_FORM = json_forms.record(
    {
        "seed": json_forms.is_integer,
        "data": json_forms.record({"weak_stream": _STREAM, "strong_stream": _STREAM}),
        "model": json_forms.record({"head": json_forms.is_text, "backbone": json_forms.is_text}),
        "rounds": json_forms.record(
            {
                "count": json_forms.both(json_forms.is_count, lambda count: count <= 1000),
                "control": json_forms.is_flag,
            }
        ),
        "train": json_forms.record(
            {"steps": json_forms.is_count, "teacher_steps": json_forms.is_count}
        ),
    }
)
# What a report reads of model.json; the entry is missing in those of older code.
_MODEL_FORM = json_forms.record({"kept": kept_stage.FORM})


@dataclasses.dataclass(frozen=True)
class StageReport:
    """A stage of a run and its state.

    Attributes:
        number: index among all stages of the config.
        stage: the stage.
        begins: number of training steps in the run before this stage.
        done: whether the stage has ended.
        evaluation: content of evaluation.json (see `artifacts.write_evaluation`); None if it is
            missing or damaged.
    """

    number: int
    stage: stages.Stage
    begins: int
    done: bool
    evaluation: Any

    @property
    def kind(self) -> str:
        """As in `stages.Stage`."""
        return self.stage.kind

    @property
    def round(self) -> int:
        """As in `stages.Stage`."""
        return self.stage.round

    @property
    def folder(self) -> epath.Path:
        """Folder of the stage."""
        return self.stage.folder

    @property
    def name(self) -> str:
        """Display name, such as "student 2"."""
        return self.stage.name

    @property
    def key(self) -> tuple[str, int]:
        """Kind and round, which identify the stage in results.json."""
        return self.kind, self.round

    @property
    def protocol(self) -> EvalProtocol:
        """The protocol of `evaluation`."""
        return EvalProtocol.from_json(self.evaluation["protocol"])

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return metric_writer.read_metrics(self.folder)

    @property
    def seconds(self) -> float:
        """Duration of training, in seconds."""
        return sum(line.get("seconds", 0.0) for line in self.history)

    def scalar(self, name: str) -> list[tuple[int, float]]:
        """Returns the (step, value) pairs of a training scalar."""
        return [(line["step"], line[name]) for line in self.history if name in line]


@dataclasses.dataclass(frozen=True)
class Run:
    """Content of a workdir.

    Attributes:
        workdir: folder of the run.
        config: content of config.json.
        about: content of run.json; None if missing.
        rows, curve: content of results.json: rows at the end of stages and within them.
        stages: all stages of the config, finished or not.
        kept: entry "kept" of model.json, see `KeptStage`; None if missing.
        chosen: what the run chose by itself, see `fitted_settings.read_settings`; None if
            fitted.json is damaged.
    """

    workdir: epath.Path
    config: dict[str, Any]
    about: Any
    rows: list[ResultRow]
    curve: list[ResultRow]
    stages: list[StageReport]
    kept: Any = None
    chosen: dict[str, Any] | None = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The sentence on the kept stage and the gain over the control; "" before the run's end."""
        is_over = all(stage.done for stage in self.stages)
        # In a run that was extended, model/ may still be that of fewer rounds.
        is_current = self.kept and self.kept["rounds"] == self.config["rounds"]["count"]
        return self.kept["sentence"] if is_over and is_current else ""

    @property
    def stores_pseudo_labels(self) -> bool:
        """Whether students learn from pseudo-labels on disk, instead of labels from their steps."""
        return stages.takes_pseudo_labels(ConfigDict(self.config))

    @property
    def scored(self) -> list[StageReport]:
        """Finished teacher and students with scores by image, of the last one's protocol."""
        scored = [s for s in self.stages if s.done and s.evaluation and s.kind != "control"]
        return [
            s
            for s in scored
            if s.evaluation["gallery"] == scored[-1].evaluation["gallery"]
            and s.protocol.is_comparable(scored[-1].protocol)
        ]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Name and colour of each class; empty if run.json is missing."""
        about = self.about or {"classes": [], "palette": []}
        pairs = zip(about["classes"], about["palette"], strict=True)
        return [(name, colour_code(colour)) for name, colour in pairs]

    def classes(self, count: int) -> list[tuple[str, str]]:
        """Returns name and colour of `count` classes.

        The names are numbers if run.json is missing or has another number of classes.
        """
        if len(self.legend) != count:
            colours = image_io.generated_palette(count)
            return [(f"class {i}", colour_code(colour)) for i, colour in enumerate(colours)]
        return self.legend

    @property
    def palette(self) -> Sequence[Sequence[int]]:
        """Colour of each class: red, green and blue in 0..255."""
        return self.about["palette"] if self.about else image_io.generated_palette(image_io.IGNORE)


def find_row(rows: Sequence[ResultRow], kind: str) -> ResultRow | None:
    """Returns the first row of a kind of stage; None if there is none."""
    return next((row for row in rows if row.stage == kind), None)


def group_comparable(rows: Sequence[ResultRow]) -> list[list[ResultRow]]:
    """Groups rows whose protocols are comparable, in the order of the first row of each group."""
    groups: list[list[ResultRow]] = []
    for row in rows:
        matches = (
            g
            for g in groups
            if g[0].protocol.is_comparable(row.protocol) and len(g[0].iou) == len(row.iou)
        )
        group = next(matches, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def read(workdir: epath.PathLike) -> Run:
    """Reads a workdir.

    Raises:
        UserError: the folder has no config.json, or it is damaged.
    """
    workdir = epath.Path(workdir)
    config = fileio.read_json(workdir / "config.json", _CONFIG_FORM)
    if config is None:
        raise UserError(
            f"{workdir} has no config.json of a run: restore it, or give the --workdir of a run "
            "that has begun.",
            code="report-config-missing",
        )
    scores = _read_results(workdir)
    about = artifacts.read_run(workdir)
    stage_reports = list(_read_stages(workdir, config))
    model = fileio.read_json(workdir / model_bundle.FOLDER / model_bundle.DESCRIPTION, _MODEL_FORM)
    kept = model and model["kept"]
    chosen = _read_chosen(workdir)
    return Run(workdir, config, about, scores["rows"], scores["curve"], stage_reports, kept, chosen)


def _read_chosen(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the settings that a run chose by itself; None if their file is damaged."""
    try:
        return fitted_settings.read_settings(workdir)
    except UserError as error:
        if error.code != "fingerprint-damaged":
            raise
        return None


def _read_results(workdir: epath.Path) -> dict[str, list[ResultRow]]:
    """Returns the unchanged rows of results.json; no rows if it is missing or damaged."""
    try:
        return results.read(workdir / "results.json")
    except UserError as error:
        if error.code not in ("results-damaged", "row-hashes-damaged"):
            raise
        return {"rows": [], "curve": []}


def _read_stages(workdir: epath.Path, config: Mapping[str, Any]) -> Iterator[StageReport]:
    schedule = stages.schedule(ConfigDict(config), workdir)
    for number, stage in enumerate(schedule):
        evaluation = artifacts.read_evaluation(stage.folder)
        begins = stages.first_step_of_run(ConfigDict(config).train, stage.kind, stage.round)
        yield StageReport(number, stage, begins, stage.is_done, evaluation)
