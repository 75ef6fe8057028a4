"""Whole test records predicted and judged: numbers by hand, conventions, several runs, and what is refused."""

import csv
import json

import nibabel
import numpy as np
import pytest

from jaxmed import evaluate
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.evaluate import protocols, segmentation
from jaxmed.evaluate.protocols.segment import Segment
from tests.segmenters import bright, segmenter

SPACING = (1.0, 2.0, 0.5)  # x, y, z


def volume(seed, bright_at=(4, 5, 3)):
  """An image [X, Y, Z] with a bright box, and its mask (3), which has a voxel less on one side and a voxel of 7."""
  image = np.random.default_rng(seed).integers(0, 50, (12, 11, 9)).astype(np.int16)
  x, y, z = bright_at
  mask = np.zeros(image.shape, np.uint8)
  if x is not None:
    image[x : x + 4, y : y + 3, z : z + 3] += 150
    mask[x : x + 3, y : y + 3, z : z + 3] = 3
  return image, mask


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Two subjects of training, one of val, three of test, of which the last has nothing in its mask."""
  place = tmp_path_factory.mktemp('masks')
  rows = []
  for i, split in enumerate(('train', 'train', 'val', 'test', 'test', 'test')):
    image, mask = volume(i, (3 + i % 2, 5, 2 + i % 3))
    if i == 5:
      mask[:] = 0
    if i == 4:
      mask[0, 0, 0] = 7
    for name, array in (('image', image), ('mask', mask)):
      nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), place / f'{name}{i}.nii')
    rows.append({'path': f'image{i}.nii', 'subject': f's{i}', 'split': split, 'mask': f'mask{i}.nii'})
  with (place / 'table.csv').open('w', newline='') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([place], place / 'corpus', table=place / 'table.csv', channels=('T1',), volumes='whole', progress=False)
  return place / 'corpus'


def test_numbers_by_hand(corpus):
  """A box of 4 x 3 x 3 for one of 3 x 3 x 3: one face is a voxel (1 mm along x) off."""
  got = Segment(lesions='touch', tolerance=0.5).run(bright(), open_source(corpus))
  assert got['classes'] == [{'value': 3, 'name': 'lamp'}, {'value': 7, 'name': '7'}]
  (row,) = got['rows']
  lamp, seven = row['classes']
  dice = 2 * 27 / (27 + 36)
  assert [lamp[k] for k in ('both', 'missed', 'hallucinated', 'absent')] == [2, 0, 1, 0]
  assert [seven[k] for k in ('both', 'missed', 'hallucinated', 'absent')] == [0, 1, 0, 2]
  assert lamp['dice'] == pytest.approx(2 * dice / 3) and seven['dice'] == 0
  assert row['metrics']['dice']['value'] == pytest.approx(dice / 3)
  diagonal = np.linalg.norm([12 * 1, 11 * 2, 9 * 0.5])
  assert seven['hd95'] == pytest.approx(diagonal) and lamp['hd95'] == pytest.approx((2 * 1 + diagonal) / 3)
  assert lamp['sensitivity'] == 1 and lamp['false_positives'] == pytest.approx(1 / 3)
  first = row['cases'][0]['classes'][0]
  assert first['volume'] == 27 and first['volume_predicted'] == first['volume'] + first['volume_difference'] == 36
  assert got['splits'] == {'train': 2, 'val': 1, 'test': 3} and got['examples']['cases'][0]['dice'] == 0
  assert any('cannot predict, counted as missed: 7' in note for note in got['notes'])
  json.dumps(got, allow_nan=False)


def test_interval_and_difference_are_over_the_same_subjects(corpus):
  source = open_source(corpus)
  got = Segment(surface='none').run(bright(), source, beside={'dim': bright(level=400.0), 'same': bright()}, draws=200)
  metrics = {row['features']: row['metrics']['dice'] for row in got['rows']}
  minus = {d['minus']: d['metrics']['dice'] for d in got['differences'] if d['features'] == 'trained'}
  assert minus['dim']['value'] == pytest.approx(metrics['trained']['value'] - metrics['dim']['value'])
  assert minus['same'] == {'value': 0, 'low': 0, 'high': 0}
  assert metrics['trained']['low'] <= metrics['trained']['value'] <= metrics['trained']['high']
  assert 'hd95' not in metrics['trained'] or metrics['trained'].get('hd95') is None


def test_tables_and_files(corpus, tmp_path):
  source, protocol = open_source(corpus), Segment()
  got = json.loads(json.dumps(protocol.run(bright(), source, draws=50)))
  text = protocol.tables(got)
  assert 'HD95' in text and 'lamp' in text and max(map(len, text.splitlines())) <= 110
  assert '<table' in protocol.html(got)
  head, *rows = protocol.csv_rows(got)
  assert head[:6] == ['features', 'minus', 'method', 'class', 'case', 'metric']
  assert {tuple(r[3:6]) for r in rows} >= {('all', 'all', 'dice'), ('lamp', 'all', 'missed'), ('7', 'image4.nii', 'outcome')}
  assert len({len(r) for r in [head, *rows]}) == 1
  for name, draw in protocol.drawings(got, source).items():
    draw(tmp_path / f'{name}.png')
  assert (tmp_path / 'worst_test_records.png').stat().st_size > 1000


def test_post_processing_is_chosen_on_val(corpus):
  """A far voxel that is brighter than all: by itself a component, which val tells to drop."""
  source = open_source(corpus)
  spotted = bright(level=45.0)  # noise reaches 49: many small components
  plain = Segment(surface='none').run(spotted, source)['rows'][0]
  better = Segment(surface='none', postprocess='auto').run(spotted, source)['rows'][0]
  assert plain['postprocess'] == [] and better['postprocess'] == ['foreground']
  assert better['classes'][0]['dice'] > plain['classes'][0]['dice']


def test_from_python_and_what_does_not_go_together(corpus):
  got = evaluate(bright(), str(corpus), 'segment', surface='voxel', tolerance=2.0)
  assert got['rows'][0]['metrics']['nsd']['value'] is not None
  with pytest.raises(UserError, match='one after the other'):
    evaluate(bright(), str(corpus), 'segment,retrieve', label='subject')


@pytest.mark.parametrize(('options', 'words'), [
  ({'surface': 'surfels'}, 'surfel'), ({'lesions': 'any'}, 'touch'), ({'flips': 'all'}, 'auto'), ({'tiles': 0}, '1 or more'),
  ({'postprocess': 'yes'}, 'auto')])
def test_bad_options(options, words):
  with pytest.raises(UserError, match=words):
    protocols.get('segment', {f'segment.{k}': v for k, v in options.items()})


def test_runs_of_other_classes_and_corpora_without_masks(corpus, tmp_path):
  source = open_source(corpus)
  other = segmenter((8, 8, 8), values=(0, 1), channels=({'name': 'T1', 'mean': 0.0, 'std': 1.0},), tile=(8, 8, 8))
  with pytest.raises(UserError, match='other predicts the values 0, 1 of masks, the run 0, 3'):
    Segment().run(bright(), source, beside={'other': other})
  with pytest.raises(UserError, match="no row of split 'test'"):
    Segment().check(source.select(split='train'))
  with pytest.raises(UserError, match='image3.nii: unknown channel'):
    Segment().run(bright(channels=('T2',)), source)
  assert segmentation.LABELS.keys() == Segment.metrics.keys()
