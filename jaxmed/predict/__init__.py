"""Masks of whole images: from a folder or a corpus to a folder of masks, see `job`."""
