"""Runs a config: everything that knows `Config`, from the command line to the report."""
