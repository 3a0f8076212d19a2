"""What all rooms of the driver stand on."""
