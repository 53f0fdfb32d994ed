"""Benchmarks: whole processes, compared within one run."""
