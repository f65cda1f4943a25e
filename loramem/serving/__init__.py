"""Serving adapters elsewhere: what servers take, and folders made for them."""
