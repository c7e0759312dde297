"""Checks of values, building objects from configuration nodes, and devices."""
