"""Encoder-decoders: networks that read a source and write a target, released weights in and out."""
