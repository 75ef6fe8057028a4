"""jaxmed: foundation models for medical images of any number of channels, in JAX."""

__version__ = '0.1.0'
