"""Evaluates the stages of a run: which weights of a stage are reported, and its result rows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from semiseg_jax import evaluate, metrics, stages
from semiseg_jax.checkpoints import BestWeights, Candidate
from semiseg_jax.comparison import image_counts, kept_stage
from semiseg_jax.comparison.image_counts import ImageCounts
from semiseg_jax.compiled_model import CompiledModel
from semiseg_jax.data import unlabeled_truth
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.methods import label_health
from semiseg_jax.models.dsbn import DOMAINS
from semiseg_jax.reporting import artifacts
from semiseg_jax.results import ResultRow, Results
from semiseg_jax.runtime import metric_writer, multihost
from semiseg_jax.runtime.logger import logger
from semiseg_jax.stages import Stage
from semiseg_jax.train_state import Variables, variables_hash


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation on the reported set found.

    Attributes:
        step: where the stage stood.
        variables: the weights that were evaluated.
        score: of them.
        images: what was drawn of the evaluation images.
        student_miou: of the trained network, where `variables` are others; None otherwise.
        unlabeled: score on the unlabelled images of `eval.unlabeled_masks`; None without.
    """

    step: int
    variables: Variables
    score: evaluate.Score
    images: artifacts.PredictionSink
    student_miou: float | None = None
    unlabeled: evaluate.Score | None = None


class StageEvaluator:
    """Evaluates the stages of a run and writes their result rows.

    Attributes:
        results: the rows of results.json.
    """

    def __init__(self, config: Any, workdir: epath.Path, dataset: Dataset, mesh: Mesh):
        self.results = Results(workdir / "results.json")
        self._config = config
        self._workdir = workdir
        self._dataset = dataset
        self._mesh = mesh
        # The reported set is then also the set that weights are selected on.
        self._selects_on_reported = config.eval.select == "reported"
        self._truth = unlabeled_truth.load_truth(config, dataset)
        # By backbone, the evaluators on the images of `_truth`.
        self._truth_evaluators: dict[str, evaluate.Evaluator] = {}

    def protocol(self, model: CompiledModel) -> EvalProtocol:
        """The protocol of the evaluations of this run; a part of each row."""
        return EvalProtocol.of_run(self._config, self._dataset, model.evaluate.pad_to)

    def find_row(
        self,
        stage: Stage,
        model: CompiledModel,
        step: int | None = None,
        weights_hash: str | None = None,
        may_be_unknown: bool = True,
    ) -> ResultRow | None:
        """The row of a stage by the present protocol, if there is one.

        Args:
            stage, model: of the row.
            step: where the stage stood; its end unless given.
            weights_hash: of the weights that the row must be of; None for any.
            may_be_unknown: as for `Results.is_of`.
        """
        protocol = self.protocol(model)
        key = (stage.kind, stage.round, stage.steps if step is None else step)
        rows = self.results.rows if step is None else self.results.curve
        return next(
            (
                row
                for row in rows
                if (row.stage, row.round, row.step) == key
                and row.protocol.is_comparable(protocol)
                and self.results.is_of(row, weights_hash, may_be_unknown)
            ),
            None,
        )

    def evaluate_at(
        self,
        stage: Stage,
        model: CompiledModel,
        step: int,
        variables: Variables,
        student: Variables | None = None,
    ) -> None:
        """Evaluates at a step inside a stage, unless the row of that step exists.

        Args:
            stage, model: the stage and its network.
            step: where the stage stands.
            variables: the weights that are reported.
            student: those of the trained network, where they are others.
        """
        best = self._best_weights(stage)
        # Where rows select the weights, a row that an earlier process wrote is not reused: its
        # weights may differ from those of this process in the last bits.
        reuses = not (best and self._selects_on_reported)
        row = self.find_row(stage, model, step, _weights_hash(variables)) if reuses else None
        if row is None:
            row = self._record(stage, model, self._evaluate(stage, model, step, variables, student))
        if best:
            by_row = self._selects_on_reported
            best.update(step, row.miou if by_row else model.select(variables).miou, variables)

    def evaluate_final(
        self,
        stage: Stage,
        model: CompiledModel,
        last: Variables,
        student: Variables | None = None,
    ) -> Variables:
        """Evaluates a stage at its end and writes its row.

        Args:
            stage: that has been trained.
            model: its network.
            last: the weights to report after its last step.
            student: those of the trained network, where they are others.

        Returns:
            The reported weights, by `eval.select`.
        """
        variables, evaluation = last, None
        if best := self._best_weights(stage):
            if self._selects_on_reported:
                evaluation = self._evaluate(stage, model, stage.steps, last, student)
            miou = evaluation.score.miou if evaluation else model.select(last).miou
            best.update(stage.steps, miou, last)
            selected = self._selected(best, model)
            variables = selected.variables
            if selected.step != stage.steps:
                evaluation = student = None
        if evaluation is None:
            evaluation = self._evaluate(stage, model, stage.steps, variables, student)
        self._record(stage, model, evaluation)
        self._ensure_held_out_counted(stage, model, variables)
        return variables

    def reported_weights(self, stage: Stage, model: CompiledModel, last: Variables) -> Variables:
        """Returns the reported weights of a finished stage, by `eval.select`.

        Args:
            stage, model: the stage and its network.
            last: the weights after its last step.
        """
        best = self._best_weights(stage)
        return self._selected(best, model).variables if best else last

    def ensure_evaluated(
        self,
        stage: Stage,
        model: CompiledModel,
        variables: Variables,
        weights_hash: str,
        is_of_older_code: bool,
        student: Variables | None = None,
    ) -> None:
        """Evaluates a finished stage if its row is missing, or is of other weights.

        Args:
            stage, model: the stage and its network.
            variables: its reported weights.
            weights_hash: of these.
            is_of_older_code: the stage was trained by code that did not write the weights of rows.
            student: the weights of the trained network, where they are others.
        """
        row = self.find_row(
            stage, model, weights_hash=weights_hash, may_be_unknown=is_of_older_code
        )
        if row is None:
            if self.weights_step(stage) != stage.steps:
                student = None
            evaluation = self._evaluate(stage, model, stage.steps, variables, student)
            self._record(stage, model, evaluation)
        self._ensure_held_out_counted(stage, model, variables)

    def record_imported(
        self, stage: Stage, model: CompiledModel, variables: Variables, source: Candidate | None
    ) -> None:
        """Writes the row of a stage that another run trained.

        Args:
            stage, model: of this run.
            variables: the reported weights, for this run's network.
            source: how the other run selected them; None where they are its last weights.
        """
        if source and (best := self._best_weights(stage)):
            best.write(dataclasses.replace(source, variables=variables))
        self._record(stage, model, self._evaluate(stage, model, stage.steps, variables))
        self._ensure_held_out_counted(stage, model, variables)

    def scored_stage(self, stage: Stage, model: CompiledModel) -> kept_stage.ScoredStage:
        """Returns the scores of a finished stage, from its row and its pixel counts by image.

        Raises:
            UserError: a file of these counts is not readable.
        """
        row = self.find_row(stage, model)
        evaluated = kept_stage.Score(row.miou, self._evaluated_counts(stage, row)) if row else None
        held_out = None
        if self._dataset.evaluation_is_held_out:
            held_out = evaluated
        elif counts := self._held_out_counts(stage):
            iou = counts.iou(len(self._dataset.classes))
            held_out = kept_stage.Score(float(np.nanmean(iou)), counts)
        return kept_stage.ScoredStage(stage.kind, stage.round, evaluated, held_out)

    def _evaluated_counts(self, stage: Stage, row: ResultRow) -> ImageCounts | None:
        """Returns the pixel counts by image that a row was computed from; None if they are lost."""
        counts = image_counts.read(stage.folder / image_counts.EVALUATED)
        num_classes = len(self._dataset.classes)
        if counts is None or not counts.are_of(_ids(self._dataset.evaluation), num_classes):
            return None
        # They may be of an evaluation by another protocol.
        same = [None if np.isnan(v) else v for v in counts.iou(num_classes)] == list(row.iou)
        return counts if same and self.results.is_of(row, counts.weights_hash) else None

    def _held_out_counts(self, stage: Stage, weights_hash: str | None = None) -> ImageCounts | None:
        """Returns the pixel counts of the images that weights are selected by; None if missing.

        Args:
            stage: the stage.
            weights_hash: of the weights that the counts must be of; None for any.
        """
        counts = image_counts.read(stage.folder / image_counts.HELD_OUT)
        num_classes = len(self._dataset.classes)
        if counts is None or not counts.are_of(_ids(self._dataset.selection), num_classes):
            return None
        return counts if weights_hash in (None, counts.weights_hash) else None

    def _ensure_held_out_counted(
        self, stage: Stage, model: CompiledModel, variables: Variables
    ) -> None:
        """Evaluates a finished stage on the images that select weights, if they choose stages too.

        Args:
            stage, model: the stage and its network.
            variables: its reported weights.
        """
        if not self._dataset.selection or self._config.rounds.keep != kept_stage.BEST_ON_HOLDOUT:
            return
        weights_hash = _weights_hash(variables)

        def is_counted() -> bool:
            return self._held_out_counts(stage, weights_hash) is not None

        if not multihost.broadcast_from_main(f"hold-out of {stage.name} looked for", is_counted):
            score = model.select(variables)
            if multihost.is_main():
                counts = ImageCounts(weights_hash, score.counts_by_image)
                image_counts.write(stage.folder / image_counts.HELD_OUT, counts)

    def weights_step(self, stage: Stage) -> int:
        """The step of the reported weights of a stage that has ended."""
        best = self._best_weights(stage)
        return best.step if best else stage.steps

    def _best_weights(self, stage: Stage) -> BestWeights | None:
        """Where the best weights of a stage are stored; None if its last weights are reported."""
        config = self._config.eval
        return None if config.select == "last" else BestWeights(stage.folder, config.every)

    def _selected(self, best: BestWeights, model: CompiledModel) -> Candidate:
        selected = best.load(model.shapes, self._mesh)
        logger.info(
            f"the weights of step {selected.step} are reported; mIoU {100 * selected.miou:.2f} on "
            "the images that they were selected by"
        )
        return selected

    def _evaluate(
        self,
        stage: Stage,
        model: CompiledModel,
        step: int,
        variables: Variables,
        student: Variables | None = None,
    ) -> Evaluation:
        """Evaluates weights of a stage; at its end all images of the report are drawn."""
        final = step == stage.steps
        images = artifacts.PredictionSink(self._workdir, stage.folder, self._dataset, final)
        score = model.evaluate(variables, images.shown, images)
        student_miou = None if student is None else model.evaluate(student).miou
        unlabeled = self._evaluate_on_unlabeled(model, variables)
        return Evaluation(step, variables, score, images, student_miou, unlabeled)

    def _evaluate_on_unlabeled(
        self, model: CompiledModel, variables: Variables
    ) -> evaluate.Score | None:
        """The score on the unlabelled images whose masks are known; None if there are none."""
        if self._truth is None:
            return None
        backbone = model.model_config.backbone
        if backbone not in self._truth_evaluators:
            self._truth_evaluators[backbone] = evaluate.Evaluator(
                model.model, self._truth, self._config.eval, self._mesh, model.pad_value
            )
        return self._truth_evaluators[backbone](variables)

    def _record(self, stage: Stage, model: CompiledModel, evaluation: Evaluation) -> ResultRow:
        """Writes what an evaluation found: its row, metrics, and files for the report."""
        step, score = evaluation.step, evaluation.score
        final = step == stage.steps
        protocol = self.protocol(model)
        weights_hash = _weights_hash(evaluation.variables)
        domain = stages.batch_spec(self._config, stage.kind).domain
        norms = artifacts.norm_statistics(
            evaluation.variables, DOMAINS if domain == "both" else (domain,)
        )
        if final and multihost.is_main():
            # Before the row: a stage that has its row is not evaluated again.
            artifacts.write_evaluation(stage.folder, score, self._dataset, protocol.to_json())
            artifacts.write_norms(stage.folder, norms)
            counts = ImageCounts(weights_hash, score.counts_by_image)
            image_counts.write(stage.folder / image_counts.EVALUATED, counts)
        weights_step = self.weights_step(stage) if final else step
        row = ResultRow.of_score(stage.kind, stage.round, step, score, protocol, weights_step)
        row = dataclasses.replace(
            row,
            student_miou=evaluation.student_miou,
            labels=self._label_health(stage) if final else None,
        )
        if unlabeled := evaluation.unlabeled:
            accuracy = metrics.pixel_accuracy(unlabeled.confusion)
            row = dataclasses.replace(
                row, unlabeled_miou=unlabeled.miou, unlabeled_pixel_accuracy=accuracy
            )
        self.results.add(row, final, weights_hash)
        at_step = "" if final else f"step {step}: "
        logger.info(f"{at_step}mIoU {100 * score.miou:.2f} on {self._dataset.evaluated_on}")
        by_class = zip(self._dataset.classes, score.iou, strict=True)
        scalars = {"miou": score.miou} | {f"iou/{k}": v for k, v in by_class if v is not None}
        if row.student_miou is not None:
            scalars["miou_student"] = row.student_miou
            logger.info(f"{at_step}mIoU {100 * row.student_miou:.2f} of the student itself")
        if row.unlabeled_miou is not None and row.unlabeled_pixel_accuracy is not None:
            scalars["miou_unlabeled"] = row.unlabeled_miou
            scalars["pixel_accuracy_unlabeled"] = row.unlabeled_pixel_accuracy
            logger.info(
                f"{at_step}mIoU {100 * row.unlabeled_miou:.2f} on the unlabelled images, "
                f"{100 * row.unlabeled_pixel_accuracy:.2f} % of their pixels right"
            )
        writer = metric_writer.MetricWriter(stage.folder)
        writer.write_scalars(step, scalars)
        artifacts.write_summaries(writer, step, evaluation.images, norms)
        writer.close()
        return row

    def _label_health(self, stage: Stage) -> dict[str, Any] | None:
        """The health of the labels that a stage made inside its steps; None if it made none."""
        method = stages.online_method(self._config, stage.kind)
        if method is None:
            return None

        def summarize() -> dict[str, Any] | None:
            lines = metric_writer.read_metrics(stage.folder)
            health = label_health.summarize(lines, stage.steps, self._dataset.classes, method)
            return dataclasses.asdict(health) if health else None

        return multihost.broadcast_from_main(f"labels of {stage.name}", summarize)


def _ids(examples: Sequence[Example]) -> list[str]:
    return [example.id for example in examples]


def _weights_hash(variables: Variables) -> str:
    """The hash of weights, the same in every process."""
    return multihost.broadcast_from_main("evaluated weights", lambda: variables_hash(variables))
