"""The fingerprint of a corpus of volumes with masks, and the command that plans a U-Net from it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxmed import cli, config
from jaxmed.augment import intensity
from jaxmed.data.corpus.fingerprint import fingerprint
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError

SHAPES = [(10, 24, 16), (12, 24, 16), (14, 24, 20)]
SPACINGS = [(4.0, 1.0, 1.0), (4.0, 1.0, 1.0), (6.0, 1.0, 1.0)]


@pytest.fixture(scope='module')
def volumes():
  """Images and masks; values of the foreground are 100 to 199, those outside of it are negative."""
  rng, out = np.random.default_rng(0), []
  for shape in SHAPES:
    mask = np.zeros(shape, np.uint8)
    mask[2:7, 4:12, 3:9] = 1
    mask[3:5, 5:8, 4:6] = 3
    inside = rng.integers(100, 200, shape)
    out.append((np.where(mask > 0, inside, -50).astype(np.int16), mask))
  return out


@pytest.fixture(scope='module')
def corpus(volumes, tmp_path_factory):
  import nibabel

  root = tmp_path_factory.mktemp('fingerprint')
  (root / 'in').mkdir()
  for i, ((image, mask), spacing) in enumerate(zip(volumes, SPACINGS, strict=True)):
    affine = np.diag([*spacing[::-1], 1.0])  # files have the axes x, y, z
    for name, array in ((f'{i}', image), (f'm{i}', mask)):
      nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), root / 'in' / f'{name}.nii.gz')
  pq.write_table(pa.table({'path': [f'{i}.nii.gz' for i in range(3)], 'mask': [f'm{i}.nii.gz' for i in range(3)],
                           'split': ['train'] * 3}), root / 't.parquet')
  prepare([root / 'in'], root / 'c', table=root / 't.parquet', volumes='whole', progress=False)
  return root / 'c'


def test_numbers_are_those_of_the_files(corpus, volumes):
  found = fingerprint(open_source(corpus))
  np.testing.assert_allclose(sorted(found.spacings.tolist()), sorted(SPACINGS))
  assert sorted(map(tuple, found.shapes.tolist())) == sorted(SHAPES)
  assert found.known and found.masks == found.read == 3
  assert found.classes == {'0': 3, '1': 3, '3': 3}
  (only,) = found.foreground.values()
  # Each case counts the same, whatever it holds.
  parts = [image[mask > 0].astype(np.float64) for image, mask in volumes]
  assert only.mean == pytest.approx(np.mean([p.mean() for p in parts]), abs=0.1)
  pooled = np.concatenate([np.repeat(p, 10) for p in parts])
  assert only.std == pytest.approx(pooled.std(), abs=0.1)
  np.testing.assert_allclose((only.low, only.median, only.high), np.percentile(pooled, (0.5, 50, 99.5)), atol=1)


def test_each_record_counts_the_same(corpus):
  """With one draw of each the percentiles are of three pixels, which the masks hold."""
  found = fingerprint(open_source(corpus), draws=3)
  (only,) = found.foreground.values()
  assert 100 <= only.low <= only.median <= only.high < 200
  assert fingerprint(open_source(corpus), most=1).read == 1


def test_the_command(corpus, capsys):
  assert cli.main(['fingerprint', str(corpus), '--json']) == 0
  out = json.loads(capsys.readouterr().out)
  assert out['spacing'] == [4, 1, 1] and out['shape'] == [12, 24, 16] and out['records'] == 3
  assert out['plan']['patch'] == [12, 24, 16] and out['plan']['kernels'][0] == [1, 3, 3] and out['separate_axis'] == 0
  given = config.parse_overrides(out['words'])
  assert given['model'] == 'nnunet_plain' and given['image_size'] == (12, 24, 16) and given['batch_size'] == 2
  name, numbers = intensity.parse_mode(given['loader']['normalize'])
  only, = out['foreground'].values()
  np.testing.assert_allclose(numbers, [only[key] for key in ('low', 'high', 'mean', 'std')], rtol=1e-5)
  assert name == 'foreground'
  assert cli.main(['fingerprint', str(corpus), '--preset', 'resenc_m', '--memory', '16', '--spacing', '2,1,1']) == 0
  text = capsys.readouterr().out
  assert 'resenc_m: spacing 2 x 1 x 1 mm' in text and 'loader.normalize=foreground:' in text
  assert '--spacing 2,1,1' in text and '3 with a mask' in text


@pytest.mark.parametrize('words, message', [
    (['--spacing', '2,1'], 'expected 3 numbers'), (['--preset', 'resenc'], 'resenc_'), (['--memory', '0'], 'positive')])
def test_what_does_not_fit(corpus, words, message, capsys):
  assert cli.main(['fingerprint', str(corpus), *words]) == 2
  assert message in capsys.readouterr().err


def test_a_corpus_without_masks_has_no_foreground(tmp_path):
  (tmp_path / 'in').mkdir()
  for i in range(2):
    np.savez(tmp_path / 'in' / f'{i}.npz', image=np.full((16, 32, 1), i, np.uint8), channels=['x'])
  prepare([tmp_path / 'in'], tmp_path / 'c', progress=False, splits=(1, 0, 0))
  found = fingerprint(open_source(tmp_path / 'c'))
  assert not found.known and found.classes == {} and found.constants == '' and found.spacings.tolist() == [[1, 1]] * 2
  with pytest.raises(UserError, match='no training record'):
    fingerprint(open_source(tmp_path / 'c').select('test'))
