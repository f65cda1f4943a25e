"""Stores on the Hugging Face Hub: what is published, how it gets there, and what is checked on the way back."""
