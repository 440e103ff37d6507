"""Turns networks of any library into a `Model`: Flax NNX, Flax Linen, Keras 3 and functions."""
