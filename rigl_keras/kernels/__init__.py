"""Layers of masked kernels, computed without their zeros."""
