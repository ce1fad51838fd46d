"""What the command `sample.py` is made of; importing it changes nothing."""
