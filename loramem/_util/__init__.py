"""Files, events and memory: what every package may use."""
