"""evaluate() on a corpus that prepare wrote: the real Source and the real batches, not stand-ins."""

import csv

import numpy as np
import pytest
import tifffile

from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.evaluate import pixels
from jaxmed.evaluate.protocols import classify

SIZE = (6, 6)


class Pixels:
  """An encoder whose features are the pixels themselves."""

  image_size, vocabulary = SIZE, ('b', 'spare', 'a')

  def embed_source(self, source, batch_size):
    batches = eval_batches(source, batch_size=batch_size, size=SIZE, vocabulary=self.vocabulary)
    rows = [
      np.asarray(x['image'], np.float32)[x['index'] >= 0].reshape(np.sum(x['index'] >= 0), -1)
      for x in batches
    ]
    return {'mean': np.concatenate(rows)}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  place, rng = tmp_path_factory.mktemp('corpus'), np.random.default_rng(0)
  (place / 'raw').mkdir()
  lines = []
  for i in range(90):
    y = i % 2
    side = np.where(np.arange(6) // 3 == y, 60, -60)[:, None]  # which half is bright
    image = np.clip(side + 100 + 20 * rng.normal(size=(*SIZE, 2)), 0, 255).astype(np.uint8)
    image[..., 1] //= 4
    tifffile.imwrite(place / 'raw' / f'{i:03}.tif', np.moveaxis(image, -1, 0), photometric='minisblack')
    split = ('train', 'val', 'test')[i // 2 % 3]
    lines.append(
      dict(
        path=f'{i:03}.tif',
        subject=f'{split}{i // 6}',
        split=split,
        ill='' if i < 4 else bool(y),
        grade='' if i < 4 else 1.5 * y,
        age=20 + i / 7,
      )
    )
  with open(place / 'raw' / 'table.csv', 'w', newline='') as f:
    table = csv.DictWriter(f, lines[0])
    table.writeheader()
    table.writerows(lines)
  prepare(
    [place / 'raw'], place / 'out', table=place / 'raw' / 'table.csv', channels=['a', 'b'], progress=False
  )
  return open_source(place / 'out')


@pytest.mark.parametrize('label', ['ill', 'grade'])
def test_labels_of_any_type_are_evaluated(corpus, label):
  result = classify.Classify().run(Pixels(), corpus, label, batch_size=7, draws=20)
  assert (
    sum(result['splits'].values()) == 86 and result['splits']['test'] == 30 and len(result['classes']) == 2
  )
  for row in result['rows']:
    assert row['metrics']['accuracy']['value'] == 1.0, row


def test_pixels_of_a_corpus(corpus):
  train, test = corpus.select('train'), corpus.select('test')
  got = pixels.source_features(Pixels(), train, test, batch_size=7, components=4)
  images = [np.stack([s[i]['image'] for i in range(len(s))]) for s in (train, test)]
  for g, w in zip(got, pixels.pca_features(*images, components=4), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-3)


@pytest.mark.parametrize(('label', 'target', 'words'), [('il', 'auto', "did you mean 'ill'"), ('age', 'classes', 'measurement')])
def test_unusable_labels(corpus, label, target, words):
  with pytest.raises(UserError, match=words):
    classify.Classify(target).run(Pixels(), corpus, label, draws=5)


def test_a_number_and_labels_of_a_corpus(corpus):
  result = classify.Classify().run(Pixels(), corpus, 'age', draws=20)
  assert result['target'] == 'number' and sum(result['splits'].values()) == 90
  result = classify.Classify('labels').run(Pixels(), corpus, 'ill', draws=20)
  assert result['classes'] == ['ill'] and sum(result['splits'].values()) == 86
  assert all(r['metrics']['auroc']['value'] == 1.0 for r in result['rows'])
