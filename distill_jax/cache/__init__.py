"""Teacher outputs computed once, kept and trusted."""
