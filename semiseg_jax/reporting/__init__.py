"""The sections of a run's report, each built from the files in the workdir."""
