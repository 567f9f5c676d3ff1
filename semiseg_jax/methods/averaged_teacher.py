"""Methods whose labels come from an exponential moving average (EMA) of the trained network."""

import dataclasses
from typing import Any, Literal

from jax.typing import ArrayLike
from jaxtyping import Integer

from semiseg_jax.methods import ema
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.methods.network import Variables
from semiseg_jax.runtime import rules


@dataclasses.dataclass(frozen=True)
class AveragedTeacher(OnlineMethod):
    """The state of such a method is the average, parameters and statistics of both norms.

    Attributes:
        decay: see `ema.update_weight`.
        warmup: see `ema.update_weight`.
        statistics: see `ema.StatisticsRule`.
        report: the weights that are evaluated and kept, the average or the trained network's.
    """

    decay: float
    warmup: bool
    statistics: ema.StatisticsRule = "average"
    report: Literal["average", "student"] = "average"

    def init_state(self, variables: Variables) -> Any:
        """Returns a copy of the variables."""
        return {"average": ema.init_average(variables)}

    def update_state(self, own: Any, variables: Variables, step: Integer[ArrayLike, ""]) -> Any:
        """Moves the average towards the variables."""
        weight = ema.update_weight(step, self.decay, self.warmup)
        average = {
            name: ema.update_average(old, variables[name], weight)
            if name == "params"
            else ema.update_statistics(old, variables[name], weight, self.statistics)
            for name, old in own["average"].items()
        }
        return {"average": average}

    def reported(self, own: Any, variables: Variables) -> Variables:
        """Returns the average, or the variables, by `report`."""
        return own["average"] if self.report == "average" else variables


# By key of the config of such a method.
RULES: dict[str, rules.Rule] = {
    "decay": rules.below(0, 1),
    "warmup": rules.BOOL,
    "statistics": rules.one_of("average", "copy", "keep"),
    "report": rules.one_of("average", "student"),
}
