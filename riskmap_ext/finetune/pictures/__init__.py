"""Slices and overlays."""
