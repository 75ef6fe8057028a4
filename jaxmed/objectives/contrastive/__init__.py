"""Methods that compare views of images by vectors of the whole image."""
