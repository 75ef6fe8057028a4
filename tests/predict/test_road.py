"""From a run on masks to masks of whole images and their scores, by the command."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import jaxmed
from jaxmed.cli import main
from jaxmed.errors import UserError
from tests.masks import classes_of, tiles_with_masks

CONFIG = {
  'method': 'segment', 'model': 'vit_micro/4', 'image_size': 16, 'batch_size': 8, 'steps': 3, 'log_every': 1,
  'checkpoint_every': 3, 'eval_every': 3, 'loader': {'threads': 1, 'fit': 'crop', 'load_size': 16},
  'encoder': {'embed_dim': 32, 'depth': 1, 'num_heads': 2}, 'objective': {'decoder': 'linear'},
  'augment': {'scale': (1.0, 1.0), 'flip': (0.5, 0.0)},
}


@pytest.fixture(scope='module')
def road(tiles, tmp_path_factory):
  from jaxmed.train import loop
  place = tmp_path_factory.mktemp('road')
  corpus = tiles_with_masks(tiles, place)
  loop.train(CONFIG | {'data': str(corpus)}, place / 'run', quiet=True)
  return place


def command(*words, capsys):
  code = main([str(w) for w in words])
  told = capsys.readouterr()
  return code, told.out, told.err


def test_masks_of_a_folder(road, tiles, capsys):
  """What the command writes is what the segmenter says; a second call keeps it."""
  run, out = road / 'run', road / 'out'
  ask = ('predict', run, '--data', tiles, '--out', out, '--volumes', road / 'v.csv', '--json')
  code, told, _ = command(*ask, capsys=capsys)
  assert code == 0 and json.loads(told)['written'] == 96
  segmenter = jaxmed.load_segmenter(run)
  assert segmenter.tile == (16, 16) and segmenter.flips == (0,) and segmenter.values == (0, 1, 2)
  with Image.open(tiles / 'colon03.png') as image, Image.open(out / 'colon03.png') as mask:
    np.testing.assert_array_equal(np.asarray(mask), segmenter.predict(np.asarray(image)))
    assert np.asarray(mask).shape == classes_of(np.asarray(image)).shape
  assert len(list(csv.DictReader((road / 'v.csv').open()))) == 96 * 2
  code, told, _ = command(*ask, capsys=capsys)
  assert code == 0 and json.loads(told)['kept'] == 96


def test_scores_in_the_report_of_the_run(road, capsys):
  code, told, err = command('evaluate', road / 'run', '--data', road / 'corpus', '--task', 'segment', '--option',
                            'segment.surface=voxel', '--beside', road / 'run', '--out', road / 'scores.json', capsys=capsys)
  assert code == 0, err
  assert 'HD95' in told and 'whole images' in told
  got = json.loads((road / 'scores.json').read_text())
  assert got == json.loads((road / 'run' / 'evaluation.segment.json').read_text())
  assert got['splits']['test'] == len(got['rows'][0]['cases']) and got['differences'][0]['metrics']['dice']['value'] == 0
  for path in ('run/evaluation.segment.csv', 'scores.csv', 'run/figures/evaluation.segment.worst_test_records.png'):
    assert (road / path).stat().st_size > 500
  assert 'HD95' in (road / 'run' / 'report.html').read_text()


@pytest.mark.parametrize(('words', 'says'), [
  (('predict', 'trained', '--data', 'tiles', '--out', 'x'), 'is a run of method mae, .*expected a run of method segment'),
  (('predict', 'run', '--data', 'tiles', '--out', 'x', '--flips', 'autom'), "'auto'|auto"),
  (('predict', 'run', '--data', 'tiles', '--out', 'run'), 'run exists and holds no masks of jaxmed predict'),
  (('evaluate', 'trained', '--data', 'corpus', '--task', 'segment'), 'expected a run of method segment'),
  (('evaluate', 'run', '--data', 'corpus', '--task', 'segment,dense'), 'one after the other'),
])
def test_one_line_for_each_mistake(road, trained, tiles, capsys, words, says):
  places = {'trained': trained, 'tiles': tiles, 'run': road / 'run', 'x': road / 'x', 'corpus': road / 'corpus'}
  code, _, err = command(*(places.get(w, w) for w in words), capsys=capsys)
  assert code == 2 and err.count('\n') == 1
  import re
  assert re.search(says, err), err


@pytest.mark.parametrize(('flip', 'axes'), [((), (2,)), ((0.5,), (0, 1, 2)), ((0.0, 0.5, 0.5), (1, 2)), ((0.0,), ())])
def test_axes_that_training_mirrors(flip, axes):
  from jaxmed.train.build.rundir import mirrored_axes
  assert mirrored_axes(flip, 3) == axes


def test_a_run_of_another_method(trained):
  with pytest.raises(UserError, match='method mae'):
    jaxmed.load_segmenter(trained)
