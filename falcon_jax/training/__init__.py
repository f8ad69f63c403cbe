"""Training: one config in, a trained and compressed network and a report out."""
