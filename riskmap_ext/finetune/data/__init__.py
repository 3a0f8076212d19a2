"""From files to crops."""
