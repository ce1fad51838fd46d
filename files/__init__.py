"""What all other folders build on: atomic files, configuration, weights, run folders, images, pages."""
