"""Methods whose output is dense."""
