"""Smaller students: sparsity while distilling, and the teacher's weights as a start.

`regularize` (penalties and proximal steps), `prune` (masks) and `channels` (masks of whole channels) are optax
transformations; `inject` (the teacher's weights in a student), `shrink` (channels really removed) and `spr` (how far
each layer can be cut) are functions of parameter trees. None of them needs this package's trainer.

Parameters are chosen by a regular expression that is found in their path, such as `r"conv/kernel$"`; in a train state
the paths of the student's begin with `student/`.
"""
