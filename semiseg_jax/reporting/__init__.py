"""The sections of a run's report: what each shows, from what lies in the workdir."""
