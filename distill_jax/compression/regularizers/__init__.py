"""Regularizers as optax transformations: penalties, proximal steps, and group lasso."""
