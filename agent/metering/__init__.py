"""How much of a feature was used: meters, and the hash-chained records they end in."""
