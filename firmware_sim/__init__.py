"""A simulated vehicle: its drive, its ECUs and its bus, with the truth that billing is compared with.

Shares no code with the agent and the cloud; only the contracts and the golden
vectors tie them together.
"""
