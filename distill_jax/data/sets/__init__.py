"""Data sets, each a module with a `load()`: embedded digits, TFDS by name, a folder of images per class."""
