"""How stages of a run are evaluated: which weights of a stage count, and the row that they get."""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh

from semiseg_jax import distributed, evaluate, record, summaries
from semiseg_jax.data import sources, streams
from semiseg_jax.models.dsbn import DOMAINS
from semiseg_jax.network import Network
from semiseg_jax.results import Results, Row, make_row
from semiseg_jax.selection import Best, Chosen
from semiseg_jax.state import Variables
from semiseg_jax.train import Stage

# Prints a line of a stage.
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Look:
    """Weights of a stage evaluated on the reported set: the step it was at, what that gave."""

    step: int
    variables: Variables
    score: evaluate.Score
    pictures: record.Pictures


class Scorer:
    """Evaluates the stages of a run, and keeps what was found.

    Attributes:
        results: the rows of results.json.
    """

    def __init__(self, config: Any, workdir: epath.Path, dataset: sources.Dataset, mesh: Mesh):
        self.results = Results(workdir / "results.json")
        self._config = config
        self._workdir = workdir
        self._dataset = dataset
        self._mesh = mesh

    def protocol(self, network: Network) -> dict[str, Any]:
        """How results are obtained now; stands on their rows."""
        return evaluate.protocol(self._config, self._dataset, network.evaluate.pad_to)

    def row(self, stage: Stage, network: Network, step: int | None = None) -> Row | None:
        """The result of a stage at a step, its end unless given, by the present protocol."""
        protocol = self.protocol(network)
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

    def inside(
        self, stage: Stage, network: Network, say: Say, step: int, variables: Variables
    ) -> None:
        """Evaluates at a step inside a stage; writes no second row of it."""
        best = self._best(stage)
        by_row = best is not None and network.select is network.evaluate
        # Where weights are chosen by their row, never by one that a process before made of its own.
        row = None if by_row else self.row(stage, network, step)
        if row is None:
            row = self._keep(stage, network, say, self._look(stage, network, step, variables))
        if best:
            miou = row["miou"] if by_row else network.select(variables).miou
            best.offer(step, miou, variables)

    def end(self, stage: Stage, network: Network, say: Say, last: Variables) -> Variables:
        """Keeps the row of a stage's end; the weights that count (`eval.select`), whose it is."""
        variables, look = last, None
        if best := self._best(stage):
            if network.select is network.evaluate:
                look = self._look(stage, network, stage.steps, last)
            miou = look.score.miou if look else network.select(last).miou
            best.offer(stage.steps, miou, last)
            chosen = self._chosen(best, network, say)
            variables = chosen.variables
            if chosen.step != stage.steps:
                look = None
        if look is None:
            look = self._look(stage, network, stage.steps, variables)
        self._keep(stage, network, say, look)
        return variables

    def again(self, stage: Stage, network: Network, say: Say, last: Variables) -> Variables:
        """The weights that count of a stage that was done before; its row is kept if missing."""
        best = self._best(stage)
        variables = self._chosen(best, network, say).variables if best else last
        if self.row(stage, network) is None:
            self._keep(stage, network, say, self._look(stage, network, stage.steps, variables))
        return variables

    def weights_step(self, stage: Stage) -> int:
        """The step that the weights that count are of, once a stage has ended."""
        best = self._best(stage)
        return best.step if best else stage.steps

    def adopted(
        self, stage: Stage, network: Network, say: Say, theirs: Stage, of: Network, last: Variables
    ) -> None:
        """Keeps the row of a stage that was made by another run.

        Args:
            stage, network: of this run.
            say: prints a line.
            theirs, of: the stage and the network of the other one.
            last: its weights that count, for this run's network.
        """
        if (best := self._best(theirs)) and (ours := self._best(stage)):
            chosen = best.chosen(of.shapes, self._mesh)
            ours.keep(dataclasses.replace(chosen, variables=last))
        self._keep(stage, network, say, self._look(stage, network, stage.steps, last))

    def _best(self, stage: Stage) -> Best | None:
        """Where the best weights of a stage are kept; None where its last ones count."""
        config = self._config.eval
        return None if config.select == "last" else Best(stage.folder, config.every)

    def _chosen(self, best: Best, network: Network, say: Say) -> Chosen:
        chosen = best.chosen(network.shapes, self._mesh)
        say(f"its weights of step {chosen.step} count, mIoU {100 * chosen.miou:.2f} where chosen")
        return chosen

    def _look(self, stage: Stage, network: Network, step: int, variables: Variables) -> Look:
        """Evaluates weights of a stage; at its end, with all pictures that are kept."""
        final = step == stage.steps
        pictures = record.Pictures(self._workdir, stage.folder, self._dataset, final)
        score = network.evaluate(variables, pictures.shown, pictures)
        return Look(step, variables, score, pictures)

    def _keep(self, stage: Stage, network: Network, say: Say, look: Look) -> Row:
        """Keeps what an evaluation found, as a row and for people; the row."""
        final = look.step == stage.steps
        protocol = self.protocol(network)
        taken = streams.of_stage(self._config, stage.kind).domain
        norms = record.norms(look.variables, DOMAINS if taken == "both" else (taken,))
        score = look.score
        if final and distributed.is_main():
            # Before the row: a stage that has its row is not evaluated again.
            record.keep_evaluation(stage.folder, score, self._dataset, protocol)
            record.keep_norms(stage.folder, norms)
        of = self.weights_step(stage) if final else look.step
        row = make_row(stage.kind, stage.round, look.step, self._config.seed, score, protocol, of)
        self.results.add(row, final)
        place = "" if final else f"step {look.step}: "
        say(f"{place}mIoU {100 * score.miou:.2f} on {self._dataset.evaluated_on}")
        with_names = zip(self._dataset.classes, score.iou, strict=True)
        scalars = {"miou": score.miou} | {f"iou/{k}": v for k, v in with_names if v is not None}
        writer = summaries.Writer(stage.folder)
        writer.write_scalars(look.step, scalars)
        record.summarise(writer, look.step, look.pictures, norms)
        writer.close()
        return row
