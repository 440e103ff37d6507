"""Runs a teacher for a cache: its outputs, its weights, its head, and the comparison with it."""
