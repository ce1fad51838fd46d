"""Training: the loop that all stages share, what it needs, and one file for each stage."""
