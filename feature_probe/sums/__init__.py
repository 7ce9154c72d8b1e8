"""What was captured becomes sums: over passes, steps and windows."""
