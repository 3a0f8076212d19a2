"""What a source model is, and how to read one."""
