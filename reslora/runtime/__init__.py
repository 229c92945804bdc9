"""Runtime support of all scripts: directory lock, signals, processes, status, log and standard streams."""
