from cli_runs import files, own_directory  # noqa: F401  (fixtures)
