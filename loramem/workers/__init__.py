"""Shard jobs where they run: this process, others beside it, a cluster; what comes back is checked and staged."""
