"""The steps of a store: creating, writing, reading, verifying, compacting, repairing."""
