"""From a corpus to batches: which record stands where, reading, missing channels, rates."""
