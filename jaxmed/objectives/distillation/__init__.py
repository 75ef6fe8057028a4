"""Methods whose teacher is a moving average of the student."""
