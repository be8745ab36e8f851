"""Searches: bin/tune."""
