"""Names of what lies in a store's folder that several modules look for."""

ADAPTERS, STAGING = "adapters", "staging"
"""Folders: of committed adapters, and of what a write has not committed yet."""
RESULT = "result.json"
"""Of a finished job, in its folder in staging; written last."""
