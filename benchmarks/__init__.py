"""Benchmarks: run by hand, results committed under results/. Never part of the timed tests."""
