"""The paper's tables and figures on any data: python -m semiseg_jax.ablations --table=1 --config=…

Every row is a run of Algorithm 1 (see `paper`), for every seed, in a workdir of its own below
--workdir. Teachers and pseudo-labels that runs share are made once. The table is written after
every run, with the paper's numbers beside ours. The same command continues where it stopped.
"""

import sys
from typing import Any

from absl import app, flags

from semiseg_jax.experiments import paper_tables
from semiseg_jax.runtime import cli, preemption

_CONFIG = cli.define_config_flag("Data, network and recipe of every row")
_TABLE = flags.DEFINE_enum(
    "table", None, list(paper_tables.TABLES), "Which of the paper's tables and figures."
)
_WORKDIR = cli.define_path_flag(
    "workdir",
    None,
    "The folder of the tables and their runs; the default is runs/ablations_NAME, such as "
    "runs/ablations_camvid for configs/camvid.py.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; a row is the mean over them.")
_RUNS = flags.DEFINE_list(
    "runs", [], "Only these runs of the table (their names are those of --dry-run)."
)
cli.define_process_flags()
_TABLES_ONLY = flags.DEFINE_bool(
    "tables-only", False, "Run nothing: write the table of the results that there are."
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print rows, runs, their cost and their state.")


def _check(config: Any) -> None:
    # Imported late: it imports JAX, for which --help need not wait.
    from semiseg_jax import config_check

    config_check.check(config)


def main(argv: list[str]) -> None:
    """Makes a table, or prints the plan of one."""
    config_path = cli.start_command_with_config(argv)
    if _TABLE.value is None:
        sys.exit(f"Error: --table is missing: give one of {', '.join(paper_tables.TABLES)}.")
    if _DRY_RUN.value and _TABLES_ONLY.value:
        sys.exit("Error: --dry-run and --tables-only are two things: give one of them.")
    with cli.setup_run(_CONFIG.value, _check):
        from semiseg_jax import config_check
        from semiseg_jax.experiments import sweep as sweep_lib

        workdir = _WORKDIR.value or f"runs/ablations_{config_check.run_name(config_path)}"
        seeds = sweep_lib.parse_seeds(_SEEDS.value)
        sweep = sweep_lib.Sweep(_CONFIG.value, _TABLE.value, seeds, workdir, _RUNS.value)
        if _DRY_RUN.value:
            sweep.print_plan()
            return
        if _TABLES_ONLY.value:
            sweep.print_table()
            return
        with preemption.install_signal_handlers():
            sweep.run()


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags_and_config)
