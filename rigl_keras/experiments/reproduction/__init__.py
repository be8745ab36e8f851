"""Many runs, by several processes: bin/reproduce."""
