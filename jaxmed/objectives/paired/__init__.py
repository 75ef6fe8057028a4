"""Methods that pair an image with something else of its record, such as its text."""
