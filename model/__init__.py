"""Architecture and initialisation of every network."""
