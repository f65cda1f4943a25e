"""The SQLite index of a store: rows and their seals, commits, locks."""
