"""The cache policies, one file per policy."""
