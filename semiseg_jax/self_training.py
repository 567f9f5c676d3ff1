"""Algorithm 1: teacher, then rounds of pseudo-labels and student; resumable at any point.

    teacher <- cross-entropy on the labelled images
    repeat: pseudo-labels <- teacher; student <- both kinds of image; teacher <- student

Source: Yuan et al., ICCV 2021, section 2.1, Algorithm 1.
"""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Column, Table

from semiseg_jax import (
    checkpoints,
    optim,
    pseudo_label_stats,
    stages,
    train,
    train_state,
)
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.compiled_model import CompiledModel
from semiseg_jax.data import input_pipeline, load
from semiseg_jax.models import deeplab, pretrained, published_weights
from semiseg_jax.pseudo_labels import CONFIDENCE, PSEUDO_LABELS
from semiseg_jax.reporting import artifacts, page
from semiseg_jax.results import Results, print_table
from semiseg_jax.runtime import fileio, metric_writer, multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import log_prefix, logger
from semiseg_jax.serving import model_bundle
from semiseg_jax.stage_evaluator import StageEvaluator
from semiseg_jax.stages import Stage
from semiseg_jax.train_state import Variables


def run(config: Any, workdir: epath.PathLike) -> Results:
    """Runs Algorithm 1 as configured, from wherever the workdir stands.

    Args:
        config: as configs/default.py declares it.
        workdir: for everything that is written.

    Returns:
        The rows of results.json.

    Raises:
        UserError: bad data or config, or a workdir of another config or of other data, or in use.
        Preempted: the run was asked to stop; the same call goes on.
    """
    with workdir_lib.locked(workdir):
        training = open_run(config, epath.Path(workdir))
        first, *later = training.stages
        teacher = first_teacher = training.restore_stage(first) or training.train_stage(first)
        for stage in later:
            start_from = first_teacher if stage.kind == "control" else teacher
            trained = training.restore_stage(stage)
            if trained is None:
                labels = training.label(start_from, stage) if stage.needs_pseudo_labels else None
                trained = training.train_stage(stage, start_from, labels)
            if stage.kind == "student":
                teacher = trained
        training.save_model_bundle(teacher)
        training.print_results()
        return training.results


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A finished stage and its reported weights."""

    stage: Stage
    variables: Variables
    model: CompiledModel


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
        found = {b: published_weights.describe(deeplab.config_for(config, b)) for b in backbones}
    weights = {backbone: description for backbone, description in found.items() if description}
    for here in multihost.all_gather("weights of all", weights):
        for backbone, description in here.items():
            if description["sha256"] != weights[backbone]["sha256"]:
                raise UserError(
                    f"The initial weights of {backbone} ({description['name']}) differ between the "
                    "hosts of this run: copy the file of one host to all.",
                    code="pretrained-differs-between-hosts",
                )
    return weights


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
        # Not functools.cache, which would keep every run of a sweep until its end.
        self._models: dict[str, CompiledModel] = {}
        self._console = Console(highlight=False, soft_wrap=True, quiet=not multihost.is_main())
        self.dataset = load.load_dataset(config)
        multihost.broadcast_from_main(
            "data known", lambda: workdir_lib.check_data(workdir, self.dataset)
        )
        if stages.takes_pseudo_labels(config) and not self.dataset.unlabeled:
            raise UserError(
                "There is no unlabelled image: give data.unlabeled_list or data.unlabeled_dir, "
                "or train the teacher alone with rounds.count=0.",
                code="unlabeled-images-missing",
            )
        mesh_lib.check_batches(config, self._mesh.size)
        self._evaluator = StageEvaluator(config, workdir, self.dataset, self._mesh)
        self.stages = stages.schedule(config, workdir, self._earlier_controls())
        self._log_start()

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

    def restore_stage(self, stage: Stage) -> TrainedStage | None:
        """A stage that was trained before, or None; writes its result row if that is missing."""
        if not multihost.broadcast_from_main(f"{stage.name} looked for", lambda: stage.is_done):
            return None
        model = self._model(stage.kind)
        with log_prefix(stage.log_prefix):
            variables = train.restore(stage, model.program(stage.kind, stage.steps), self._mesh)
            if variables is None:
                logger.info(f"its checkpoint of step {stage.steps} is missing: it is trained again")
                return None
            logger.info("done before")
            variables = self._evaluator.ensure_evaluated(stage, model, variables)
        return TrainedStage(stage, variables, model)

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
        model = self._model(stage.kind)
        with log_prefix(stage.log_prefix):
            if stage.kind == "teacher" and self._config.rounds.teacher_from:
                variables = self._import_teacher(stage, model)
            else:
                logger.info(f"{stage.steps} steps")
                last = self._train(stage, model, teacher, pseudo_labels)
                variables = self._evaluator.evaluate_final(stage, model, last)
        multihost.barrier(f"end of {stage.name}")
        if multihost.is_main():
            # The marker is the last thing that a stage writes.
            fileio.write_bytes(stage.folder / stages.DONE, b"")
            page.write(self._workdir)
        return TrainedStage(stage, variables, model)

    def _train(
        self,
        stage: Stage,
        model: CompiledModel,
        teacher: TrainedStage | None,
        pseudo_labels: epath.Path | None,
    ) -> Variables:
        """The weights after the last step of a stage."""
        config = self._config
        program = model.program(stage.kind, stage.steps)
        absl_logging.info("Parameters by rule:\n%s", optim.table(program.shapes["params"]))
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
        return train.run(
            stage,
            program,
            init_variables=functools.partial(self._init_variables, model, stage, teacher),
            batches=batches,
            evaluate=functools.partial(self._evaluator.evaluate_at, stage, model),
            train_config=config.train,
            eval_every=config.eval.every,
            mesh=self._mesh,
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
                logger.info(f"{path}: {report}")
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

        with log_prefix(student.labeling_log_prefix):
            step = self._evaluator.weights_step(stage)
            name = f"round_{stage.round}/{stage.kind}, step {step}"
            manifest = teacher.model.label(teacher.variables, name, folder, log_progress)
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
        weak one. Label maps are imported too; those that the settings of this run would not give
        are made again when they are needed.

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
            variables = train.restore(source_stage, program, self._mesh)
            if variables is None:
                raise UserError(
                    f"The teacher in {source} (rounds.teacher_from) has no checkpoint of step "
                    f"{stage.steps}: run its own command again, or name another workdir.",
                    code="teacher-checkpoint-missing",
                )
            selected = None
            if self._config.eval.select != "last":
                best = checkpoints.BestWeights(source_stage.folder, self._config.eval.every)
                selected = best.load(source_model.shapes, self._mesh)
                variables = selected.variables
            variables = train_state.match_norm_kind(variables, model.shapes)
            self._copy_teacher_files(stage, source_stage, variables, model)
        logger.info(f"taken from {source_stage.folder}")
        self._evaluator.record_imported(stage, model, variables, selected)
        return variables

    def _copy_teacher_files(
        self, stage: Stage, source: Stage, variables: Variables, model: CompiledModel
    ) -> None:
        """Writes a checkpoint, and copies history and label maps."""
        tx = model.program("teacher", stage.steps).tx
        state = train_state.create_train_state(variables, tx, self._mesh)
        step = jax.device_put(np.int32(stage.steps), mesh_lib.replicated(self._mesh))
        with checkpoints.Checkpoints(stage.folder / "checkpoints") as manager:
            manager.save(stage.steps, dataclasses.replace(state, step=step))
        metric_writer.copy_metrics(source.folder, stage.folder)
        unlabeled = self.dataset.unlabeled if stages.takes_pseudo_labels(self._config) else ()
        folders = (PSEUDO_LABELS, *[CONFIDENCE] * self._config.pseudo.keep_confidence)
        for example, folder in itertools.product(multihost.local_shard(unlabeled), folders):
            name = f"{folder}/{example.id}.png"
            if (source.folder / name).exists():
                content = (source.folder / name).read_bytes()
                # As where they are made: a damaged label map is noticed later, a confidence map
                # is not.
                fileio.write_bytes(stage.folder / name, content, sync=folder != PSEUDO_LABELS)

    def save_model_bundle(self, final: TrainedStage) -> None:
        """Writes model/: the weights with the weak norm alone, and all that inference needs."""
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
                self._initial_weights.get(final.model.model_config.backbone),
            )
            folder = self._workdir / model_bundle.FOLDER
            weights = train_state.inference_variables(final.variables)
            checkpoints.save_weights(folder / model_bundle.WEIGHTS, weights, description)
            content = json.dumps(description, indent=1) + "\n"
            fileio.write_bytes(folder / model_bundle.DESCRIPTION, content.encode())
            page.write(self._workdir)

    def print_results(self) -> None:
        """Prints the rows of this run as a table."""
        protocol = self._evaluator.protocol(self._model("teacher"))
        rows = [row for row in self.results.rows if row.protocol.is_comparable(protocol)]
        print_table(rows, self.dataset.classes, self._console)
