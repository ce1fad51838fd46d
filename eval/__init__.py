"""Measurements of generated pictures."""
