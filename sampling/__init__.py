"""Requests to samples: the engine, and what the command `sample.py` is made of; importing it changes nothing."""
