"""A single run: bin/train and bin/export."""
