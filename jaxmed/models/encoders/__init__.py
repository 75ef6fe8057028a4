"""Networks from images to features, one family a file; their names are in `models.registry`."""
