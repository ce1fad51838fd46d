"""One file a stage of training, and what only that stage needs."""
