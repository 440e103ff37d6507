"""What survives a kill: checkpoints, exported students and programs, and the seals, leases and fingerprints they rest on."""
