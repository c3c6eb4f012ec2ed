"""Measurements: how a compressed model compares with the dense one, in quality, speed and memory."""
