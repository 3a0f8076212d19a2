"""Dice and surfaces."""
