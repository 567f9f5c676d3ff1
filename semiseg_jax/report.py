"""WORKDIR/report.html, a page of all that a run shows: python -m semiseg_jax.report --workdir=DIR

A run writes it at the end of each stage. It is one file that needs no network and no script. It is
made from what lies in the workdir; what is missing there is said in a sentence in its place. What
each section shows is in `reporting`, and how the page looks in `templates`.
"""

import datetime
import sys
from pathlib import Path

import jinja2
from absl import app, flags
from etils import epath

from semiseg_jax import command_line
from semiseg_jax.data import labels
from semiseg_jax.errors import UserError
from semiseg_jax.reporting import drawings, galleries, numbers
from semiseg_jax.reporting.run import read

FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def write(workdir: epath.PathLike) -> list[str]:
    """Writes report.html into a workdir.

    Returns:
        A sentence for each thing that is missing.

    Raises:
        UserError: the folder is not that of a run, or cannot be written.
    """
    run = read(workdir)
    sections = {
        "ran": numbers.what_ran(run),
        "results": numbers.results(run),
        "curves": drawings.curves(run),
        "confusion": drawings.confusion(run),
        "gallery": galleries.gallery(run),
        "pseudo": galleries.pseudo_labels(run),
        "health": numbers.health(run),
        "norms": drawings.norms(run),
    }
    done = [stage.name for stage in run.stages if stage.done]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(FILE).render(
        title=run.workdir.resolve().name,
        done=done,
        waiting=[stage.name for stage in run.stages if not stage.done],
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        legend=run.legend,
        **sections,
    )
    labels.write_bytes(run.workdir / FILE, page.encode())
    return [section["missing"] for section in sections.values() if section["missing"]]


def main(argv: list[str]) -> None:
    """Writes the report of the command line's workdir."""
    command_line.options_only(argv)
    workdir = flags.FLAGS.workdir
    if not workdir:
        sys.exit("Error: Say which run, such as --workdir=runs/streets.")
    try:
        missing = write(workdir)
        if flags.FLAGS.picture:
            labels.write_bytes(flags.FLAGS.picture, galleries.picture(workdir))
        if flags.FLAGS.norms:
            labels.write_bytes(flags.FLAGS.norms, drawings.norms_picture(workdir))
    except UserError as error:
        sys.exit(f"Error: {error}")
    print(epath.Path(workdir) / FILE)
    for sentence in missing:
        print(sentence)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run to report on, such as runs/streets.")
    flags.DEFINE_string(
        "picture", None, "A PNG to write as well: some images, what is in them, what is seen."
    )
    flags.DEFINE_string(
        "norms", None, "A PNG to write as well: the weak against the strong norm of some layers."
    )
    app.run(main, flags_parser=command_line.parse_plain)
