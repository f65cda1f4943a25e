"""Planning: what values cost, what rank holds them, and the law and calibration that say so."""
