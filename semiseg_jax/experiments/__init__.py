"""The paper's tables: their runs, sweeps over seeds, and tables of results."""
