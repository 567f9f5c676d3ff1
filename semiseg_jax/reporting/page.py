"""report.html: the page of a run."""

import datetime
import json
from pathlib import Path

import jinja2
from etils import epath

from semiseg_jax.reporting import drawings, galleries, numbers
from semiseg_jax.reporting.run import read
from semiseg_jax.runtime import config_files, fileio
from semiseg_jax.runtime.errors import first_line
from semiseg_jax.runtime.logger import logger

FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"


def update(workdir: epath.PathLike) -> None:
    """Writes report.html during a run; logs a warning if it cannot be written.

    Nothing that a run computes depends on the report, so no report ends a run.
    """
    try:
        write(workdir)
    except Exception as error:
        logger.warning(
            f"Warning: {epath.Path(workdir) / FILE} could not be written ({first_line(error)}): "
            "the run goes on without it; python -m semiseg_jax.report writes it later."
        )


def write(workdir: epath.PathLike) -> list[str]:
    """Writes report.html into a workdir.

    Returns:
        A sentence for each section with missing data.

    Raises:
        UserError: the folder is not the workdir of a run, or is not writable.
    """
    run = read(workdir)
    defaults = json.loads(config_files.default_config().to_json_best_effort())
    sections = {
        "ran": numbers.what_ran(run, defaults),
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
        verdict=run.verdict,
        done=done,
        waiting=[stage.name for stage in run.stages if not stage.done],
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        legend=run.legend,
        **sections,
    )
    # File names that are not UTF-8 are shown with question marks.
    fileio.write_bytes(run.workdir / FILE, page.encode(errors="replace"))
    return [section["missing"] for section in sections.values() if section["missing"]]
