"""Whether a discriminator selects: warnings where it passes everything, or nothing.

An untrained discriminator passes every pixel above a low threshold; one that tells all predictions
from labels passes none, and the segmenter then trains on labels alone. Neither shows in a loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from semiseg_jax.methods.adversarial_method import PASSED

# Shares that count as nothing, and as nearly everything.
NOTHING, EVERYTHING = 1e-3, 0.99
# The stretches of a stage that are judged, as a share of its steps.
STRETCH = 0.25


def warnings(lines: Sequence[Mapping[str, float]], steps: int, first_step: int) -> tuple[str, ...]:
    """Returns a sentence for each finished stretch of a stage in which nothing was selected.

    Args:
        lines: of metrics, each with "step" and "passed".
        steps: of the stage.
        first_step: updates before self-training began; earlier lines are not judged, as nothing
            is trained on what they passed.
    """
    found = []
    for first in np.arange(0, 1, STRETCH) * steps:
        last = first + STRETCH * steps
        stretch = [line for line in lines if max(first, first_step) < line["step"] <= last]
        if not stretch or lines[-1]["step"] < last:
            continue
        passed = float(np.mean([line[PASSED] for line in stretch]))
        real, fake = (
            float(np.mean([line[name] for line in stretch]))
            for name in ("accuracy_real", "accuracy_fake")
        )
        if passed > EVERYTHING:
            action = "takes nearly everything for real; raise the threshold or start later"
        elif passed < NOTHING:
            action = "takes next to nothing for real, which trains on nothing; lower the threshold"
        else:
            continue
        begin = max(first, first_step) + 1
        found.append(
            f"From step {begin:.0f} to {last:.0f} the discriminator passed {passed:.1%} of the "
            f"predictions (it was right on {real:.0%} of the labels and {fake:.0%} of the "
            f"predictions): it {action}."
        )
    return tuple(found)
