"""report.html: what is there is on the page, what is not is named, and the page needs nothing else."""

import html.parser
import json
import os
import re

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import page
from jaxmed.evaluate.report import figures

from .test_tables import make_result


class Page(html.parser.HTMLParser):
  """Tags must balance; collects text, and whatever would be fetched."""
  void = ('meta', 'img', 'br')

  def __init__(self, text):
    super().__init__()
    self.stack, self.words, self.links, self.tags = [], [], [], []
    self.feed(text)
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in self.void:
      self.stack.append(tag)
    self.links += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action')]

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if self.stack[-1:] != ['style']:
      self.words.append(data)

  @property
  def text(self):
    return re.sub(r'\s+', ' ', ' '.join(self.words))


CONFIG = dict(
  method='mae',
  model=dict(name='channel_vit_tiny/8', depth=12),
  steps=500,
  batch_size=64,
  optimizer=dict(name='adamw', learning_rate=1.5e-4, betas=[0.9, 0.95]),
  note='<script>alert(1)</script>',
  flip=True,
  resume=None,
)


@pytest.fixture
def place(tmp_path):
  place = tmp_path / 'my_run'
  (place / 'figures').mkdir(parents=True)
  (place / 'config.json').write_text(json.dumps(CONFIG))
  (place / 'data.json').write_text(
    json.dumps(
      dict(
        records=7345,
        splits=dict(train=5200, test=1625),
        masks=[dict(name='M1', voxels=77), dict(name='M2', voxels=78)],
        channels=dict(T1=dict(mean=0.5, std=0.25), GM=dict(mean=0.125, std=0.1)),
      )
    )
  )
  (place / 'evaluation.json').write_text(json.dumps(make_result()))
  lines = [dict(step=s, loss=2.0 / s, images_per_second=100 + s, grad_norm=1.0) for s in range(1, 401)]
  (place / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines) + '{"step": 401, "lo')
  for name in ('views', 'reconstructions', 'patch_pca', 'my_own'):
    figures.image_grid(
      np.random.default_rng(0).random((1, 4, 4, 1)), ['x'], place / 'figures' / f'{name}.png'
    )
  return place


def test_a_whole_report(place):
  path = page.write_report(place)
  assert path == place / 'report.html'
  shown = Page(path.read_text())
  for words in (
    'mae · channel_vit_tiny/8',
    'my_run',
    '400 of 500',
    '25,600',
    '300',
    'median',
    '0.005',
    '0.790',
    'logistic',
    'optimizer.learning_rate',
    '0.00015',
    '0.9, 0.95',
    '7345',
    'voxels M1 77 M2 78',
    'GM',
    '0.125',
    '0.490 [0.467, 0.513]',
    '4,500 train',
    'Augmented views',
    'my own',
    '1 damaged line of metrics.jsonl, skipped',
    '<script>alert(1)</script>',
  ):
    assert words in shown.text, words
  assert 'Not drawn' not in shown.text and (place / 'figures' / 'loss.png').exists()
  assert shown.tags.count('figure') == 5 and shown.tags.count('details') == 1 and 'script' not in shown.tags
  assert len(shown.links) == 5 and all(x.startswith('data:image/png;base64,') for x in shown.links)
  style = path.read_text()
  assert 'prefers-color-scheme: dark' in style and 'url(' not in style and '@import' not in style
  assert not re.search(r'https?://', style)


def test_an_empty_directory_says_what_is_missing(tmp_path):
  text = Page(page.write_report(tmp_path).read_text()).text
  for words in (
    'config.json (the configuration)',
    'data.json',
    'metrics.jsonl (the training curve)',
    'evaluation.json',
    'figures/loss.png, figures/views.png, figures/reconstructions.png, figures/patch_pca.png',
    'Run of unknown configuration',
    'Not evaluated yet',
  ):
    assert words in text, words
  with pytest.raises(UserError, match='not a directory'):
    page.write_report(tmp_path / 'none')


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('config.json', '{"method": ', 'config.json (the configuration) is damaged'),
    ('evaluation.json', '[]', 'evaluation.json (the evaluation) is damaged'),
    ('evaluation.json', '{"rows": 3}', 'is not the result of an evaluation'),
    ('evaluation.json', json.dumps(make_result() | dict(rows=[])), 'is not the result of an evaluation'),
    (
      'evaluation.json',
      json.dumps(make_result() | dict(rows=make_result()['rows'][2:])),
      'is not the result',
    ),
    ('data.json', '{"a": {}, "b": {"c": {}}, "d": [], "e": {"f": {"g": {"h": 1}}}}', 'empty'),
    ('figures/views.png', 'GIF89a', 'figures/views.png is damaged'),
    ('metrics.jsonl', '[1]\n{"loss": 1}\n\n\xff\n', '3 damaged lines'),
  ],
)
def test_damaged_files_are_named_and_do_not_stop_the_report(place, name, content, words):
  (place / name).write_text(content)
  assert words in Page(page.write_report(place).read_text()).text


def test_metrics_of_a_resumed_run(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  rows = [
    dict(step=1, loss=5.0),
    dict(step=2, loss=4.0),
    dict(step=2, loss=3.5, lr=1),
    dict(step=2, probe=0.5),
    dict(step=1.0, loss=4.5),
    dict(step=3, loss=float('nan')),
    dict(step=None),
    dict(loss=1),
  ]
  path.write_text('\n'.join(json.dumps(r) for r in rows))
  got, damaged = page.read_metrics(path)
  assert damaged == 2 and [r['step'] for r in got] == [1, 2, 3]
  assert got[0]['loss'] == 4.5 and got[1] == dict(step=2, loss=3.5, lr=1, probe=0.5)
  assert page.read_metrics(tmp_path / 'none') == ([], 0)


def test_the_curve_is_drawn_again_only_when_it_is_old(place):
  page.write_report(place)
  picture = place / 'figures' / 'loss.png'
  before = picture.stat().st_mtime_ns
  page.write_report(place)
  assert picture.stat().st_mtime_ns == before
  os.utime(picture, (1, 1))
  page.write_report(place)
  assert picture.stat().st_mtime_ns > 10**9 * 1000


def test_the_outermost_value_of_a_nested_config():
  assert page.find(dict(a=dict(steps=1, b=dict(steps=2)), c=dict(x=3)), 'steps') == 1
  assert page.find(dict(a=dict(b=dict(x=4))), 'x') == 4
  assert page.find({}, 'x') is None


def test_without_intervals_or_an_untrained_encoder(place):
  result = make_result()
  for row in result['rows']:
    for cell in row['metrics'].values():
      cell.update(low=None, high=None)
  result |= dict(differences=[], rows=[r for r in result['rows'] if r['features'] != 'untrained'])
  (place / 'evaluation.json').write_text(json.dumps(result))
  text = Page(page.write_report(place).read_text()).text
  assert 'no verdict' in text and 'no untrained encoder' in text and '[n/a]' in text
