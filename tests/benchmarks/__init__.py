"""What others do beside what this package does: time, memory, and the same numbers."""
