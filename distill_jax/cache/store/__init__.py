"""Bytes of a cache: shards of checksummed records in a folder or an object store, and their manifest."""
