"""A sparse network as one operation, with TensorFlow and without."""
