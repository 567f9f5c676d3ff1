"""Which weights of a stage count: its last ones, or the best of those evaluated on the way.

Source: the authors' released code keeps the best on the set that it reports; the paper is silent.
Here that is asked for by name (`eval.select`), and every row says it.
"""

import dataclasses

import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from semiseg_jax import checkpoints, distributed
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.errors import UserError
from semiseg_jax.models import weight_files
from semiseg_jax.state import Variables

# Below a stage's folder.
BEST = "best.safetensors"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The weights that count.

    Attributes:
        step: after which they were had.
        miou: in 0..1, on the set that they were chosen on.
        variables: they themselves, a copy on every device.
    """

    step: int
    miou: float
    variables: Variables


@dataclasses.dataclass(frozen=True)
class Best:
    """The best weights of a stage so far, in a file of its folder.

    A later evaluation replaces them only where it is better, never where it is as good: so a run
    that was cut off, and makes some evaluations again, ends with the same weights.

    Attributes:
        folder: of the stage.
        every: steps between what is offered, before the stage's last step.
    """

    folder: epath.Path
    every: int

    def offer(self, step: int, miou: float, variables: Variables) -> None:
        """Keeps the weights of a step where they are better than all before.

        Args:
            step: after which they were had.
            miou: in 0..1, on the set that the choice is made on.
            variables: they themselves.

        Raises:
            UserError: those before are gone, so that what is best can no longer be told; on every
                process.
        """
        offered = Chosen(step, miou, variables)
        distributed.agree("best weights", lambda: self._keep_if_better(offered))

    def _keep_if_better(self, offered: Chosen) -> None:
        known = self._read() if offered.step > self.every else None
        if known is None or offered.miou > known.description["miou"]:
            self.keep(offered)

    def keep(self, chosen: Chosen) -> None:
        """Writes weights as the best so far, whatever was there."""
        said = {"step": chosen.step, "miou": chosen.miou}
        checkpoints.save_weights(self.folder / BEST, chosen.variables, said)

    def chosen(self, shapes: Variables, mesh: Mesh) -> Chosen:
        """The best of all that were offered.

        Args:
            shapes: of the network's variables.
            mesh: for the devices.

        Raises:
            UserError: they are gone.
        """
        file = self._read()
        names = traverse_util.flatten_dict(shapes, sep="/")
        variables = traverse_util.unflatten_dict({n: file.tensors[n] for n in names}, sep="/")
        said = file.description
        on_devices = jax.device_put(variables, mesh_lib.replicated(mesh))
        return Chosen(said["step"], said["miou"], on_devices)

    @property
    def step(self) -> int:
        """The step after which the best so far were had; raises as `chosen`."""
        return self._read().description["step"]

    def _read(self) -> weight_files.File:
        try:
            return weight_files.read(self.folder / BEST)
        except UserError as error:
            raise UserError(
                f"{self.folder / BEST}, the best weights so far, is missing or damaged: restore "
                f"it, or remove {self.folder}, and the stage is trained again."
            ) from error
