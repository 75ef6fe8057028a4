"""Methods that predict what they hide."""
