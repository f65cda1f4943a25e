"""Training: objectives, the writers, and shards from records to proved adapters."""
