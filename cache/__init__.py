"""KV storage and the cache policies, one file per policy."""
