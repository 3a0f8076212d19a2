"""What all other packages of the driver build on."""
