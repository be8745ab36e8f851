"""Searches for hyperparameters: bin/tune."""
