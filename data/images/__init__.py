"""Sources of captioned images that are read from files."""
