"""Several runs as one experiment: comparisons of methods, searches."""
