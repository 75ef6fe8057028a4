"""Towers for words."""
