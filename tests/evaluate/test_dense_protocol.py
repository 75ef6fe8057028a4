"""The protocol of dense probes on corpora with masks: the real source, tiny encoders, and what the command writes."""

import csv
import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image

from jaxmed import cli
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.evaluate import overlap, protocols
from jaxmed.evaluate.protocols import masks
from jaxmed.evaluate.protocols.dense import Dense

SIZE, SPLITS = (16, 16), ('train', 'train', 'val', 'test')
FEW = dict(patches=8, steps=200, batch=64)


def corpus_of(place, images, truths, splits=SPLITS, per_subject=2, lacking=()):
  """A corpus of grey images [n, *grid] with masks; every `per_subject` records are of one subject."""
  (place / 'raw').mkdir(parents=True)
  rows = []
  for i, (image, mask) in enumerate(zip(images, truths, strict=True)):
    end = '.png' if image.ndim == 2 else '.nii.gz'
    name, beside = f'{i:02}{end}', f'mask{i:02}{end}'
    for file, pixels in ((name, image), (beside, mask)):
      if image.ndim == 2:
        Image.fromarray(pixels).save(place / 'raw' / file)
      else:
        nibabel.save(nibabel.Nifti1Image(pixels.transpose(2, 1, 0), np.eye(4)), place / 'raw' / file)
    split = splits[i // per_subject % len(splits)]
    rows.append({'path': name, 'mask': '' if i in lacking else beside, 'subject': f's{i // per_subject}', 'split': split,
                 'kind': 'ab'[i % 2]})
  with open(place / 'raw' / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([place / 'raw'], place / 'out', table=place / 'raw' / 'table.csv', volumes='whole', progress=False)
  return open_source(place / 'out')


def scenes(count=24, size=SIZE, seed=0, classes=3, patch=4):
  """Patches of one class each, whose brightness tells it; noise on each pixel."""
  rng = np.random.default_rng(seed)
  y = rng.integers(0, classes, (count, *(n // patch for n in size)))
  mask = y
  for axis in range(1, len(size) + 1):
    mask = np.repeat(mask, patch, axis=axis)
  image = np.clip(40 + 70 * mask + 10 * rng.normal(size=mask.shape), 0, 255).astype(np.uint8)
  return image, mask.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Means:
  """Features of a patch are its mean brightness and how far that is from the middle one; `noise` makes the untrained."""

  noise: float = 0.0
  image_size: tuple[int, ...] = SIZE
  patch: int = 4
  vocabulary: tuple[str, ...] = ('gray',)

  def embed_source(self, source, batch_size, dense=False, levels=()):
    found = []
    for batch in eval_batches(source, batch_size=batch_size, size=self.image_size, vocabulary=self.vocabulary):
      x = np.float32(batch['image'])[batch['index'] >= 0][..., 0] / 100
      for axis in range(1, x.ndim):
        n = x.shape[axis] // self.patch
        x = x.reshape(*x.shape[:axis], n, self.patch, *x.shape[axis + 1:]).mean(axis=axis + 1)
      found.append(x)
    x = np.concatenate(found)
    x = np.stack([x, np.abs(x - 1.1)], axis=-1)
    x = x + self.noise * np.random.default_rng(len(x)).normal(size=x.shape).astype(np.float32)
    return {'map': x, 'levels': {k: x[..., :1] + k for k in levels}}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  return corpus_of(tmp_path_factory.mktemp('dense'), *scenes())


@pytest.fixture(scope='module')
def result(source):
  return Dense(**FEW).run(Means(), source, untrained=Means(noise=5.0), batch_size=5, draws=50, seed=1)


def test_the_result(result, source):
  """Brightness tells every patch: all probes reach 1 but at corners that logits are interpolated over."""
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert (result['classes'], result['size'], result['patch']) == (['0', '1', '2'], [16, 16], [4, 4])
  assert result['splits'] == {'train': 12, 'val': 6, 'test': 6} and result['subjects'] == {'train': 6, 'val': 3, 'test': 3}
  assert result['patches'] == {'fit': 96, 'val': 48, 'per_record': 8, 'of': 16}
  value = {(r['features'], r['method']): r['metrics']['miou']['value'] for r in result['rows']}
  assert len(value) == 9
  assert value['trained', 'knn'] == value['trained', 'logistic'] == 1 and value['trained', 'linear'] > 0.6
  chosen = {(r['features'], r['method']): r['chosen'] for r in result['rows']}
  assert chosen['trained', 'linear']['val_miou'] == 1  # before its logits are interpolated
  assert value['untrained', 'knn'] < 0.4 < value['pixels (PCA)', 'knn']
  assert result['chance']['miou'] < 0.2
  against = {(d['minus'], d['method']): d['metrics']['miou'] for d in result['differences']}
  assert against['untrained', 'knn']['low'] > 0.2
  assert against['untrained', 'knn']['value'] == pytest.approx(1 - value['untrained', 'knn'])
  row = result['rows'][0]
  assert [c['both'] for c in row['classes']] == [6, 6, 6] and all(c['dice'] == c['iou'] == 1 for c in row['classes'])
  assert any('at most 8 of the 16 of a record' in n for n in result['notes'])


def test_scores_are_of_the_pixels_of_test_masks(source):
  """The intervals and values are those of `overlap` over what the chosen probe predicts, read without the protocol."""
  from jaxmed.evaluate import dense
  protocol, encoder = Dense(**FEW, methods='logistic'), Means(noise=1.0)
  result = protocol.run(encoder, source, batch_size=50, draws=30, pixels=False, seed=4)
  task = masks.make_task(source, SIZE, (), 0.1, 4)
  truth = np.stack([source.select('test')[i]['mask'] for i in range(6)])
  np.testing.assert_array_equal(task.test.codes(range(6)), truth)
  of = lambda split: encoder.embed_source(source.select(split), 50)['map']
  # The protocol draws 8 patches a record; with all of them the choice may differ, so every patch is asked for here.
  whole = Dense(**FEW | {'patches': 0}, methods='logistic').run(encoder, source, batch_size=50, draws=30, pixels=False)
  patches = lambda split: dense.Patches(of(split).reshape(-1, 2), dense.cut(np.stack(
      [r['mask'] for r in source.select(split)]).astype(np.int16), (4, 4)).reshape(-1, 16))
  probe = dense.logistic(patches('train'), patches('val'), 3)
  table = overlap.confusion(truth, probe.predict(of('test'), SIZE), 3)
  got = whole['rows'][0]['metrics']
  assert {m: v['value'] for m, v in got.items()} == pytest.approx(overlap.score(table, [False, True, True]))
  drawn = overlap.resampled(table, source.select('test').table['subject'].to_pylist(), [False, True, True], draws=30)
  assert got['dice']['low'] == pytest.approx(np.percentile(drawn['dice'], 2.5))
  assert whole['patches']['per_record'] == 16 and result['patches']['per_record'] == 8


def test_bounds_of_memory(source):
  """No more patches than asked for, the same ones for every kind of features; another seed draws others."""
  few = lambda seed: Dense(most=24, steps=5, methods='logistic').run(Means(), source, pixels=False, draws=2, seed=seed)
  told = few(0)['patches']
  assert (told['fit'], told['val'], told['per_record']) == (24, 24, 2)
  less = Dense(most=5, steps=5, methods='knn').run(Means(), source, pixels=False, draws=2)['patches']
  assert (less['fit'], less['val']) == (5, 5)
  assert few(0) == few(0)


def test_ignored_values(tmp_path):
  """A border of 255 in all masks is a class unless it is to be ignored; then nothing can depend on what lies there."""
  images, truths = scenes()
  framed = truths.copy()
  framed[:, :2] = 255
  source = corpus_of(tmp_path / 'a', images, framed)
  all_of = Dense(**FEW, methods='knn').run(Means(), source, pixels=False, draws=2)
  assert all_of['classes'] == ['0', '1', '2', '255'] and all_of['rows'][0]['metrics']['miou']['value'] < 0.9
  part = Dense(**FEW, methods='knn', ignore=255).run(Means(), source, pixels=False, draws=2)
  assert part['classes'] == ['0', '1', '2'] and part['ignored'] == [255]
  assert part['rows'][0]['metrics']['miou']['value'] == 1
  assert not any('no mask holds' in n for n in part['notes'])
  more = Dense(**FEW, methods='knn', ignore=(255, 99)).run(Means(), source, pixels=False, draws=2)
  assert any('no mask holds 99' in n for n in more['notes'])


def test_volumes_and_masks_of_another_size(tmp_path):
  """Volumes stored at twice the encoder's size; the example of a volume is a slice."""
  size = (8, 16, 16)
  images, truths = scenes(size=(8, 16, 16), count=16)
  twice = lambda a: a.repeat(2, axis=2).repeat(2, axis=3)
  source = corpus_of(tmp_path, twice(images), twice(truths))
  encoder = Means(image_size=size)
  protocol = Dense(**FEW, methods='knn,logistic')
  result = protocol.run(encoder, source, batch_size=4, draws=5)
  assert result['size'] == [8, 16, 16] and result['patch'] == [4, 4, 4]
  assert result['rows'][0]['metrics']['dice']['value'] == 1
  assert all(c['slice'] is not None and c['shape'] == [16, 16] for c in result['examples']['cases'])
  for name, draw in protocol.drawings(result, source).items():
    draw(tmp_path / f'{name}.png')
    with Image.open(tmp_path / f'{name}.png') as picture:
      assert picture.size[0] > 100


def test_pictures_and_tables(result, source, tmp_path):
  """Worst cases first, with the predictions that they were scored by."""
  protocol = Dense(**FEW)
  text = protocol.tables(result)
  assert 'mIoU (pooled)' in text and 'hallucinated' in text and max(map(len, text.splitlines())) <= 110
  assert '<table' in protocol.html(result) and 'hallucinated' in protocol.html(result)
  rows = protocol.csv_rows(result)
  assert len({len(r) for r in rows}) == 1 and ['trained', '', 'knn', '1', 'dice', '1', '', ''] in rows
  cases = result['examples']['cases']
  assert [c['dice'] for c in cases] == sorted(c['dice'] for c in cases)
  protocol.drawings(result, source)['worst_test_records'](tmp_path / 'a.png')
  with Image.open(tmp_path / 'a.png') as picture:
    shown = np.asarray(picture.convert('RGB')).reshape(-1, 3)
  assert len(np.unique(shown, axis=0)) > 20
  poor = Dense(**FEW, methods='knn').run(Means(noise=1.0), source, pixels=False, draws=2, seed=1)
  worst = poor['examples']['cases'][0]
  row = source.table['id'].to_pylist().index(worst['id'])
  predicted = np.repeat(worst['values'], worst['lengths']).reshape(worst['shape'])
  table = overlap.confusion(source[row]['mask'][None].astype(int), predicted[None], 3)
  assert np.nanmean(overlap.dice(table)) == pytest.approx(worst['dice']) and worst['dice'] < 1
  with pytest.raises(UserError, match='expected the corpus that was evaluated'):
    protocol.drawings(poor, source.select('train'))['worst_test_records'](tmp_path / 'b.png')


def test_other_encoders_beside(source):
  """Scored on the same patches and resamples, with differences to the encoder and to each other."""
  run = lambda one, **options: Dense(**FEW, methods='knn').run(one, source, pixels=False, draws=20, seed=3, **options)
  both = run(Means(), beside={'noisy': Means(noise=1.0), 'worse': Means(noise=3.0)})
  alone = {'trained': run(Means()), 'noisy': run(Means(noise=1.0))}
  for row in both['rows'][:2]:
    assert row['metrics'] == alone[row['features']]['rows'][0]['metrics']
  assert [(d['features'], d['minus']) for d in both['differences']] == [
      ('trained', 'noisy'), ('trained', 'worse'), ('noisy', 'worse')]
  with pytest.raises(UserError, match='its map has 8x8 patches of images of 16x16, that of the encoder 4x4'):
    run(Means(), beside={'fine': Means(patch=2)})
  with pytest.raises(UserError, match="two encoders are called 'trained'"):
    run(Means(), beside={'trained': Means()})


def test_levels_are_joined(source):
  result = Dense(**FEW, methods='knn', levels=(3, 6)).run(Means(), source, pixels=False, draws=2)
  assert result['feature'] == 'levels 3+6' and result['rows'][0]['metrics']['miou']['value'] == 1
  from jaxmed.evaluate.protocols.dense import _joined_levels
  part = source.select('test')
  rng = np.random.default_rng(0)
  coarse, fine = rng.normal(size=(6, 2, 2, 3)), rng.normal(size=(6, 1, 4, 4, 5))
  got = _joined_levels({1: coarse, 2: fine}, part, 2)
  np.testing.assert_array_equal(got, np.concatenate([coarse.repeat(2, 1).repeat(2, 2), fine[:, 0]], axis=-1))
  padded = np.concatenate([fine, np.full_like(fine, 9)], axis=1)  # the records have one channel
  np.testing.assert_array_equal(_joined_levels({2: padded}, part, 2), fine[:, 0])


def test_without_val_a_tenth_of_the_subjects_chooses(tmp_path):
  source = corpus_of(tmp_path, *scenes(), splits=('train', 'train', 'test'))
  task = masks.make_task(source, SIZE, (), 0.1, 0)
  held = set(task.train.subjects[~task.fit])
  assert len(held) == 1 and not held & set(task.train.subjects[task.fit])
  result = Dense(**FEW, methods='knn').run(Means(), source, pixels=False, draws=2)
  assert any('no val split' in n for n in result['notes']) and result['splits']['val'] == 0


def test_records_without_a_mask_are_left_out(tmp_path):
  source = corpus_of(tmp_path, *scenes(), lacking=(0, 7))
  result = Dense(**FEW, methods='knn').run(Means(), source, pixels=False, draws=2)
  assert result['splits'] == {'train': 11, 'val': 6, 'test': 5}


def test_bad_input(source, corpus, tmp_path):
  """One line each, before anything is encoded."""
  class Never(Means):
    def embed_source(self, *args, **options):
      raise AssertionError('it was encoded')
  run = lambda data, **options: Dense(**FEW, **options).run(Never(), data)
  images, truths = scenes()
  with pytest.raises(UserError, match="no masks in these rows: expected a column 'mask'"):
    run(open_source(corpus))
  with pytest.raises(UserError, match='hold only 1 besides -1, 0, 2, which are ignored'):
    run(source, ignore=(0, 2))
  with pytest.raises(UserError, match='hold nothing besides -1, 0, 1, 2, which are ignored'):
    run(source, ignore=(0, 1, 2))
  with pytest.raises(UserError, match="no row of split 'test'"):
    run(source.select('train'))
  with pytest.raises(UserError, match='has 2 axes, and the encoder takes 8x16x16'):
    Dense().run(Never(image_size=(8, 16, 16)), source)
  with pytest.raises(UserError, match='map of 4x4 patches does not divide images of 18x18'):
    Dense().run(Uneven(image_size=(18, 18)), source)
  many = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) + np.zeros((24, 1, 1), np.uint16)
  with pytest.raises(UserError, match='hold 256 values; expected at most 255 classes'):
    run(corpus_of(tmp_path / 'many', images, many))
  with pytest.raises(UserError, match='NaN or infinite'):
    Dense(**FEW).run(Means(noise=float('nan')), source)


class Uneven(Means):
  """A map that is coarser than the image by no whole number."""

  def embed_source(self, source, batch_size, dense=False, levels=()):
    return {'map': np.zeros((len(source), 4, 4, 2), np.float32)}


@pytest.mark.parametrize('words, options', [
    ("dense.ignore is 'all': expected whole numbers", {'ignore': 'all'}), ('dense.patches is -1', {'patches': -1}),
    ("'logistc'.*'logistic'", {'methods': 'knn,logistc'}), ('dense.dropout is 1', {'dropout': 1}),
    ('dense.levels is 0.5', {'levels': 0.5})])
def test_bad_options(words, options):
  with pytest.raises(UserError, match=words):
    Dense(**options)


def test_options_of_the_command():
  found = protocols.get('dense', {'dense.ignore': 255, 'dense.levels': (3, 6)})[0]
  assert found.ignore == (255,) and found.levels == (3, 6)


def test_the_command(trained, tiles, tmp_path, capsys):
  """On a corpus of real tiles whose masks are their dark pixels, with a real encoder and its levels."""
  raw = shutil.copytree(tiles, tmp_path / 'raw')
  with open(raw / 'table.csv', newline='', encoding='utf-8') as f:
    rows = [r for i, r in enumerate(csv.DictReader(f)) if i % 3 == 0 or r['split'] != 'train']
  for row in rows:
    with Image.open(raw / row['path']) as image:
      grey = np.asarray(image.convert('L'))
    row['mask'] = f'mask_{row["path"]}'
    Image.fromarray((grey < 150).astype(np.uint8)).save(raw / row['mask'])
  with open(raw / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, rows[0])
    table.writeheader()
    table.writerows(rows)
  prepare([raw], tmp_path / 'corpus', table=raw / 'table.csv', progress=False)
  run = shutil.copytree(trained, tmp_path / 'run')
  words = ['evaluate', str(run), '--data', str(tmp_path / 'corpus'), '--task', 'dense', '--json',
           '--option', 'dense.steps=20', '--option', 'dense.methods=knn,linear']
  assert cli.main(words) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['classes'] == ['0', '1'] and said['size'] == [16, 16] and said['patch'] == [8, 8]
  assert {r['features'] for r in said['rows']} == {'trained', 'untrained', 'pixels (PCA)'}
  assert cli.main([*words, '--option', 'dense.levels=1,2']) == 0
  assert json.loads(capsys.readouterr().out)['feature'] == 'levels 1+2'
  assert (run / 'evaluation.dense.csv').exists() and (run / 'figures' / 'evaluation.dense.worst_test_records.png').exists()
  assert cli.main([*words, '--option', 'dense.levels=7']) == 2
  assert 'has no level 7' in capsys.readouterr().err
