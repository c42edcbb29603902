"""A run: its ranks, its state on disk, its end, what it reports."""
