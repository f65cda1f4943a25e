"""Training: objectives, the writers, shards and the executors that run them."""
