"""Writes caches of outputs that others computed: their rows, files of rows, and servers."""
