"""Several counters on one model, their differences explained by operator."""
