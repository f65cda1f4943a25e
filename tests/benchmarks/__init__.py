"""Measurements of the engineering, which nothing that is installed needs: each a module to run with ``python -m``."""
