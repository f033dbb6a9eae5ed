"""Trained attention methods, one a file: which streams a query reads, and how what it finds is added."""
