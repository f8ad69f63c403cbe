"""Whole jobs on real trained networks."""
