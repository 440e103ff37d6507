"""Pruning: masks while training, then a really smaller network."""
