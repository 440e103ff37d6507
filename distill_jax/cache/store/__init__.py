"""Stores the bytes of a cache: shards of checksummed records in a folder or an object store."""
