"""gin-configured runs: the only part that knows gin, absl and the disk."""
