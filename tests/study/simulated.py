"""Grids of runs from known laws."""

import numpy as np

from jaxmed.study.laws import Design, Law

LAPTOP = Law(0.30, (12.0, 25.0), (0.35, 0.40))  # of the size that a study on a laptop shows


def grid(widths=4, sizes=4, seeds=1, law=LAPTOP, noise=0.0, rng=None):
  """(design, y, cells) of a grid of parameters and samples; noise is that of log y."""
  n, d = np.meshgrid(np.geomspace(1e5, 1e7, widths), np.geomspace(1e4, 1e6, sizes), indexing='ij')
  x = np.repeat(np.stack([n.ravel(), d.ravel()], axis=1), seeds, axis=0)
  y = law.predict(x)
  if noise:
    y = y * np.exp(noise * rng.standard_normal(len(y)))
  return Design(x), y, np.repeat(np.arange(widths * sizes), seeds)


def line(count=8, law=None, noise=0.0, rng=None, rising=False):
  """(design, y, cells) of one axis."""
  law = law or (Law(0.9, (5.0,), (0.5,), rising=True) if rising else Law(0.2, (5.0,), (0.5,)))
  x = np.geomspace(1e2, 1e5, count)[:, None]
  y = law.predict(x)
  if noise:
    y = y * np.exp(noise * rng.standard_normal(len(y)))
  return Design(x, law.rising), y, np.arange(count)
