"""Measurements that anyone can repeat: each prints its figures and appends them to a results file."""
