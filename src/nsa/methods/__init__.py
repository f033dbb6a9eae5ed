"""Trained attention methods beside NSA, one a file."""
