"""The corpus on disk: shards, manifests, report."""
