"""Algorithm 1: teacher, then rounds of pseudo-labels and student; resumable at any point.

    teacher <- cross-entropy on the labelled images
    repeat: pseudo-labels <- teacher; student <- both kinds of image; teacher <- student

Source: Yuan et al., ICCV 2021, algorithm 1.
"""

import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
from absl import logging
from clu import metric_writers
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from rich.console import Console

from semiseg_jax import checkpoints, evaluate, optim, steps
from semiseg_jax import mesh as mesh_lib
from semiseg_jax import state as state_lib
from semiseg_jax import train as training
from semiseg_jax.data import pipeline, sources, streams
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.pseudo_labels import Labeler
from semiseg_jax.results import Results, make_row, print_table
from semiseg_jax.state import Variables

DONE = "DONE"
STAGE_SEEDS = {"teacher": 0, "student": 1, "control": 2}


def run(config: Any, workdir: epath.PathLike) -> Results:
    """Runs Algorithm 1 as configured, from wherever the workdir stands.

    Args:
        config: as configs/default.py declares it.
        workdir: for everything that is written.

    Returns:
        The rows of results.json.

    Raises:
        UserError: bad data or config, or a workdir of another config.
    """
    workdir = epath.Path(workdir)
    refuse_other_config(workdir, config)
    job = Job(config, workdir)
    # Only now: a run that could not start leaves the folder to its corrected config.
    keep_config(workdir, config)
    teacher = job.train("teacher", 0)
    for round_ in range(1, config.rounds.count + 1):
        pseudo = job.label(teacher) if job.takes_pseudo_labels else None
        teacher = job.train("student", round_, teacher, pseudo)
    if config.rounds.control and config.rounds.count:
        job.train("control", 0, job.result("teacher", 0))
    job.keep_model(teacher)
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

    def __init__(self, config: Any, backbone: str, dataset: sources.Dataset, mesh: Mesh):
        model_config = config.model.copy_and_resolve_references()
        if backbone != model_config.backbone:
            model_config.backbone = backbone
            model_config.pretrained = config.rounds.student_pretrained
        # Resolved here, so that model/model.json does not need the file of the weights.
        model_config.input_normalization = deeplab.input_normalization(model_config)
        self.model_config = model_config
        self.model: nn.Module = deeplab.build(model_config, len(dataset.classes))
        self.evaluate = evaluate.Evaluator(self.model, dataset, config.eval, mesh)
        self.label = Labeler(self.model, dataset, config.pseudo, mesh)
        self._shapes = state_lib.variable_shapes(self.model)
        self._config = config
        self._mesh = mesh

    @functools.cache  # noqa: B019 - lives as long as the run
    def program(self, kind: str, num_steps: int) -> training.Program:
        """The compiled step of a kind of stage."""
        config = self._config
        tx, schedule = optim.make_optimizer(config.optim, kind, num_steps)
        student = kind == "student"
        taken = streams.Streams(
            weak=tuple(config.data.weak_stream) if student else ("labeled",),
            strong=tuple(config.data.strong_stream) if student else (),
            batch_labeled=config.train.batch_labeled,
            batch_pseudo=config.train.batch_unlabeled,
        )
        step = steps.make_train_step(self.model, tx, config.loss, taken, self._mesh)
        return training.Program(step, tx, schedule, taken, self._shapes)


class Job:
    """One run of Algorithm 1 over a workdir."""

    def __init__(self, config: Any, workdir: epath.Path):
        self._config = config
        self._workdir = workdir
        self._mesh = mesh_lib.make_mesh()
        self._console = Console(highlight=False, soft_wrap=True)
        self._dataset = sources.load(config, self._say)
        both = (*config.data.weak_stream, *config.data.strong_stream)
        self.takes_pseudo_labels = bool(config.rounds.count) and "pseudo" in both
        if self.takes_pseudo_labels and not self._dataset.unlabeled:
            raise UserError(
                "There is no unlabelled image: give data.unlabeled_list or data.unlabeled_dir, "
                "or train the teacher alone with rounds.count=0."
            )
        self._check_batches()
        self._num_stages = 1 + (1 + self.takes_pseudo_labels) * config.rounds.count
        self._num_stages += bool(config.rounds.control and config.rounds.count)
        self._stage_number = 0
        self.results = Results(workdir / "results.json")
        d = self._dataset
        self._say(
            f"{d.name}: {len(d.labeled)} labelled, {len(d.unlabeled)} unlabelled, "
            f"{len(d.evaluation)} {d.evaluated_on} images, {len(d.classes)} classes; "
            f"{self._mesh.size} {self._mesh.devices.flat[0].platform} device(s); {workdir}"
        )

    def _check_batches(self) -> None:
        """Every batch divides over the devices; said before anything is trained."""
        config = self._config
        for key in ("train.batch_labeled", "train.batch_unlabeled", "pseudo.batch", "eval.batch"):
            section, name = key.split(".")
            size = config[section][name]
            if size % self._mesh.size:
                raise UserError(
                    f"{key} is {size}, which does not divide over {self._mesh.size} devices: make "
                    f"it a multiple of {self._mesh.size}."
                )

    @functools.cache  # noqa: B019 - lives as long as the run
    def _network(self, backbone: str) -> Network:
        return Network(self._config, backbone, self._dataset, self._mesh)

    def _backbone(self, kind: str) -> str:
        student = self._config.rounds.student_model if kind == "student" else ""
        return student or self._config.model.backbone

    def _stage(self, kind: str, round_: int) -> training.Stage:
        config = self._config
        num_steps = {
            "teacher": config.train.teacher_steps,
            "student": config.train.steps,
            "control": config.train.steps * config.rounds.count,
        }[kind]
        seed = streams.stage_seed(config.seed, round_, STAGE_SEEDS[kind])
        folder = self._workdir / f"round_{round_}" / kind
        return training.Stage(kind, round_, num_steps, seed, folder)

    def train(
        self,
        kind: str,
        round_: int,
        teacher: Trained | None = None,
        pseudo: epath.Path | None = None,
    ) -> Trained:
        """Trains and evaluates one stage, or takes it as done."""
        stage = self._stage(kind, round_)
        network = self._network(self._backbone(kind))
        say = self._begin(f"{stage.name}, {stage.steps} steps")
        if (stage.folder / DONE).exists():
            say("done before")
            trained = self.result(kind, round_)
            if self._row(stage) is not None:
                return trained
            variables = trained.variables
        else:
            variables = self._train(stage, network, teacher, pseudo, say)
        score = network.evaluate(variables)
        self._report(stage, stage.steps, score)
        say(f"mIoU {100 * score.miou:.2f} on {self._dataset.evaluated_on}")
        write_bytes(stage.folder / DONE, b"")
        return Trained(stage, variables, network)

    def result(self, kind: str, round_: int) -> Trained:
        """A stage that is done, from its last checkpoint."""
        stage = self._stage(kind, round_)
        network = self._network(self._backbone(kind))
        variables = training.restore(stage, network.program(kind, stage.steps), self._mesh)
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
        examples = pipeline.pseudo_examples(self._dataset, pseudo) if pseudo else ()
        batches = functools.partial(
            pipeline.train_batches,
            config,
            self._dataset,
            examples,
            program.streams,
            stage.seed,
            colour=deeplab.input_mean(network.model_config),
            groups=self._mesh.size,
        )
        return training.run(
            stage,
            program,
            start=functools.partial(self._start, network, stage, teacher, say),
            batches=batches,
            evaluate=network.evaluate,
            report=functools.partial(self._report, stage, final=False),
            say=say,
            train_config=config.train,
            eval_every=config.eval.every,
            mesh=self._mesh,
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
            return variables
        if stage.kind == "student" and teacher.stage.kind == "teacher":
            return state_lib.copy_weak_to_strong(teacher.variables)
        return teacher.variables

    def label(self, teacher: Trained) -> epath.Path:
        """The teacher's pseudo-labels; their folder."""
        folder = teacher.stage.folder / "pseudo_labels"
        say = self._begin(f"pseudo-labels of {teacher.stage.name}")

        def progress(done: int, total: int) -> None:
            # About ten lines.
            if done == total or done % max(total // 10, 1) < self._config.pseudo.batch:
                say(f"{done}/{total} images")

        name = f"round_{teacher.stage.round}/{teacher.stage.kind}, step {teacher.stage.steps}"
        teacher.network.label(teacher.variables, name, folder, progress)
        return folder

    def keep_model(self, final: Trained) -> None:
        """Writes model/: the weights with the weak norm alone, and all that using them needs."""
        row = self._row(final.stage)
        assert row is not None  # every stage that ends has written one
        description = {
            "classes": list(self._dataset.classes),
            "palette": [list(colour) for colour in self._dataset.palette],
            "model": final.network.model_config.to_dict(),
            "trained_on": {
                "data": self._dataset.name,
                "labeled": len(self._dataset.labeled),
                "unlabeled": len(self._dataset.unlabeled),
            },
            "miou": row["miou"],
            "protocol": row["protocol"],
        }
        folder = self._workdir / "model"
        weights = state_lib.for_inference(final.variables)
        checkpoints.save_weights(folder / "weights.safetensors", weights, description)
        write_bytes(folder / "model.json", (json.dumps(description, indent=1) + "\n").encode())

    def print_table(self) -> None:
        """The rows of this run, for a person."""
        print_table(self.results.rows, self._dataset.classes, self._console)

    def _row(self, stage: training.Stage) -> dict[str, Any] | None:
        """The result of a stage's end, if there is one."""
        key = (stage.kind, stage.round, stage.steps)
        rows = self.results.rows
        return next((r for r in rows if (r["stage"], r["round"], r["step"]) == key), None)

    def _report(
        self, stage: training.Stage, step: int, score: evaluate.Score, final: bool = True
    ) -> None:
        protocol = evaluate.protocol(self._config, self._dataset)
        row = make_row(stage.kind, stage.round, step, self._config.seed, score, protocol)
        self.results.add(row, final)
        with_names = zip(self._dataset.classes, score.iou, strict=True)
        scalars = {"miou": score.miou} | {f"iou/{k}": v for k, v in with_names if v is not None}
        writer = metric_writers.create_default_writer(stage.folder, asynchronous=False)
        writer.write_scalars(step, scalars)
        writer.close()

    def _begin(self, title: str):
        """Announces a stage; returns what prints its lines."""
        self._stage_number += 1
        place = f"[{self._stage_number}/{self._num_stages}]"
        self._say(f"{place} {title}")
        return lambda line: self._say(f"{place} {title.split(',')[0]}: {line}")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)


def refuse_other_config(workdir: epath.PathLike, config: Any) -> None:
    """Refuses a workdir that belongs to another config.

    Raises:
        UserError: naming the keys that differ.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    old, new = (
        traverse_util.flatten_dict(tree, sep=".")
        for tree in (json.loads(path.read_text()), _plain(config))
    )
    differing = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise UserError(
            f"The workdir {workdir} belongs to another config ({'; '.join(differing)}): give "
            "another --workdir, or the config it was made with."
        )


def keep_config(workdir: epath.PathLike, config: Any) -> None:
    """Writes config.json, by which the workdir knows its config."""
    content = json.dumps(_plain(config), indent=1) + "\n"
    write_bytes(epath.Path(workdir) / "config.json", content.encode())


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())
