"""Many runs from one recipe: plan, launchers, worker, monitor, progress."""
