"""Process-level services: command line, files, processes, signals, settings of XLA."""
