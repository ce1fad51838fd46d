"""The ground that everything stands on: whole files, configuration, weights, run folders, images, pages."""
