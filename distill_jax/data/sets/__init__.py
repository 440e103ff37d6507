"""Loads data sets, a module each: scikit-learn's digits, TFDS by name, a folder per class."""
