"""What the command prints about suggestions and about a merge."""

import shlex
from collections.abc import Iterator

from semiseg_jax.suggestions.merge import Merged
from semiseg_jax.suggestions.run import Outcome

# So many images are named in a sentence.
_NAMED = 5


def of_suggestions(outcome: Outcome, count: int) -> Iterator[str]:
    """Yields lines about the images to label next.

    Args:
        outcome: what was suggested.
        count: of images that were asked for.
    """
    for rank, suggestion in enumerate(outcome.suggestions, 1):
        yield f"{rank:4d}  {suggestion.id}: {suggestion.sentence}"
    if len(outcome.suggestions) < count:
        yield (
            f"There are {outcome.considered} unlabelled images to choose from, fewer than "
            f"--count={count}: all are listed."
        )
    if outcome.aside:
        yield f"{len(outcome.aside)} unlabelled images are set aside (all in suggestions.json):"
        for id_, reason in list(outcome.aside.items())[:_NAMED]:
            yield f"  {id_}: {reason}"
    if outcome.without_labels:
        yield (
            f"No pixel of {', '.join(outcome.without_labels)} is labelled, so that the model never "
            "predicts it and no image can be suggested for it: label one that you know shows it."
        )
    if outcome.was_changed:
        yield (
            "The folder of earlier suggestions is left as it is, because its labels may be "
            "corrected already; this is a new one."
        )
    yield (
        f"Written: {outcome.folder}. Look at contact_sheet.jpg, and correct the labels in "
        "labelme/, coco/ or masks/ (one of them for each image). Then:"
    )


def of_merge(merged: Merged) -> Iterator[str]:
    """Yields lines about a merge, the next commands last."""
    kinds = {form: sum(f == form for f in merged.taken.values()) for form in merged.taken.values()}
    listing = ", ".join(f"{count} from {form}" for form, count in kinds.items())
    yield f"{len(merged.taken)} labels are taken: {listing}."
    if merged.untouched:
        took = "taken as they are (--take_untouched)" if merged.takes_untouched else "left out"
        again = "" if merged.takes_untouched else "; --take_untouched takes them as they are"
        yield (
            f"{len(merged.untouched)} were not changed since they were suggested, and are {took}"
            f"{again}: {', '.join(merged.untouched)}."
        )
    for id_, reason in merged.left_out.items():
        yield f"{id_} is left out: {reason}."
    yield from merged.notes
    yield (
        f"Written: {merged.folder}. {merged.labeled} images are labelled now, "
        f"{merged.labeled - len(merged.taken)} before. The next run, from the start:"
    )
    config, workdir = (shlex.quote(str(p)) for p in (merged.config, merged.next_workdir))
    command = f"  python -m semiseg_jax.main --config={config} --workdir={workdir}"
    yield command
    if not merged.weights:
        yield (
            "It cannot go on from the last model, whose backbone is another than that of the "
            "teacher (rounds.student_model)."
        )
        return
    yield "Or going on from the last model:"
    yield f"{command}_on --config.model.pretrained={shlex.quote(str(merged.weights))}"
    yield (
        "From the start, nothing is carried over but the labels: it is the safer choice where the "
        "labels were few and many are new, because the last model learned from its own mistakes "
        "on these very images. Going on suits few new labels and fewer steps (train.teacher_steps, "
        "train.steps). Which scores better was not measured."
    )
