"""From frames to signal values: databases, mappings, decode plans, current state."""
