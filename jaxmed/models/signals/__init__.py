"""Towers for signals in time, sound and rows of tables."""
