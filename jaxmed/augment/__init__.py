"""Views of a batch, made on the device inside jit, for images of any rank and any number of channels."""
