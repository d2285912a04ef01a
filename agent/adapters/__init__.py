"""The agent's edges: buses, ECUs, cloud, disk, clock and the local interface."""
