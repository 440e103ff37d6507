"""Initializes a student from its teacher's weights, and records which weights came from where."""
