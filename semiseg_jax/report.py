"""Writes WORKDIR/report.html: python -m semiseg_jax.report --workdir=DIR

A run writes the report at the end of each stage. It is a single file without scripts that needs no
network. It is built from the files in the workdir; where one is missing, a sentence says so. The
sections are built in `reporting`, the layout is in `templates`.
"""

import sys
from pathlib import Path

from absl import app, flags

from semiseg_jax.runtime import cli


def main(argv: list[str]) -> None:
    """Writes the report of the run in --workdir, and optionally two pictures."""
    cli.start_command(argv)
    workdir = flags.FLAGS.workdir
    if not workdir:
        sys.exit("Error: --workdir is missing: give the folder of a run, such as runs/streets.")
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its log messages.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip
    from semiseg_jax.reporting import drawings, galleries, page
    from semiseg_jax.runtime import fileio
    from semiseg_jax.runtime.errors import UserError

    try:
        missing = page.write(workdir)
        if flags.FLAGS.picture:
            fileio.write_bytes(flags.FLAGS.picture, galleries.picture(workdir))
        if flags.FLAGS.norms:
            fileio.write_bytes(flags.FLAGS.norms, drawings.norms_picture(workdir))
    except UserError as error:
        sys.exit(f"Error: {error}")
    print(Path(workdir) / page.FILE)
    for sentence in missing:
        print(sentence)


if __name__ == "__main__":
    cli.define_path_flag("workdir", None, "The run to report on, such as runs/streets.")
    cli.define_path_flag(
        "picture", None, "A PNG to write as well: some images with their labels and predictions."
    )
    cli.define_path_flag(
        "norms", None, "A PNG to write as well: the weak against the strong norm of some layers."
    )
    app.run(main, flags_parser=cli.parse_flags)
