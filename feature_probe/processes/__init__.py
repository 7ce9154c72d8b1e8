"""Several processes: one report of what all ranks saw."""
