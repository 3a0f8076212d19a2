"""What a source model is, and how it is read."""
