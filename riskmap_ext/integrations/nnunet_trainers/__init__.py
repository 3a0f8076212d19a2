"""The folder for nnU-Net's environment variable ``nnUNet_extTrainer``."""
