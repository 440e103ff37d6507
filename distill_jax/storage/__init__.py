"""Stores what must survive a kill: checkpoints, exported students, seals, leases, fingerprints."""
