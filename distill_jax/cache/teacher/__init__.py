"""The teacher of a cache: computes its outputs, stores its head, and checks that both still agree."""
