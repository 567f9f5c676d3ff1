"""Algorithm 1: teacher, then rounds of pseudo-labels and student; resumable at any point.

    teacher <- cross-entropy on the labelled images
    repeat: pseudo-labels <- teacher; student <- both kinds of image; teacher <- student

Source: Yuan et al., ICCV 2021, section 2.1, Algorithm 1.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from rich import box
from rich.table import Column, Table

from semiseg_jax import (
    checkpoints,
    config_check,
    fitted_settings,
    optim,
    pseudo_label_stats,
    stages,
    train,
    train_state,
)
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.comparison import kept_stage
from semiseg_jax.comparison.kept_stage import KeptStage
from semiseg_jax.compiled_model import CompiledModel
from semiseg_jax.data import input_pipeline, load, size_settings
from semiseg_jax.data.data_record import DataRecord
from semiseg_jax.models import deeplab, pretrained, published_weights
from semiseg_jax.pseudo_labels import CONFIDENCE, PSEUDO_LABELS, restrict_to_labeled
from semiseg_jax.reporting import artifacts, page
from semiseg_jax.results import ResultRow, Results, print_table
from semiseg_jax.run_observer import RunObserver
from semiseg_jax.runtime import fileio, metric_writer, multihost, paths
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import RunConsole, log_prefix, logger
from semiseg_jax.serving import model_bundle
from semiseg_jax.stage_evaluator import StageEvaluator
from semiseg_jax.stages import Stage
from semiseg_jax.train_state import TrainState, Variables

# Drawing takes seconds. The end of a run always writes a report.
SECONDS_BETWEEN_REPORTS = 60.0


def run(
    config: Any,
    workdir: epath.PathLike,
    observer: RunObserver | None = None,
    choose_settings: Callable[[Any], Any] = lambda config: config,
) -> Results:
    """Runs Algorithm 1 as configured, from wherever the workdir stands.

    Args:
        config: as configs/default.py declares it.
        workdir: for everything that is written.
        observer: is told how far the run is.
        choose_settings: from the config, with what an earlier start chose, to the config to run; is
            called once, while the workdir is locked.

    Returns:
        The rows of results.json.

    Raises:
        UserError: bad data or config, or a workdir of another config or of other data, or in use.
        Preempted: the run was asked to stop; the same call goes on.
    """
    # The commands have done both before they connect processes; a program that calls this has not.
    config = config.copy_and_resolve_references()
    paths.expand_home_in_config(config)
    config_check.check(config)
    with workdir_lib.locked(workdir):
        fitted_settings.forget_unless_begun(workdir)
        given = fitted_settings.restore(workdir, config)
        chosen = size_settings.choose(given)
        config = choose_settings(size_settings.with_values(given, chosen.values))
        training = open_run(config, epath.Path(workdir))
        # Only now, as the other files of the workdir: see `open_run`.
        fitted_settings.record(workdir, given, chosen.values, chosen.sentence)
        training.start_observing(observer or RunObserver())
        teacher: TrainedStage | None = None
        first_teacher: TrainedStage | None = None
        for stage in training.stages:
            start_from = first_teacher if stage.kind == "control" else teacher
            trained = training.restore_stage(stage, start_from)
            if trained is None:
                labels = None
                if stage.needs_pseudo_labels and start_from:
                    labels = training.label(start_from, stage)
                trained = training.train_stage(stage, start_from, labels)
            if stage.kind == "teacher":
                first_teacher = trained
            if stage.kind != "control":
                teacher = trained
        assert teacher is not None  # a run has a teacher or a student
        choice = training.choose_stage()
        is_last = (choice.stage, choice.round) == (teacher.stage.kind, teacher.stage.round)
        kept = teacher if is_last else training.load_stage(choice)
        training.save_model_bundle(kept, choice)
        training.print_results(choice)
        return training.results


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A finished stage and its reported weights; `weights_hash` is the hash of these."""

    stage: Stage
    variables: Variables
    model: CompiledModel
    weights_hash: str


def open_run(config: Any, workdir: epath.Path) -> "SelfTraining":
    """Opens a new or an earlier run: checks all that can be checked before anything is trained.

    Raises:
        UserError: as `run`.
    """
    multihost.broadcast_from_main("config", lambda: workdir_lib.check_config(workdir, config))
    weights = find_initial_weights(config)
    multihost.broadcast_from_main(
        "weights known", lambda: workdir_lib.check_pretrained(workdir, weights)
    )
    training = SelfTraining(config, workdir, weights)
    training.check_pretrained()
    training.check_fits_memory()
    # Only now: a run that cannot start leaves the folder to its corrected config.
    training.remove_outdated_rows()
    if multihost.is_main():
        workdir_lib.write_config(workdir, config)
        workdir_lib.write_data(workdir, training.dataset)
        workdir_lib.write_pretrained(workdir, weights)
        training.write_run_info()
    return training


def find_initial_weights(config: Any) -> dict[str, Any]:
    """Finds, and downloads where necessary, the initial weights of a run's networks.

    Process 0 downloads first: the others find the file in the cache, if they share its disk, and
    otherwise download it themselves.

    Returns:
        A description of the weights by backbone; see `published_weights.describe`.

    Raises:
        UserError: the weights cannot be found, or differ between the hosts.
    """
    kinds = stages.trained_kinds(config)
    backbones = sorted({stages.stage_backbone(config, kind) for kind in kinds})
    with multihost.main_first("initial weights"):
        by_backbone = {
            b: published_weights.describe(deeplab.config_for(config, b)) for b in backbones
        }
    weights = {b: description for b, description in by_backbone.items() if description}
    for other in multihost.all_gather("initial weights of each host", weights):
        for backbone, description in other.items():
            if description["sha256"] != weights[backbone]["sha256"]:
                raise UserError(
                    f"The initial weights of {backbone} ({description['name']}) differ between the "
                    "hosts of this run: copy the file of one host to all.",
                    code="pretrained-differs-between-hosts",
                )
    return weights


def check_unlabeled(config: Any, dataset: load.Dataset) -> None:
    """Refuses a run whose students would have no unlabelled image.

    Raises:
        UserError: it has none.
    """
    if stages.takes_unlabeled_images(config) and not dataset.unlabeled:
        raise UserError(
            "There is no unlabelled image: give data.unlabeled_list or data.unlabeled_dir, "
            "or train the teacher alone with rounds.count=0.",
            code="unlabeled-images-missing",
        )


class SelfTraining:
    """One run of Algorithm 1 over a workdir: its data, networks, stages and results.

    Attributes:
        dataset: the images.
        stages: what is trained, in this order.

    Args:
        config: the whole config.
        workdir: of the run.
        weights: from `find_initial_weights`.
    """

    def __init__(self, config: Any, workdir: epath.Path, weights: dict[str, Any] | None = None):
        self._config = config
        self._initial_weights = weights or {}
        self._workdir = workdir
        self._mesh = mesh_lib.make_mesh()
        self._observer = RunObserver()
        self._report_time = time.monotonic()
        # Not functools.cache, which would keep every run of a sweep until its end.
        self._models: dict[str, CompiledModel] = {}
        self._console = RunConsole(highlight=False, soft_wrap=True, quiet=not multihost.is_main())
        # The files at the first start; None in new workdirs and in those of older code.
        self._recorded = workdir_lib.share_record(workdir)
        self.dataset = load.load_dataset(config, self._recorded)
        multihost.broadcast_from_main(
            "data known", lambda: workdir_lib.check_data(workdir, self.dataset)
        )
        self.dataset = restrict_to_labeled(self.dataset, self._first_labels)
        check_unlabeled(self._config, self.dataset)
        mesh_lib.check_batches(config, self._mesh.size)
        stages.check_norm_values(config)
        stages.check_method(config, self._mesh.size)
        self._evaluator = StageEvaluator(config, workdir, self.dataset, self._mesh)
        self.stages = stages.schedule(config, workdir, self._earlier_controls())
        self._log_start()

    def start_observing(self, observer: RunObserver) -> None:
        """Has an observer told how far the run is, from now on."""
        self._observer = observer
        observer.on_run(self._config, self.dataset, self._mesh, self.stages)

    @property
    def _first_labels(self) -> epath.Path:
        """The folder of the teacher's label maps, whose manifest names the unlabelled images."""
        return self._workdir / "round_0" / "teacher" / PSEUDO_LABELS

    def remove_outdated_rows(self) -> None:
        """Removes the result rows of evaluation files that have changed; logs the first file.

        Raises:
            UserError: the weights of the stages were selected by these results.
        """
        before, now = self._recorded, self.dataset.record
        evaluated = self.dataset.evaluation_hash
        if before is None or now is None or evaluated not in before.evaluation:
            return
        if before.evaluation[evaluated] == now.evaluation[evaluated]:
            return
        names = ("evaluation", "holdout")
        changed = before.first_change(now, names)
        if changed is None:
            if any(before.ids(name) == now.ids(name) for name in names if now.ids(name)):
                return  # Files were only encoded again, with the same pixels.
            # The evaluation set that was recorded last is another one.
            changed = "a file"
        if self._config.eval.select == "reported" and self.results.rows + self.results.curve:
            raise UserError(
                f"{changed} of the evaluation set was changed since {self._workdir} was begun, and "
                "eval.select is reported, so that weights were selected by it: restore it, or give "
                "another --workdir.",
                code="selecting-evaluation-file-changed",
            )
        logger.info(
            f"Warning: {changed} of the evaluation set was changed since the last start: all "
            "stages are evaluated again."
        )
        splits = self.dataset.split_hash

        def is_outdated(row: ResultRow) -> bool:
            name = row.protocol.evaluation_hash
            return row.protocol.split_hash == splits if name is None else name == evaluated

        self.results.remove(is_outdated)

    def _verify_files(self) -> None:
        """Refuses files that were changed during the run; leaves out lost unlabelled images.

        Raises:
            UserError: as `load.verify`, or a pseudo-labelled image or all unlabelled ones are lost.
        """
        verified = load.verify(self.dataset, self._config.data.cache_dir)
        self.dataset = restrict_to_labeled(verified, self._first_labels)
        check_unlabeled(self._config, self.dataset)

    @property
    def results(self) -> Results:
        """The rows of results.json."""
        return self._evaluator.results

    def _earlier_controls(self) -> list[int]:
        """Rounds of finished controls from when fewer rounds were configured."""

        def finished() -> list[int]:
            rounds = range(1, self._config.rounds.count)
            folders = {n: self._workdir / f"round_{n}" / "control" for n in rounds}
            return [n for n, folder in folders.items() if (folder / stages.DONE).exists()]

        return multihost.broadcast_from_main("earlier controls", finished)

    def _log_start(self) -> None:
        data, crop = self.dataset, tuple(self._config.data.crop)
        count = multihost.process_count()
        processes = f" of {count} processes" if count > 1 else ""
        logger.info(
            f"{data.name}: {len(data.labeled)} labelled, {len(data.unlabeled)} unlabelled, "
            f"{len(data.evaluation)} {data.evaluated_on} images, {len(data.classes)} classes; "
            f"{self._mesh.size} {self._mesh.devices.flat[0].platform} device(s)"
            f"{processes}; {self._workdir}"
        )
        if dead_rates := deeplab.dead_aspp_rates(self._config.model, crop):
            logger.info(
                f"Warning: crops of {crop[1]}x{crop[0]} are too small to "
                f"train the outer taps of model.aspp_rates {dead_rates}, which larger images will "
                "meet: lower these rates or enlarge data.crop."
            )

    def check_pretrained(self) -> None:
        """Refuses pretrained weights that do not fit, those of students too."""
        for kind in stages.trained_kinds(self._config):
            model = self._model(kind)
            if path := published_weights.path(model.model_config):
                pretrained.check(path, model.shapes)

    def check_fits_memory(self) -> None:
        """Refuses a config whose step does not fit into the memory of a device.

        Not on the CPU, whose compiler knows no limit.
        """
        if mesh_lib.platform(self._mesh) == "cpu":
            return
        crop = tuple(self._config.data.crop)
        for kind in stages.trained_kinds(self._config):
            steps = stages.stage_steps(self._config.train, kind, 1)
            program = self._model(kind).program(kind, steps)
            train.check_fits_memory(kind, train.trace_step(program, crop, self._mesh))

    def write_run_info(self) -> None:
        """Writes run.json: what the run is made on, for people."""
        artifacts.write_run(self._workdir, self.dataset, self._mesh)

    def _model(self, kind: str) -> CompiledModel:
        """The network of a kind of stage, built and printed at the first call."""
        backbone = stages.stage_backbone(self._config, kind)
        if backbone not in self._models:
            model = CompiledModel(self._config, backbone, self.dataset, self._mesh)
            table = Table("part", Column("parameters", justify="right"), "", box=box.SIMPLE_HEAD)
            for part, count, note in deeplab.parameter_table(model.model_config, model.shapes):
                table.add_row(part, f"{count:,}", note)
            self._console.print(table)
            self._models[backbone] = model
        return self._models[backbone]

    def restore_stage(
        self, stage: Stage, teacher: TrainedStage | None = None
    ) -> TrainedStage | None:
        """A stage that was trained before, or None; writes its result row if that is missing.

        Args:
            stage: to restore.
            teacher: the stage that it starts from; None for the first stage.

        Raises:
            UserError: its weights are not those that it ended with, or its teacher's are not those
                that it was trained from.
        """
        if not multihost.broadcast_from_main(f"{stage.name} looked for", lambda: stage.is_done):
            return None
        model = self._model(stage.kind)
        with log_prefix(stage.log_prefix):
            marker = _read_marker(stage)
            if marker is None:
                logger.info(f"{stages.DONE} is damaged: the stage goes on at its last checkpoint")
                return None
            program = model.program(stage.kind, stage.steps)
            state = train.restore(stage, program, self._mesh)
            if state is None:
                logger.info(
                    f"the checkpoint of step {stage.steps} is missing: its steps are trained again"
                )
                return None
            variables = self._evaluator.reported_weights(stage, model, program.reported(state))
            expected = _describe_end(stage, state.variables, variables, teacher)
            _check_marker(marker, expected, stage)
            logger.info("done before")
            self._evaluator.ensure_evaluated(
                stage,
                model,
                variables,
                expected.reported,
                marker.is_of_older_code,
                program.student(state),
            )
        self._observer.on_end(stage)
        return TrainedStage(stage, variables, model, expected.reported)

    def train_stage(
        self,
        stage: Stage,
        teacher: TrainedStage | None = None,
        pseudo_labels: epath.Path | None = None,
    ) -> TrainedStage:
        """Trains and evaluates one stage, from wherever it stands.

        Args:
            stage: to train.
            teacher: the stage that it starts from; None for the first stage.
            pseudo_labels: the folder of its pseudo-labels; None where it takes none.
        """
        self._observer.on_stage(stage)
        self._verify_files()
        model = self._model(stage.kind)
        with log_prefix(stage.log_prefix):
            if stage.kind == "teacher" and self._config.rounds.teacher_from:
                last = variables = self._import_teacher(stage, model)
            else:
                logger.info(f"{stage.steps} steps")
                state = self._train(stage, model, teacher, pseudo_labels)
                last = state.variables
                program = model.program(stage.kind, stage.steps)
                with self._observer.evaluating():
                    variables = self._evaluator.evaluate_final(
                        stage, model, program.reported(state), program.student(state)
                    )
        marker = _describe_end(stage, last, variables, teacher)
        multihost.barrier(f"end of {stage.name}")
        if multihost.is_main():
            # The marker is the last thing that a stage writes.
            stage.write_marker(marker)
            if time.monotonic() - self._report_time > SECONDS_BETWEEN_REPORTS:
                page.update(self._workdir)
                self._report_time = time.monotonic()
        self._observer.on_end(stage)
        return TrainedStage(stage, variables, model, marker.reported)

    def _train(
        self,
        stage: Stage,
        model: CompiledModel,
        teacher: TrainedStage | None,
        pseudo_labels: epath.Path | None,
    ) -> TrainState:
        """The state after the last step of a stage."""
        config = self._config
        program = model.program(stage.kind, stage.steps)
        groups = optim.table(
            program.shapes["params"], config.optim.decay_all, config.model.freeze_backbone
        )
        absl_logging.info("Parameters by rule:\n%s", groups)
        examples = (
            input_pipeline.pseudo_examples(self.dataset, pseudo_labels) if pseudo_labels else ()
        )
        batches = functools.partial(
            input_pipeline.train_batches,
            config,
            self.dataset,
            examples,
            program.spec,
            stage.seed,
            pad_value=model.pad_value,
            groups=self._mesh.size,
            process_index=multihost.process_index(),
            process_count=multihost.process_count(),
        )

        def evaluate(step: int, state: TrainState) -> None:
            with self._observer.evaluating():
                self._evaluator.evaluate_at(
                    stage, model, step, program.reported(state), program.student(state)
                )

        return train.run(
            stage,
            program,
            init_variables=functools.partial(self._init_variables, model, stage, teacher),
            batches=batches,
            evaluate=evaluate,
            train_config=config.train,
            eval_every=config.eval.every,
            mesh=self._mesh,
            on_step=self._observer.on_step,
            feature_folder=paths.cache_dir(config.data) / "features",
        )

    def _init_variables(
        self, model: CompiledModel, stage: Stage, teacher: TrainedStage | None
    ) -> Variables:
        """Variables of step 0: the teacher's where they fit and are wanted, else fresh ones.

        Fresh variables take the pretrained weights of the network. In round 1 the strong norm
        starts as a copy of the weak norm; from then on it is kept.
        """
        wanted = stage.kind == "control" or self._config.rounds.student_init == "teacher"
        if teacher is None or teacher.model is not model or not wanted:
            seed = int(stage.seed[1]) & 0xFFFFFFFF
            variables = train_state.init_variables(model.model, seed, self._mesh)
            if path := published_weights.path(model.model_config):
                variables, report = pretrained.load(path, variables)
                # Where published weights lie says nothing to their user.
                name = model.model_config.pretrained
                is_named = name in published_weights.NAMES
                source = f"{name} ({Path(path).name})" if is_named else path
                logger.info(f"{source}: {report}")
                for sentence in model.pretrained_mismatches:
                    logger.info(sentence)
            return variables
        if stage.kind == "student" and teacher.stage.kind == "teacher":
            return train_state.copy_weak_to_strong(teacher.variables)
        return teacher.variables

    def label(self, teacher: TrainedStage, student: Stage) -> epath.Path:
        """Labels the unlabelled images for a student and returns the folder of the label maps.

        Logs statistics of the labels, and a warning for each class that is about to vanish.
        """
        stage = teacher.stage
        folder = stage.folder / PSEUDO_LABELS

        def log_progress(done: int, total: int) -> None:
            # About ten lines.
            if done == total or done % max(total // 10, 1) < self._config.pseudo.batch:
                logger.info(f"{done}/{total} images")
            self._observer.on_images(done, total)

        self._observer.on_labels(student)
        with log_prefix(student.labeling_log_prefix):
            self._verify_files()
            step = self._evaluator.weights_step(stage)
            name = f"round_{stage.round}/{stage.kind}, step {step}"
            manifest = teacher.model.label(
                teacher.variables, name, folder, log_progress, self.dataset.left_out
            )
            earlier = None
            if stage.kind == "student":
                before = next(s for s in self.stages if s.round == stage.round - 1)
                earlier = before.folder / PSEUDO_LABELS
            for line in pseudo_label_stats.write_stats(folder, manifest, self.dataset, earlier):
                logger.info(line)
        if multihost.is_main():
            artifacts.write_pseudo(stage.folder, folder, manifest, self.dataset)
        return folder

    def _import_teacher(self, stage: Stage, model: CompiledModel) -> Variables:
        """Takes the teacher of another run (`rounds.teacher_from`) instead of training it.

        The result is the same as if this run had trained the teacher: the two configs may differ
        only in keys that no teacher depends on, or in the kind of norm, of which a teacher uses the
        weak one. Programs of another kind of norm may add in another order, so that the last bits
        differ there. Label maps are imported too; those that the settings of this run would not
        give are made again when they are needed.

        Args:
            stage: the teacher of this run.
            model: its network.

        Returns:
            The reported weights.

        Raises:
            UserError: the other run has no such teacher.
        """
        source = epath.Path(self._config.rounds.teacher_from)
        norm = multihost.broadcast_from_main(
            "teacher to import",
            lambda: workdir_lib.check_teacher(source, self._config, self.dataset),
        )
        multihost.broadcast_from_main(
            "weights of the teacher to import",
            lambda: workdir_lib.check_pretrained(source, self._initial_weights),
        )
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.model.norm = norm
        source_model = CompiledModel(
            config, stages.stage_backbone(config, "teacher"), self.dataset, self._mesh
        )
        source_stage = dataclasses.replace(stage, folder=source / "round_0" / "teacher")
        with workdir_lib.locked(source):
            program = source_model.program("teacher", stage.steps)
            marker = _read_marker(source_stage)
            state = train.restore(source_stage, program, self._mesh)
            if marker is None or state is None:
                lost = f"no checkpoint of step {stage.steps}" if marker else "a damaged DONE"
                raise UserError(
                    f"The teacher in {source} (rounds.teacher_from) has {lost}: run its own "
                    "command again, or name another workdir.",
                    code="teacher-checkpoint-missing",
                )
            last = variables = state.variables
            selected = None
            if self._config.eval.select != "last":
                best = checkpoints.BestWeights(source_stage.folder, self._config.eval.every)
                selected = best.load(source_model.shapes, self._mesh)
                variables = selected.variables
            _check_marker(marker, _describe_end(source_stage, last, variables), source_stage)
            variables = train_state.match_norm_kind(variables, model.shapes)
            recorded = workdir_lib.read_record(source)
            self._copy_teacher_files(stage, source_stage, variables, model, recorded)
        logger.info(f"taken from {source_stage.folder}")
        self._evaluator.record_imported(stage, model, variables, selected)
        return variables

    def _copy_teacher_files(
        self,
        stage: Stage,
        source: Stage,
        variables: Variables,
        model: CompiledModel,
        recorded: DataRecord | None,
    ) -> None:
        """Writes a checkpoint, and copies history and label maps.

        Args:
            stage, source: the teacher of this run, and of the other one.
            variables: its reported weights.
            model: its network.
            recorded: the files of the other run, None in one of older code. Label maps of images
                with other content in this run are not copied.
        """
        tx = model.program("teacher", stage.steps).tx
        state = train_state.create_train_state(variables, tx, self._mesh)
        step = jax.device_put(np.int32(stage.steps), mesh_lib.replicated(self._mesh))
        with checkpoints.Checkpoints(stage.folder / "checkpoints", stage.seed) as manager:
            manager.save(stage.steps, dataclasses.replace(state, step=step))
        metric_writer.copy_metrics(source.folder, stage.folder)
        unlabeled = self.dataset.unlabeled if stages.takes_pseudo_labels(self._config) else ()
        folders = (PSEUDO_LABELS, *[CONFIDENCE] * self._config.pseudo.keep_confidence)
        own = self.dataset.record
        if recorded and own:
            same = (e for e in unlabeled if own.has_same_image(recorded, "unlabeled", e.id))
            unlabeled = tuple(same)
        for example, folder in itertools.product(multihost.local_shard(unlabeled), folders):
            name = f"{folder}/{example.id}.png"
            if (source.folder / name).exists():
                content = (source.folder / name).read_bytes()
                # As where they are made: a damaged label map is noticed later, a confidence map
                # is not.
                fileio.write_bytes(stage.folder / name, content, sync=folder != PSEUDO_LABELS)

    def choose_stage(self) -> KeptStage:
        """Returns which finished stage's weights to write to model/, by `rounds.keep`."""

        def decide() -> dict[str, Any]:
            scored = [self._evaluator.scored_stage(s, self._model(s.kind)) for s in self.stages]
            return dataclasses.asdict(
                kept_stage.decide(scored, self._config.rounds.keep, self.dataset)
            )

        return KeptStage(**multihost.broadcast_from_main("kept stage", decide))

    def load_stage(self, choice: KeptStage) -> TrainedStage:
        """Returns a finished stage with its reported weights, from its folder.

        Raises:
            UserError: its checkpoint was removed since the stage ended.
        """
        stage = next(s for s in self.stages if (s.kind, s.round) == (choice.stage, choice.round))
        model = self._model(stage.kind)
        program = model.program(stage.kind, stage.steps)
        state = train.restore(stage, program, self._mesh)
        if state is None:
            raise UserError(
                f"{stage.folder / 'checkpoints'} has no intact checkpoint of step {stage.steps}, "
                f"which {model_bundle.FOLDER}/ is to be made of: start the same command again, "
                "which trains its steps again.",
                code="kept-stage-checkpoint-missing",
            )
        with log_prefix(stage.log_prefix):
            variables = self._evaluator.reported_weights(stage, model, program.reported(state))
        weights_hash = _describe_end(stage, state.variables, variables).reported
        return TrainedStage(stage, variables, model, weights_hash)

    def save_model_bundle(self, final: TrainedStage, choice: KeptStage) -> None:
        """Writes model/: the weights with the weak norm alone, and all that inference needs.

        Args:
            final: the stage whose weights are kept.
            choice: says why.
        """
        sizes = set(input_pipeline.image_sizes(self.dataset.evaluation))
        if multihost.is_main():
            row = self._evaluator.find_row(final.stage, final.model)
            assert row is not None  # every stage that ends has written one
            description = model_bundle.describe(
                final.model.model_config,
                self._config.eval,
                self.dataset.classes,
                self.dataset.palette,
                {
                    "data": self.dataset.name,
                    "labeled": len(self.dataset.labeled),
                    "unlabeled": len(self.dataset.unlabeled),
                },
                row,
                sizes,
                self._config.data.downscale,
                self._initial_weights.get(final.model.model_config.backbone),
                dataclasses.asdict(choice),
            )
            folder = self._workdir / model_bundle.FOLDER
            weights = train_state.inference_variables(final.variables)
            digest = checkpoints.save_weights(folder / model_bundle.WEIGHTS, weights, description)
            description[model_bundle.WEIGHTS_HASH] = digest
            content = json.dumps(description, indent=1) + "\n"
            fileio.write_bytes(folder / model_bundle.DESCRIPTION, content.encode())
            page.update(self._workdir)

    def print_results(self, choice: KeptStage) -> None:
        """Prints which stage is kept and why, and then the rows of this run as a table."""
        if choice.sentence:
            logger.info(choice.sentence)
        protocol = self._evaluator.protocol(self._model("teacher"))
        rows = [row for row in self.results.rows if row.protocol.is_comparable(protocol)]
        print_table(rows, self.dataset.classes, self._console)


def _read_marker(stage: Stage) -> stages.Marker | None:
    """The marker of a finished stage, the same in every process; None if it is damaged."""

    def read() -> dict[str, Any] | None:
        marker = stage.read_marker()
        return dataclasses.asdict(marker) if marker else None

    content = multihost.broadcast_from_main(f"marker of {stage.name}", read)
    return stages.Marker(**content | {"seed": tuple(content["seed"])}) if content else None


def _describe_end(
    stage: Stage, last: Variables, reported: Variables, teacher: TrainedStage | None = None
) -> stages.Marker:
    """The marker of a stage that has these weights, the same in every process.

    Args:
        stage: that has ended.
        last: the weights after its last step.
        reported: its reported weights; `last` itself unless they are selected.
        teacher: the stage that it starts from; None for the first stage.
    """

    def hash_weights() -> list[str]:
        of_last = train_state.variables_hash(last)
        return [of_last, of_last if reported is last else train_state.variables_hash(reported)]

    weights, of_reported = multihost.broadcast_from_main(f"weights of {stage.name}", hash_weights)
    teacher_hash = teacher.weights_hash if teacher else ""
    return stages.Marker(tuple(stage.seed.tolist()), weights, of_reported, teacher_hash)


def _check_marker(marker: stages.Marker, expected: stages.Marker, stage: Stage) -> None:
    """Refuses a finished stage whose weights are not those that it ended with.

    Args:
        marker: of the stage; one of older code is not compared.
        expected: what the marker would be for the weights in the workdir.
        stage: the stage.

    Raises:
        UserError: the two differ.
    """
    if marker.is_of_older_code or marker == expected:
        return
    if marker.seed != expected.seed:
        raise UserError(
            f"{stage.folder} is of a run with another seed, or of another stage: put the stage's "
            "own folder in its place, or remove it, and the stage is trained again.",
            code="stage-of-another-run",
        )
    if (marker.weights, marker.reported) != (expected.weights, expected.reported):
        is_last = marker.weights != expected.weights
        name = f"checkpoints/{stage.steps}" if is_last else checkpoints.BEST_WEIGHTS
        raise UserError(
            f"{stage.folder / name} does not hold the weights that {stage.name} ended with: "
            f"restore it, or remove {stage.folder}, and the stage is trained again.",
            code="stage-weights-changed",
        )
    raise UserError(
        f"{stage.folder} was trained from other weights of the stage before it than the workdir "
        f"holds now: restore these, or remove {stage.folder} and the rounds after it, which are "
        "trained again.",
        code="stage-of-another-teacher",
    )
