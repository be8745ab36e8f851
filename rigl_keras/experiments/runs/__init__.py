"""One run: bin/train and bin/export."""
