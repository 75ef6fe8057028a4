"""The types that rooms hand each other."""
