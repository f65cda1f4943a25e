"""Base models and their adapters: loading, layers, decoding, features, and the proof."""
