"""The laboratory of verdicts.py: networks, training, the truth, and what is expected."""
