"""Decides what this vehicle trusts: metadata, rights, tokens and time."""
