"""Ways of storing compared: what a byte of a store is worth in acceptance."""
