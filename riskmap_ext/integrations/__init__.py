"""MONAI and nnU-Net: one file each, which needs its framework; the core imports none."""
