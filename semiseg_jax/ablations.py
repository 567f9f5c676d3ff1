"""The paper's tables and figures on any data: python -m semiseg_jax.ablations --table=1 --config=…

Every row is a run of Algorithm 1 (see `paper`), for every seed, in a workdir of its own below
--workdir. Teachers and pseudo-labels that runs have in common are made once. The same command goes
on where it stopped, and what is done stands in the table from the first row on.
"""

import sys

from absl import app, flags

from semiseg_jax import command_line, interruption, paper, startup

_CONFIG = command_line.define_config("Data, network and recipe of every row")
_TABLE = flags.DEFINE_enum(
    "table", None, list(paper.TABLES), "Which of the paper's tables and figures."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The folder of the tables, and of their runs; runs/ablations_camvid for configs/camvid.py "
    "unless given.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; a row is their mean.")
_RUNS = flags.DEFINE_list(
    "runs", [], "Only these runs of the table (their names are those of --dry-run)."
)
command_line.define_processes()
_TABLES_ONLY = flags.DEFINE_bool(
    "tables-only", False, "Run nothing: write the table of what is done, from its rows alone."
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "Say what would run, what it costs, what is done.")


def main(argv: list[str]) -> None:
    """Makes a table, or says what that takes."""
    config_path = command_line.config_path(argv)
    if _TABLE.value is None:
        sys.exit(f"Error: Say which table, as --table=1; there are {', '.join(paper.TABLES)}.")
    if _DRY_RUN.value and _TABLES_ONLY.value:
        sys.exit("Error: --dry-run and --tables-only are two things: give one of them.")
    with startup.of_a_run(_CONFIG.value):
        from semiseg_jax import settings, study

        workdir = _WORKDIR.value or f"runs/ablations_{settings.run_name(config_path)}"
        plan = study.Study(
            _CONFIG.value, _TABLE.value, study.seeds(_SEEDS.value), workdir, _RUNS.value
        )
        if _DRY_RUN.value:
            plan.print_plan()
            return
        if _TABLES_ONLY.value:
            plan.print_table()
            return
        with interruption.by_signals() as asked:
            plan.run(asked)


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
