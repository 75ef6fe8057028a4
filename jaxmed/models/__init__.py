"""Flax Linen encoders over token grids of any rank, and one registry of their names and sizes."""

from jaxmed.models.registry import create_model, list_models

__all__ = ['create_model', 'list_models']
