"""The report's settings, rows and published numbers, as data."""
