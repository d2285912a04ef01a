"""The in-vehicle agent: verifies entitlements, switches features, meters use."""

__version__ = "0.1.0"
