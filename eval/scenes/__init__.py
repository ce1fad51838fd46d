"""Scenes read back from images and compared with what was promised."""
