"""Benchmarks of riskmap_ext against plain PyTorch, torch.compile, MONAI and nnU-Net."""
