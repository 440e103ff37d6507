"""Stores one output of a teacher: all values, the k most probable classes, or random samples.

A codec turns an output [B, ...] into small columns and back. `encode` belongs inside the teacher's
jit, so that only the columns leave the device; `decode` inside the train step. The last axis is
the one of classes (or channels); the axes between it and the first are tokens or pixels, each
encoded on its own.
"""
