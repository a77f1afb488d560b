"""Running: parties, simulation in one process, sessions over a network, checkpoints, configuration, reports."""
