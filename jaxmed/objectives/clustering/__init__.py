"""Methods that predict assignments to prototypes or clusters."""
