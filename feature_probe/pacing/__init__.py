"""Pacing: what probing costs in this very run, and when the next report is due."""
