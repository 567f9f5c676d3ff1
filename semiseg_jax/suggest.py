"""Says which unlabelled images to label next, and takes the corrected labels back.

    python -m semiseg_jax.suggest --workdir=DIR --count=20 [--output=DIR] [--by=RULE]
    python -m semiseg_jax.suggest --merge=DIR [--output=DIR] [--take_untouched]

The first command writes a folder with a ranked list, and the network's labels of these images to
be corrected in an annotation tool. The second reads the corrected ones and writes masks, lists and
a config for the next run. docs/annotate.md leads through both.
"""

import shlex
import sys

from absl import app, flags

from semiseg_jax.runtime import cli, malloc, preemption, xla

_WORKDIR = cli.define_path_flag(
    "workdir", None, "Folder of a run that has ended; with --merge, if the run was moved since."
)
_COUNT = flags.DEFINE_integer("count", 20, "How many images to suggest.", lower_bound=1)
_OUTPUT = cli.define_path_flag(
    "output", None, "The folder to create; WORKDIR/suggest, or DIR_merged, unless given."
)
_BY = flags.DEFINE_enum(
    "by",
    "combined",
    ["combined", "entropy", "margin", "disagreement", "diversity", "random"],
    "The rule: combined weighs uncertainty, rare classes and diversity; the others are one alone.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --by=random.", lower_bound=0)
_MIN_AREA = flags.DEFINE_integer(
    "min_area", 0, "The fewest pixels of an object in LabelMe and COCO files.", lower_bound=0
)
_MERGE = cli.define_path_flag("merge", None, "A folder of suggestions whose labels are corrected.")
_TAKE_UNTOUCHED = flags.DEFINE_boolean(
    "take_untouched", False, "With --merge: also take labels that nobody changed, as they are."
)


def main(argv: list[str]) -> None:
    """Suggests images, or merges corrected labels, as the command line says."""
    cli.start_command(argv)
    if not _MERGE.value and not _WORKDIR.value:
        sys.exit("Error: --workdir is missing: give the folder of a run, or one in --merge.")
    on_cpu = xla.runs_on_cpu()
    if on_cpu:
        malloc.disable_malloc_trim()
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its log messages.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    from semiseg_jax.runtime import interrupts, paths
    from semiseg_jax.runtime.errors import UserError

    try:
        if _MERGE.value:
            with interrupts.exit_on_signals():
                _merge()
            return
        if on_cpu:
            xla.force_cpu()
        xla.enable_compilation_cache(paths.default_cache_dir() / "compiled")
        with preemption.install_signal_handlers():
            xla.require_platform()
            _suggest()
    except UserError as error:
        sys.exit(f"Error: {error}")
    except preemption.Preempted:
        print("Interrupted: nothing was written.", file=sys.stderr)
        sys.exit(preemption.EXIT_STATUS)


def _suggest() -> None:
    """Writes suggestions with a progress bar, and prints them."""
    from rich import progress as bars

    from semiseg_jax.data.annotations.summary import print_line
    from semiseg_jax.runtime.logger import RunConsole
    from semiseg_jax.suggestions import run, summary

    request = run.Request(
        _WORKDIR.value,
        _OUTPUT.value or "",
        _COUNT.value,
        _BY.value,
        _SEED.value,
        _MIN_AREA.value,
    )
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        console=RunConsole(),
    ) as bar:
        task = bar.add_task("images", total=None)
        outcome = run.suggest(
            request, lambda done, total: bar.update(task, completed=done, total=total)
        )
    for line in summary.of_suggestions(outcome, request.count):
        print_line(line)
    print_line(f"  python -m semiseg_jax.suggest --merge={shlex.quote(str(outcome.folder))}")


def _merge() -> None:
    """Merges corrected labels, and prints what was taken and the next command."""
    from semiseg_jax.data.annotations.summary import print_line
    from semiseg_jax.suggestions import merge, summary

    outcome = merge.merge(
        _MERGE.value, _OUTPUT.value or "", _WORKDIR.value or "", _TAKE_UNTOUCHED.value
    )
    for line in summary.of_merge(outcome):
        print_line(line)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
