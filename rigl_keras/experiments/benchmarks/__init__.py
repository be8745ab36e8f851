"""Costs, and against whom: bin/benchmark and bin/benchmark_inference."""
