"""Makes students smaller, and initializes them from their teacher's weights.

- `initialization`, before training: `teacher` copies, slices, projects or factorizes the teacher's
  weights, `merge` merges units that are alike, `provenance` records which weights came from where.
- `regularizers`, while training, as optax transformations: `penalties` (penalties and proximal
  steps), `groups` (a proximal step for channels, neurons, heads and blocks).
- `pruning`, while training, as optax transformations: `weights` (masks of single weights),
  `channels` (of channels, neurons and heads), `layers` (of residual blocks). After it, as functions
  of parameter trees: `shrink` and `layers.drop_layers` remove what is dead, `rebuild` returns the
  arguments of the smaller network, `thresholds` finds how far each layer can be cut.
- `quantize`: int8. `sizes`: zeros and bytes of a network.

None of them needs this package's trainer. Parameters are selected by a regular expression that is
found in their path, such as `r"conv/kernel$"`; in a train state the paths of the student's
parameters begin with `student/`.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  import optax  # noqa: F401  (nearly all modules are optax transformations)
