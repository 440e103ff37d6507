"""Prunes networks: masks while training, then smaller arrays with the same outputs."""
