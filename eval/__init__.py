"""Measurements of generated images."""
