"""What every entry needs while it runs: the folder lock, signals, processes, status, log, standard streams."""
