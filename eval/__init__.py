"""Measurements of samples: distances, agreement with captions, copies, and scenes that are read back."""
