"""Makes the keys of an installation and signs its catalogue, away from the network."""
