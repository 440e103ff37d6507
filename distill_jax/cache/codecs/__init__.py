"""How one output of a teacher is stored: whole, as its most probable classes, or as random samples."""
