"""Tables, figures and a page of what was trained, for bin/report."""
