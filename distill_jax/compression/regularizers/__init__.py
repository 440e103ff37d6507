"""Regularizes weights by optax transformations: penalties, proximal steps and group lasso."""
