"""Measurements of the engineering that developers repeat, outside the package.

Each is a module to run from the repository's root: ``python -m tests.benchmarks.NAME``.
"""
