"""The text and HTML tables of an evaluation."""

import html.parser

import pytest

from jaxmed.evaluate import tables


def cell(value, half=0.0234):
  return dict(value=value, low=value - half, high=value + half)


def make_result(trained=0.8, untrained=0.5):
  def every(value):
    return dict(accuracy=cell(value), balanced_accuracy=cell(value - 0.01), auroc=cell(value + 0.02))
  rows = [dict(features=f, method=m, metrics=every(v)) for f, v in (
      ('trained', trained), ('untrained', untrained), ('pixels (PCA)', 0.6)) for m in ('knn', 'logistic')]
  differences = [dict(features='trained', minus=f, method=m, metrics=every(v)) for f, v in (
      ('untrained', trained - untrained), ('pixels (PCA)', 0.2)) for m in ('knn', 'logistic')]
  return dict(
    label='region <b>',
    feature='mean',
    classes=['a', 'b'],
    rows=rows,
    differences=differences,
    splits=dict(train=4500, val=500, test=2000),
    subjects=dict(train=90, val=9, test=40),
    chance=dict(accuracy=0.1, balanced_accuracy=0.0833, auroc=0.5),
    draws=1000,
    seed=0,
    notes=['classes without a test row, left out of AUROC: ' + ', '.join(f'class{i}' for i in range(20))],
  )


def test_text_is_aligned_and_fits():
  text = tables.text_table(make_result())
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100
  head = lines[0]
  row = next(line for line in lines if 'balanced accuracy' in line)
  assert row[head.index('trained'):].startswith('0.790 [0.767, 0.813]')
  assert row[head.index('untrained'):].startswith('0.490 [0.467, 0.513]')
  assert row[head.index('pixels'):].startswith('0.590 [0.567, 0.613]')
  assert '+0.300 [+0.277, +0.323]' in text and 'trained - untrained' in text
  assert '4,500 train (90 subjects)' in text and 'Chance: accuracy 0.100' in text
  assert text.count('kNN') == 2 and text.count('macro AUROC') == 5  # once a block; four rows and the chance


def test_html_is_balanced_and_escaped():
  class Check(html.parser.HTMLParser):
    stack: list[str] = []
    cells = 0

    def handle_starttag(self, tag, attrs):
      self.stack.append(tag)
      self.cells += tag == 'td'

    def handle_endtag(self, tag):
      assert self.stack.pop() == tag
  text, check = tables.html_table(make_result()), Check()
  check.feed(text)
  assert not check.stack and check.cells == 6 * 6 + 6 * 4
  assert 'region &lt;b&gt;' in text and '<b>0.800</b>' in text and '<b>0.500</b>' not in text


def test_a_missing_baseline_is_a_gap_not_a_failure():
  result = make_result()
  result['rows'] = [r for r in result['rows'] if (r['features'], r['method']) != ('untrained', 'knn')]
  result['differences'] = []
  text = tables.text_table(result)
  assert 'difference' not in text and any(' - ' in line for line in text.splitlines())
  assert '–' in tables.html_table(result)


@pytest.mark.parametrize(('trained', 'words'), [
    (0.8, 'beats the untrained one on every metric'), (0.507, 'on kNN macro AUROC, logistic macro AUROC.'),
    (0.5, 'beats the untrained one beyond the interval on no metric.'),
    (0.3, 'worse than the untrained one on every metric'),
    (0.472, 'on no metric, and is worse beyond it on kNN accuracy')])
def test_the_verdict(trained, words):
  text = tables.verdict(make_result(trained=trained))
  assert words in text and text.endswith(
    'beats raw pixels on every metric; no interval of a difference holds 0.'
  )


def test_no_verdict_without_a_baseline():
  assert 'no verdict' in tables.verdict(make_result() | dict(differences=[]))
