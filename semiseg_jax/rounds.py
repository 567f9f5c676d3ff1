"""Algorithm 1: teacher, then rounds of pseudo-labels and student; resumable at any point.

    teacher <- cross-entropy on the labelled images
    repeat: pseudo-labels <- teacher; student <- both kinds of image; teacher <- student

Source: Yuan et al., ICCV 2021, algorithm 1.
"""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Column, Table

from semiseg_jax import (
    checkpoints,
    deployed,
    distributed,
    evaluate,
    health,
    history,
    identity,
    interruption,
    lock,
    optim,
    record,
    report,
)
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax import train as training
from semiseg_jax.data import pipeline, sources, streams
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.network import Network
from semiseg_jax.pseudo_labels import CONFIDENCE, PSEUDO_LABELS
from semiseg_jax.results import Results, print_table
from semiseg_jax.scoring import Say, Scorer
from semiseg_jax.state import Variables
from semiseg_jax.train import DONE


def run(
    config: Any, workdir: epath.PathLike, asked: interruption.Asked = interruption.never
) -> Results:
    """Runs Algorithm 1 as configured, from wherever the workdir stands.

    Args:
        config: as configs/default.py declares it.
        workdir: for everything that is written.
        asked: whether to stop (see `interruption`).

    Returns:
        The rows of results.json.

    Raises:
        UserError: bad data or config, or a workdir of another config or of other data, or in use.
        Interrupted: that was asked for; the same call goes on.
    """
    with lock.held(workdir):
        return _run(config, epath.Path(workdir), asked)


def _run(config: Any, workdir: epath.Path, asked: interruption.Asked) -> Results:
    job = _begin(config, workdir, asked)
    first = teacher = job.teacher()
    # Controls of fewer students are of a time when no more were asked for.
    controls = [n for n in range(1, config.rounds.count) if job.is_done("control", n)]
    for round_ in range(1, config.rounds.count + 1):
        student = job.finished("student", round_)
        if student is None:
            pseudo = job.label(teacher) if job.takes_pseudo_labels else None
            student = job.train("student", round_, teacher, pseudo)
        teacher = student
    if config.rounds.control and config.rounds.count:
        # As long as all students together, from the same teacher.
        for count in (*controls, config.rounds.count):
            if job.finished("control", count) is None:
                job.train("control", count, first)
    job.keep_model(teacher)
    if distributed.is_main():
        report.write(workdir)
    job.print_table()
    return job.results


def teach(
    config: Any, workdir: epath.PathLike, asked: interruption.Asked = interruption.never
) -> "Trained":
    """The first part of `run`: the teacher, trained unless it is there; for others to adopt."""
    with lock.held(workdir):
        return _begin(config, epath.Path(workdir), asked).teacher()


def _begin(config: Any, workdir: epath.Path, asked: interruption.Asked) -> "Job":
    """A run whose workdir says what it is of."""
    distributed.agree("config", lambda: identity.refuse_other_config(workdir, config))
    job = Job(config, workdir, asked)
    job.refuse_weights()
    job.refuse_too_large()
    # Only now: a run that could not start leaves the folder to its corrected config.
    if distributed.is_main():
        identity.keep_config(workdir, config)
        identity.keep_data(workdir, job.dataset)
        job.keep_run()
    return job


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished stage: its place, and its variables."""

    stage: training.Stage
    variables: Variables
    network: Network


class Job:
    """One run of Algorithm 1 over a workdir."""

    def __init__(self, config: Any, workdir: epath.Path, asked: interruption.Asked):
        self._config = config
        self._asked = asked
        self._workdir = workdir
        self._mesh = mesh_lib.make_mesh()
        # Not by functools.cache, which would hold every run of a study to its end.
        self._networks: dict[str, Network] = {}
        self._console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
        self.dataset = sources.load(config, self._say)
        distributed.agree("data known", lambda: identity.refuse_other_data(workdir, self.dataset))
        both = (*config.data.weak_stream, *config.data.strong_stream)
        self.takes_pseudo_labels = bool(config.rounds.count) and "pseudo" in both
        if self.takes_pseudo_labels and not self.dataset.unlabeled:
            raise UserError(
                "There is no unlabelled image: give data.unlabeled_list or data.unlabeled_dir, "
                "or train the teacher alone with rounds.count=0."
            )
        mesh_lib.check_batches(config, self._mesh.size)
        self._scorer = Scorer(config, workdir, self.dataset, self._mesh)
        d = self.dataset
        several = distributed.count() > 1
        processes = f" of {distributed.count()} processes" if several else ""
        self._say(
            f"{d.name}: {len(d.labeled)} labelled, {len(d.unlabeled)} unlabelled, "
            f"{len(d.evaluation)} {d.evaluated_on} images, {len(d.classes)} classes; "
            f"{self._mesh.size} {self._mesh.devices.flat[0].platform} device(s)"
            f"{processes}; {workdir}"
        )
        if untrained := deeplab.untrained_rates(config.model, tuple(config.data.crop)):
            self._say(
                f"Warning: crops of {config.data.crop[1]}x{config.data.crop[0]} are too small to "
                f"train the outer taps of model.aspp_rates {untrained}, which larger images will "
                "meet: lower these rates or enlarge data.crop."
            )

    @property
    def results(self) -> Results:
        """The rows of results.json."""
        return self._scorer.results

    def refuse_weights(self) -> None:
        """Refuses pretrained weights that do not fit, those of students too."""
        for kind in ("teacher", "student") if self._config.rounds.count else ("teacher",):
            network = self._network(self._backbone(kind))
            if path := network.model_config.pretrained:
                pretrained.check(path, network.shapes)

    def refuse_too_large(self) -> None:
        """Refuses a config of which a stage's step does not fit into the devices' memory.

        Not on the CPU, whose compiler knows no limit.
        """
        if mesh_lib.platform(self._mesh) == "cpu":
            return
        crop = tuple(self._config.data.crop)
        for kind in ("teacher", "student") if self._config.rounds.count else ("teacher",):
            program = self._network(self._backbone(kind)).program(kind, self._stage(kind, 1).steps)
            training.refuse_too_large(kind, training.traced(program, crop, self._mesh))

    def keep_run(self) -> None:
        """Writes run.json, what the run is made on, for people."""
        record.keep_run(self._workdir, self.dataset, self._mesh)

    def _network(self, backbone: str) -> Network:
        """The network of a backbone, made and printed when first asked for."""
        if backbone not in self._networks:
            self._networks[backbone] = self._make_network(backbone)
        return self._networks[backbone]

    def _make_network(self, backbone: str) -> Network:
        network = Network(self._config, backbone, self.dataset, self._mesh, self._asked)
        table = Table("part", Column("parameters", justify="right"), "", box=box.SIMPLE_HEAD)
        for part, count, note in deeplab.parts(network.model_config, network.shapes):
            table.add_row(part, f"{count:,}", note)
        self._console.print(table)
        return network

    def _backbone(self, kind: str) -> str:
        student = self._config.rounds.student_model if kind == "student" else ""
        return student or self._config.model.backbone

    def _stage(self, kind: str, round_: int) -> training.Stage:
        num_steps = streams.stage_steps(self._config.train, kind, round_)
        seed = streams.stage_seed(self._config.seed, round_, kind)
        folder = self._workdir / f"round_{round_}" / kind
        return training.Stage(kind, round_, num_steps, seed, folder)

    def teacher(self) -> Trained:
        """The first teacher, trained unless it is there."""
        return self.finished("teacher", 0) or self.train("teacher", 0)

    def is_done(self, kind: str, round_: int) -> bool:
        """Whether a stage has been trained to its end."""
        stage = self._stage(kind, round_)
        return distributed.agree(f"{stage.name} looked for", (stage.folder / DONE).exists)

    def finished(self, kind: str, round_: int) -> Trained | None:
        """A stage that is done, with a result by the present protocol; else None."""
        if not self.is_done(kind, round_):
            return None
        stage = self._stage(kind, round_)
        say = self._sayer(kind, round_)
        network = self._network(self._backbone(kind))
        program = network.program(kind, stage.steps)
        variables = training.restore(stage, program, self._mesh, say)
        if variables is None:
            say(f"its checkpoint of step {stage.steps} is missing: it is trained again")
            return None
        say("done before")
        variables = self._scorer.again(stage, network, say, variables)
        return Trained(stage, variables, network)

    def train(
        self,
        kind: str,
        round_: int,
        teacher: Trained | None = None,
        pseudo: epath.Path | None = None,
    ) -> Trained:
        """Trains and evaluates one stage, from wherever it stands."""
        stage = self._stage(kind, round_)
        network = self._network(self._backbone(kind))
        say = self._sayer(kind, round_)
        say(f"{stage.steps} steps")
        last = self._train(stage, network, teacher, pseudo, say)
        variables = self._scorer.end(stage, network, say, last)
        _mark_done(stage)
        if distributed.is_main():
            report.write(self._workdir)
        return Trained(stage, variables, network)

    def _train(
        self,
        stage: training.Stage,
        network: Network,
        teacher: Trained | None,
        pseudo: epath.Path | None,
        say: Say,
    ) -> Variables:
        config = self._config
        program = network.program(stage.kind, stage.steps)
        logging.info("Parameters by rule:\n%s", optim.table(program.shapes["params"]))
        examples = pipeline.pseudo_examples(self.dataset, pseudo) if pseudo else ()
        batches = functools.partial(
            pipeline.train_batches,
            config,
            self.dataset,
            examples,
            program.streams,
            stage.seed,
            colour=deeplab.input_mean(network.model_config),
            groups=self._mesh.size,
            process_index=distributed.index(),
            process_count=distributed.count(),
        )
        return training.run(
            stage,
            program,
            start=functools.partial(self._start, network, stage, teacher, say),
            batches=batches,
            score=functools.partial(self._scorer.inside, stage, network, say),
            say=say,
            train_config=config.train,
            eval_every=config.eval.every,
            mesh=self._mesh,
            asked=self._asked,
        )

    def _start(
        self, network: Network, stage: training.Stage, teacher: Trained | None, say: Say
    ) -> Variables:
        """Variables of step 0: the teacher's where they fit and are wanted, else fresh ones.

        Fresh ones take the network's pretrained weights. At round 1 the strong norm is a copy of
        the weak one; from then on it is kept.
        """
        wanted = stage.kind == "control" or self._config.rounds.student_init == "teacher"
        if teacher is None or teacher.network is not network or not wanted:
            seed = int(stage.seed[1]) & 0xFFFFFFFF
            variables = state_lib.init_variables(network.model, seed, self._mesh)
            if path := network.model_config.pretrained:
                variables, loaded = pretrained.load(path, variables)
                say(f"{path}: {loaded}")
                for sentence in network.departures:
                    say(sentence)
            return variables
        if stage.kind == "student" and teacher.stage.kind == "teacher":
            return state_lib.copy_weak_to_strong(teacher.variables)
        return teacher.variables

    def adopt(self, teacher: Trained) -> None:
        """Takes the finished teacher of another run as this run's own, with history and label maps.

        Made again it would be the same: for runs whose configs differ behind the teacher alone, or
        in its kind of norm, of which a teacher uses the weak one. Label maps that this run's
        settings would not make, or without a confidence that it keeps, are made anew when they are
        looked at.
        """
        stage = self._stage("teacher", 0)
        network = self._network(self._backbone("teacher"))
        say = self._sayer("teacher", 0)
        say(f"taken from {teacher.stage.folder}")
        variables = state_lib.with_norms_of(teacher.variables, network.shapes)
        state = state_lib.create(variables, network.program("teacher", stage.steps).tx, self._mesh)
        step = jax.device_put(np.int32(stage.steps), mesh_lib.replicated(self._mesh))
        with checkpoints.Checkpoints(stage.folder / "checkpoints") as kept:
            kept.save(stage.steps, dataclasses.replace(state, step=step))
        history.copy(teacher.stage.folder, stage.folder)
        labeled = self.dataset.unlabeled if self.takes_pseudo_labels else ()
        kinds = (PSEUDO_LABELS, *[CONFIDENCE] * self._config.pseudo.keep_confidence)
        for example, kind in itertools.product(distributed.share(labeled), kinds):
            name = f"{kind}/{example.id}.png"
            if (teacher.stage.folder / name).exists():
                content = (teacher.stage.folder / name).read_bytes()
                # As where they are made: a damaged label map is found, a confidence map is not.
                write_bytes(stage.folder / name, content, sync=kind != PSEUDO_LABELS)
        self._scorer.adopted(stage, network, say, teacher.stage, teacher.network, variables)
        _mark_done(stage)

    def label(self, teacher: Trained) -> epath.Path:
        """The teacher's pseudo-labels, checked; their folder."""
        folder = teacher.stage.folder / PSEUDO_LABELS
        say = self._sayer("pseudo-labels for student", teacher.stage.round + 1)

        def progress(done: int, total: int) -> None:
            # About ten lines.
            if done == total or done % max(total // 10, 1) < self._config.pseudo.batch:
                say(f"{done}/{total} images")

        step = self._scorer.weights_step(teacher.stage)
        name = f"round_{teacher.stage.round}/{teacher.stage.kind}, step {step}"
        manifest = teacher.network.label(teacher.variables, name, folder, progress, say)
        before = None
        if teacher.stage.kind == "student":
            kind = "student" if teacher.stage.round > 1 else "teacher"
            before = self._stage(kind, teacher.stage.round - 1).folder / PSEUDO_LABELS
        for line in health.check(folder, manifest, self.dataset, before):
            say(line)
        if distributed.is_main():
            record.keep_pseudo(teacher.stage.folder, folder, manifest, self.dataset)
        return folder

    def keep_model(self, final: Trained) -> None:
        """Writes model/: the weights with the weak norm alone, and all that using them needs."""
        sizes = set(pipeline.image_sizes(self.dataset.evaluation))
        if not distributed.is_main():
            return
        row = self._scorer.row(final.stage, final.network)
        assert row is not None  # every stage that ends has written one
        description = deployed.describe(
            final.network.model_config,
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
        )
        folder = self._workdir / deployed.FOLDER
        weights = state_lib.for_inference(final.variables)
        checkpoints.save_weights(folder / deployed.WEIGHTS, weights, description)
        content = json.dumps(description, indent=1) + "\n"
        write_bytes(folder / deployed.DESCRIPTION, content.encode())

    def print_table(self) -> None:
        """The rows of this run, for a person."""
        protocol = self._scorer.protocol(self._network(self._config.model.backbone))
        rows = [r for r in self.results.rows if evaluate.comparable(r["protocol"], protocol)]
        print_table(rows, self.dataset.classes, self._console)

    def _sayer(self, kind: str, round_: int) -> Say:
        """What prints the lines of a stage, or of the labelling before a student.

        Each line says which it is, and its number in the whole run.
        """
        rounds = self._config.rounds
        a_round = 1 + self.takes_pseudo_labels
        student = 1 + round_ * a_round
        last = 1 + rounds.count * a_round + bool(rounds.control and rounds.count)
        number = {
            "teacher": 1,
            "pseudo-labels for student": student - 1,
            "student": student,
            "control": last,
        }
        name = streams.stage_name(kind, round_)
        return lambda line: self._say(f"[{number[kind]}/{last}] {name}: {line}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def _mark_done(stage: training.Stage) -> None:
    """The last thing of a stage, once it is over in every process."""
    distributed.barrier(f"end of {stage.name}")
    if distributed.is_main():
        write_bytes(stage.folder / DONE, b"")
