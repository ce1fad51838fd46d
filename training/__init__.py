"""Training: the run folder, the loop, and one file a stage."""
