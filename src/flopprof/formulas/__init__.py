"""What one operator call costs: shapes in, int out; no torch."""
