"""Sums become records, records a report."""
