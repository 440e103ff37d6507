"""Smaller students: sparsity while distilling, and the teacher's weights as a start.

While training, as optax transformations: `regularize` (penalties and proximal steps), `group_prox` (a proximal step of
channels, neurons, heads, blocks), `prune` (masks of single weights), `channels` (of channels, neurons, heads) and
`layers` (of residual blocks).
After it, as functions of parameter trees: `shrink` and `layers.drop_layers` (what is dead really removed), `rebuild`
(what to build the smaller network with), `spr` (how far each layer can be cut), `sizes` (zeros and bytes).
Before it: `inject` (the teacher's weights in a student), `merge` (units that are alike become one), `provenance` (which
came from where). None of them needs this package's trainer.

Parameters are chosen by a regular expression that is found in their path, such as `r"conv/kernel$"`; in a train state
the paths of the student's begin with `student/`.
"""
