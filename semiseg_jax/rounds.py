"""Algorithm 1: teacher, then rounds of pseudo-labels and student; resumable at any point.

    teacher <- cross-entropy on the labelled images
    repeat: pseudo-labels <- teacher; student <- both kinds of image; teacher <- student

Source: Yuan et al., ICCV 2021, algorithm 1.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Column, Table

from semiseg_jax import (
    checkpoints,
    deployed,
    distributed,
    evaluate,
    health,
    interruption,
    optim,
    record,
    report,
    steps,
)
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax import train as training
from semiseg_jax.data import pipeline, sources, streams
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.data.splits import split_hash
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.models.dsbn import DOMAINS
from semiseg_jax.pseudo_labels import PSEUDO_LABELS, Labeler
from semiseg_jax.results import Results, make_row, print_table
from semiseg_jax.selection import Best
from semiseg_jax.state import Variables
from semiseg_jax.train import DONE

# Keys beside those of `eval` that may change while a run goes on: no stage's result follows from
# them. (Images that moved to another root are the same by id, see `refuse_other_data`.)
FREE = frozenset(
    {
        "data.root",
        "data.cache_dir",
        "data.prefetch",
        "data.threads",
        "train.log_every",
        "train.checkpoint_every",
        "train.profile_at",
        "rounds.control",
    }
)


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
        UserError: bad data or config, or a workdir of another config or of other data.
        Interrupted: that was asked for; the same call goes on.
    """
    workdir = epath.Path(workdir)
    distributed.agree("config", lambda: refuse_other_config(workdir, config))
    job = Job(config, workdir, asked)
    job.refuse_too_large()
    # Only now: a run that could not start leaves the folder to its corrected config.
    if distributed.is_main():
        keep_config(workdir, config)
        keep_data(workdir, job.dataset)
        job.keep_run()
    first = teacher = job.finished("teacher", 0) or job.train("teacher", 0)
    for round_ in range(1, config.rounds.count + 1):
        student = job.finished("student", round_)
        if student is None:
            pseudo = job.label(teacher) if job.takes_pseudo_labels else None
            student = job.train("student", round_, teacher, pseudo)
        teacher = student
    if config.rounds.control and config.rounds.count:
        # As long as all students together, from the same teacher.
        rounds = config.rounds.count
        if job.finished("control", rounds) is None:
            job.train("control", rounds, first)
    job.keep_model(teacher)
    if distributed.is_main():
        report.write(workdir)
    job.print_table()
    return job.results


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished stage: its place, and its variables."""

    stage: training.Stage
    variables: Variables
    network: "Network"


class Network:
    """A network with what is compiled for it, shared by every stage that uses it."""

    def __init__(
        self,
        config: Any,
        backbone: str,
        dataset: sources.Dataset,
        mesh: Mesh,
        asked: interruption.Asked,
    ):
        model_config = deeplab.config_for(config, backbone)
        # Resolved here, so that model/model.json does not need the file of the weights.
        self.departures = deeplab.departures(model_config)
        self.model_config = model_config = deeplab.resolve(model_config)
        self.model: nn.Module = deeplab.build(model_config, len(dataset.classes))
        colour = deeplab.input_mean(model_config)
        self.evaluate = evaluate.Evaluator(self.model, dataset, config.eval, mesh, colour, asked)
        to_select = dataclasses.replace(dataset, evaluation=dataset.selection)
        self.select = evaluate.Evaluator(self.model, to_select, config.eval, mesh, colour, asked)
        self.label = Labeler(self.model, dataset, config, mesh, colour, asked)
        self.shapes = state_lib.variable_shapes(self.model)
        self._config = config
        self._mesh = mesh

    @functools.cache  # noqa: B019 - lives as long as the run
    def program(self, kind: str, num_steps: int) -> training.Program:
        """The compiled step of a kind of stage."""
        config = self._config
        factor = optim.rate_factor(config)
        tx, schedule = optim.make_optimizer(config.optim, kind, num_steps, factor)
        taken = streams.of_stage(config, kind)
        step = steps.make_train_step(self.model, tx, config.loss, taken, self._mesh)
        return training.Program(step, tx, schedule, taken, self.shapes)


class Job:
    """One run of Algorithm 1 over a workdir."""

    def __init__(self, config: Any, workdir: epath.Path, asked: interruption.Asked):
        self._config = config
        self._asked = asked
        self._workdir = workdir
        self._mesh = mesh_lib.make_mesh()
        self._console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
        self.dataset = sources.load(config, self._say)
        distributed.agree("data known", lambda: refuse_other_data(workdir, self.dataset))
        both = (*config.data.weak_stream, *config.data.strong_stream)
        self.takes_pseudo_labels = bool(config.rounds.count) and "pseudo" in both
        if self.takes_pseudo_labels and not self.dataset.unlabeled:
            raise UserError(
                "There is no unlabelled image: give data.unlabeled_list or data.unlabeled_dir, "
                "or train the teacher alone with rounds.count=0."
            )
        mesh_lib.check_batches(config, self._mesh.size)
        self.results = Results(workdir / "results.json")
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

    @functools.cache  # noqa: B019 - lives as long as the run
    def _network(self, backbone: str) -> Network:
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

    def finished(self, kind: str, round_: int) -> Trained | None:
        """A stage that is done, with a result by the present protocol; else None."""
        stage = self._stage(kind, round_)
        if not distributed.agree(f"{stage.name} looked for", (stage.folder / DONE).exists):
            return None
        say = self._sayer(kind, round_)
        network = self._network(self._backbone(kind))
        program = network.program(kind, stage.steps)
        variables = training.restore(stage, program, self._mesh, say)
        if variables is None:
            say(f"its checkpoint of step {stage.steps} is missing: it is trained again")
            return None
        variables = self._counting(stage, network, say, variables)
        say("done before")
        if self._row(stage) is None:
            self._score(stage, network, say, stage.steps, variables)
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
        variables = self._train(stage, network, teacher, pseudo, say)
        variables = self._counting(stage, network, say, variables)
        self._score(stage, network, say, stage.steps, variables)
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
        say: Any,
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
            score=functools.partial(self._look, stage, network, say),
            say=say,
            train_config=config.train,
            eval_every=config.eval.every,
            mesh=self._mesh,
            asked=self._asked,
        )

    def _start(
        self, network: Network, stage: training.Stage, teacher: Trained | None, say: Any
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
                variables, report = pretrained.load(path, variables)
                say(f"{path}: {report}")
                for sentence in network.departures:
                    say(sentence)
            return variables
        if stage.kind == "student" and teacher.stage.kind == "teacher":
            return state_lib.copy_weak_to_strong(teacher.variables)
        return teacher.variables

    def adopt(self, teacher: Trained) -> None:
        """Takes the finished teacher of another run as this run's own, with its label maps.

        Made again it would be the same: for runs whose configs differ behind the teacher alone, or
        in its kind of norm, of which a teacher uses the weak one. Label maps that this run's
        settings would not make are made anew when they are looked at.
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
        if theirs := self._best(teacher.stage, network):
            chosen = theirs.chosen(teacher.network.shapes, self._mesh)
            ours = dataclasses.replace(theirs, folder=stage.folder)
            ours.keep(dataclasses.replace(chosen, variables=variables))
        labeled = self.dataset.unlabeled if self.takes_pseudo_labels else ()
        for example in distributed.share(labeled):
            name = f"{PSEUDO_LABELS}/{example.id}.png"
            if (teacher.stage.folder / name).exists():
                write_bytes(stage.folder / name, (teacher.stage.folder / name).read_bytes())
        self._score(stage, network, say, stage.steps, variables)
        _mark_done(stage)

    def label(self, teacher: Trained) -> epath.Path:
        """The teacher's pseudo-labels, checked; their folder."""
        folder = teacher.stage.folder / PSEUDO_LABELS
        say = self._sayer("pseudo-labels for student", teacher.stage.round + 1)

        def progress(done: int, total: int) -> None:
            # About ten lines.
            if done == total or done % max(total // 10, 1) < self._config.pseudo.batch:
                say(f"{done}/{total} images")

        name = f"round_{teacher.stage.round}/{teacher.stage.kind}, step {teacher.stage.steps}"
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
        row = self._row(final.stage)
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
        protocol = self._protocol(self._network(self._config.model.backbone))
        rows = [r for r in self.results.rows if evaluate.comparable(r["protocol"], protocol)]
        print_table(rows, self.dataset.classes, self._console)

    def _row(self, stage: training.Stage, step: int | None = None) -> dict[str, Any] | None:
        """The result of a stage at a step, its end unless given, by the present protocol."""
        protocol = self._protocol(self._network(self._backbone(stage.kind)))
        key = (stage.kind, stage.round, stage.steps if step is None else step)
        rows = self.results.rows if step is None else self.results.curve
        return next(
            (
                row
                for row in rows
                if (row["stage"], row["round"], row["step"]) == key
                and evaluate.comparable(row["protocol"], protocol)
            ),
            None,
        )

    def _protocol(self, network: Network) -> dict[str, Any]:
        return evaluate.protocol(self._config, self.dataset, network.evaluate.pad_to)

    def _best(self, stage: training.Stage, network: Network) -> Best | None:
        """Where the best weights of a stage are kept; None where its last ones count."""
        config = self._config.eval
        if config.select == "last":
            return None
        score = network.evaluate if config.select == "reported" else network.select
        return Best(stage.folder, config.every, lambda variables: score(variables).miou)

    def _look(
        self, stage: training.Stage, network: Network, say: Any, step: int, variables: Variables
    ) -> None:
        """Evaluates at a step inside a stage; writes no second row of it."""
        if best := self._best(stage, network):
            best.offer(step, variables)
        if self._row(stage, step) is None:
            self._score(stage, network, say, step, variables)

    def _counting(
        self, stage: training.Stage, network: Network, say: Any, last: Variables
    ) -> Variables:
        """The weights of a stage that count, at its end (`eval.select`)."""
        best = self._best(stage, network)
        if best is None:
            return last
        # Also where the stage was done before: what is there is at least as good, and stays.
        best.offer(stage.steps, last)
        chosen = best.chosen(network.shapes, self._mesh)
        say(f"its weights of step {chosen.step} count, mIoU {100 * chosen.miou:.2f} where chosen")
        return chosen.variables

    def _score(
        self, stage: training.Stage, network: Network, say: Any, step: int, variables: Variables
    ) -> None:
        """Evaluates and keeps the row."""
        final = step == stage.steps
        pictures = record.Pictures(self._workdir, stage.folder, self.dataset, final)
        score = network.evaluate(variables, pictures.shown, pictures)
        protocol = self._protocol(network)
        taken = streams.of_stage(self._config, stage.kind).domain
        norms = record.norms(variables, DOMAINS if taken == "both" else (taken,))
        if final and distributed.is_main():
            # Before the row: a stage that has its row is not evaluated again.
            record.keep_evaluation(stage.folder, score, self.dataset, protocol)
            record.keep_norms(stage.folder, norms)
        row = make_row(stage.kind, stage.round, step, self._config.seed, score, protocol)
        self.results.add(row, final)
        place = "" if final else f"step {step}: "
        say(f"{place}mIoU {100 * score.miou:.2f} on {self.dataset.evaluated_on}")
        with_names = zip(self.dataset.classes, score.iou, strict=True)
        scalars = {"miou": score.miou} | {f"iou/{k}": v for k, v in with_names if v is not None}
        writer = metric_writers.create_default_writer(
            stage.folder, just_logging=not distributed.is_main(), asynchronous=False
        )
        writer.write_scalars(step, scalars)
        record.summarise(writer, step, pictures, norms)
        writer.close()

    def _sayer(self, kind: str, round_: int) -> Callable[[str], None]:
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


def refuse_other_config(workdir: epath.PathLike, config: Any) -> None:
    """Refuses a workdir that belongs to another config.

    What changes no stage's result may differ: FREE keys, those of `eval` unless the weights of a
    stage were chosen by evaluating, and more rounds than there were.

    Raises:
        UserError: naming the keys that differ.
    """
    then = _known(epath.Path(workdir), "config.json")
    if then is None:
        return
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (then, _plain(config)))
    chosen = any(tree.get("eval.select", "last") != "last" for tree in (old, new))
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not (key.startswith("eval.") and not chosen)
        and key not in FREE
        and not (key == "rounds.count" and new[key] > old.get(key, 0))
    ]
    if differing:
        raise UserError(
            f"The workdir {workdir} belongs to another config ({'; '.join(differing)}): give "
            "another --workdir, or the config it was made with."
        )


def refuse_other_data(workdir: epath.PathLike, dataset: sources.Dataset) -> None:
    """Refuses to go on with other training images than a workdir began with.

    Raises:
        UserError: with the counts of images then and now.
    """
    then, now = _known(epath.Path(workdir), "data.json"), _described(dataset)
    if then is not None and then != now:
        raise UserError(
            f"The data changed since {workdir} was begun ({then['labeled']} labelled and "
            f"{then['unlabeled']} unlabelled images of {then['data']} then, {now['labeled']} and "
            f"{now['unlabeled']} of {now['data']} now): restore it, or give another --workdir."
        )


def keep_data(workdir: epath.PathLike, dataset: sources.Dataset) -> None:
    """Writes data.json, by which the workdir knows its images."""
    _keep(epath.Path(workdir) / "data.json", _described(dataset))


def _described(dataset: sources.Dataset) -> dict[str, Any]:
    return {
        "data": dataset.name,
        "labeled": len(dataset.labeled),
        "unlabeled": len(dataset.unlabeled),
        "ids_hash": split_hash([[e.id for e in p] for p in (dataset.labeled, dataset.unlabeled)]),
    }


def keep_config(workdir: epath.PathLike, config: Any) -> None:
    """Writes config.json, by which the workdir knows its config."""
    _keep(epath.Path(workdir) / "config.json", _plain(config))


def _known(workdir: epath.Path, name: str) -> dict[str, Any] | None:
    """What a file says by which a workdir knows what it is of; None in a new workdir."""
    path = workdir / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        if not (workdir / "round_0").exists():
            return None  # The run ended as it began: nothing is there that the file is of.
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or give another --workdir."
        ) from error


def _keep(path: epath.Path, content: dict[str, Any]) -> None:
    """Writes such a file, where it does not say so already."""
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        write_bytes(path, text.encode())


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())
