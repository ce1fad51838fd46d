"""Checkpoints: the state from which an interrupted stage continues, on disk whole or not at all."""
