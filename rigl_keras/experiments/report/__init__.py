"""Tables, figures and a page of trained runs, for bin/report."""
