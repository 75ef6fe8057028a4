"""The figures of a run: augmented views at its beginning, what the model sees and predicts at its end."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmed import files
from jaxmed.augment.channels import cosines
from jaxmed.augment.views import ViewMaker
from jaxmed.data.feed import fields
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.resize import resize
from jaxmed.evaluate.attention import MOST_BYTES, attention_maps, weight_bytes
from jaxmed.evaluate.page import write_report
from jaxmed.evaluate.report import figures, overlays
from jaxmed.models.encoders.channel_vit import ChannelViT
from jaxmed.models.layers import channel_embed
from jaxmed.train.build import assemble, towers
from jaxmed.train.build.rundir import encoder_of
from jaxmed.train.probe import thin
from jaxmed.train.step import TrainState

# Compiled once for equal view makers and objectives.
_views = jax.jit(ViewMaker.__call__, static_argnums=0)
_plain = jax.jit(ViewMaker.plain, static_argnums=0)
_pictures = jax.jit(lambda objective, *args: objective.pictures(*args), static_argnums=0)


def views(run: Any, state: TrainState) -> None:
  """Saves the augmented views of the first batch."""
  if jax.process_count() > 1:
    return
  batch, names = _sample(run, 'train')
  rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), 0)
  shown = _views(run.trainer.view, rng, batch)
  image = _own(run, shown_image(shown), batch)
  names = names if image.shape[-1] == len(names) else ('one channel',)  # of each its own
  figures.image_grid(image, names, run.folder / 'figures' / 'views.png', 'Augmented views of the first records')


def shown_image(views: dict[str, Any]) -> Any:
  """The images of a view maker's output: the view, or two of the global views of each sample, one below the other."""
  if 'global' not in views:
    return views['image']
  image = views['global']['image'][:, :2]
  return image.reshape(-1, *image.shape[2:])


def _own(run: Any, image: Any, batch: Mapping[str, Any]) -> np.ndarray:
  """The channels that the records have, where the view maker put them among all others."""
  image = np.asarray(image)
  return image[..., np.asarray(batch['channels'][0])] if run.trainer.view.place else image


def end(run: Any, state: TrainState) -> None:
  """Saves what the objective can show of itself, patch features, and the curves."""
  if jax.process_count() > 1:
    return
  folder = run.folder / 'figures'
  batch, names = _sample(run, 'val' if 'val' in run.corpus.table.column('split').to_pylist() else 'train')
  plain = _plain(run.trainer.view, batch)
  shown = _pictures(run.trainer.objective, state.variables(run.fixed), plain, jax.random.key(0))
  if 'reconstructions' in shown:
    original, masked, filled = (_own(run, x, batch) for x in shown['reconstructions'])
    figures.reconstructions(original, masked, filled, names, folder / 'reconstructions.png')
  if 'segmentation' in shown:
    image, truth, found = (np.asarray(x) for x in shown['segmentation'])
    method = run.trainer.objective
    overlays.segmentation(_own(run, image, batch), truth, found, names, method.values, method.names,
                          folder / 'segmentation.png')
  encoder = encoder_of(run.trainer, run.config, run.spec, state)
  stored = np.asarray(plain_input(batch, run.config))
  patches = encoder.embed(stored, names)['patches']
  if encoder.model.per_channel:
    patches = patches.mean(axis=1)
  if isinstance(encoder.model, ChannelViT):
    _channels(run.folder, encoder, plain['image'], stored, names)
  figures.patch_pca(_own(run, plain['image'], batch), patches, folder / 'patch_pca.png', names)
  write_report(run.folder)


def _channels(run: pathlib.Path, encoder: Any, image: Any, stored: Any, names: Sequence[str]) -> None:
  """Saves what a ChannelViT can show of its channels: their embeddings, and what it looks at in images."""
  model, folder = encoder.model, run / 'figures'
  if 'channel_hash' in encoder.params:
    found = channel_embed.census(encoder.params['channel_hash'], model.channel_names, model.hash_widths)
    files.write_json(run / 'channels.json', {'width': model.hash_width, 'features': found})
  if len(encoder.channels) > 1:
    vectors = model.apply({'params': encoder.params}, method='channel_vectors')
    figures.channel_similarity(np.asarray(cosines(vectors)), encoder.vocabulary, folder / 'channel_similarity.png')
  if model.channel_attention == 'joint' and weight_bytes(model, stored.shape[1:]) <= MOST_BYTES:
    maps = attention_maps(encoder, stored, names)
    figures.looked_at(image, maps['relevance'], maps['share'], names, folder / 'relevance.png')


def plain_input(batch: Mapping[str, Any], config: Any) -> Any:
  """Stored intensities at the native size of the encoder."""
  image = batch['image']
  if tuple(image.shape[1:-1]) == tuple(config.image_size):
    return image
  return np.stack([resize(np.asarray(x), tuple(config.image_size)) for x in image])


def _sample(run: Any, split: str) -> tuple[dict[str, Any], tuple[str, ...]]:
  """A few fixed records that share one channel set, as a batch without padding, and the channels' names."""
  source = run.corpus.select(split=split)
  sets = [tuple(row) for row in source.table.column('channels').to_pylist()]
  known = collections.Counter(s for s in sets if set(s) <= set(run.spec.ids))
  if not known:  # nothing held out has channels that the model knows
    return _sample(run, 'train')
  names, _ = known.most_common(1)[0]
  rows = np.asarray([i for i, s in enumerate(sets) if s == names])
  source = thin(dataclasses.replace(source, table=source.table.take(rows)), 6)
  config, size = run.config, tuple(run.config.loader.load_size)
  asked = towers.fields_of(run.trainer.objective, config.towers)
  wanted = fields.of_source(source, size, asked, **assemble.lengths(config, run.spec))
  batch = next(iter(eval_batches(source, batch_size=len(source), size=size, vocabulary=run.spec.ids,
                                 fit=config.loader.fit, fields=wanted, labels=run.spec.mask_values)))
  batch.pop('channel_mask')
  return batch, names
