"""What a run tells about its progress, to whoever follows it."""

import contextlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from semiseg_jax.data.dataset import Dataset
from semiseg_jax.stages import Stage


class RunObserver:
    """Is told how far a run is; ignores all of it. Subclasses override what they follow.

    The methods are called in every process, in the order of the run.
    """

    def on_run(self, config: Any, dataset: Dataset, mesh: Mesh, schedule: Sequence[Stage]) -> None:
        """The run starts, or goes on.

        Args:
            config: the whole config.
            dataset: its images.
            mesh: it runs on.
            schedule: its stages in their order.
        """

    def on_labels(self, student: Stage) -> None:
        """The labelling before a student begins."""

    def on_images(self, done: int, total: int) -> None:
        """So many of all unlabelled images have their label map."""

    def on_stage(self, stage: Stage) -> None:
        """A stage begins, or goes on at its last checkpoint."""

    def on_step(self, step: int) -> None:
        """A step was dispatched, and the step before it has ended."""

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Surrounds an evaluation."""
        return contextlib.nullcontext()

    def on_end(self, stage: Stage) -> None:
        """A stage has ended, or had ended in an earlier start."""
