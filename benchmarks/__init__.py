"""Studies of speed and accuracy: each prints a table and writes JSON."""
