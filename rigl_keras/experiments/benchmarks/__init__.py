"""Benchmarks: bin/benchmark and bin/benchmark_inference."""
