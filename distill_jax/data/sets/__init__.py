"""Loads data sets, a module each: digits, a brain template, TFDS by name, a folder per class."""
