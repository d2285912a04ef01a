"""Benchmarks: each prints its figures, and what they are compared with, from one run."""
