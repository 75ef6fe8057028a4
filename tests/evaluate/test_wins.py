"""The table of wins over tasks, by hand."""

import json

from jaxmed.evaluate import page, wins


def result(label, headline, differences):
  """A result with one method; differences {(features, minus): (value, low, high)}."""
  return {'label': label, 'headline': headline, 'differences': [
    {'features': a, 'minus': b, 'method': 'knn', 'metrics': {
      'accuracy': {'value': 0.9, 'low': 0.8, 'high': 1.0}, headline: dict(zip(('value', 'low', 'high'), cell, strict=True))}}
    for (a, b), cell in differences.items()]}


FOUND = {
  'classify': result('organ', 'balanced_accuracy', {('trained', 'other'): (0.2, 0.1, 0.3), ('trained', 'third'): (-0.2, -0.3, -0.1)}),
  'classify.age': result('age', 'mae', {('trained', 'other'): (-2.0, -3.0, -1.0), ('trained', 'third'): (2.0, -1.0, 3.0)}),
  'retrieve': result('organ', 'map', {('trained', 'other'): (0.1, None, None)}),
  'dense': {'label': 'mask', 'rows': []},
}


def test_wins_losses_and_what_is_undecided():
  found = {(f['features'], f['minus']): f for f in wins.wins(FOUND)}
  assert list(found) == [('trained', 'other'), ('trained', 'third')]
  one, other = found.values()
  assert (one['won'], one['lost'], one['undecided']) == (2, 0, 1)
  assert (other['won'], other['lost'], other['undecided']) == (0, 1, 1)
  assert [c['won'] for c in one['comparisons']] == [True, True, None]
  assert one['comparisons'][1] == {'task': 'classify.age', 'label': 'age', 'method': 'knn', 'metric': 'mae', 'won': True,
                                   'value': -2.0, 'low': -3.0, 'high': -1.0}
  assert wins.wins({'dense': FOUND['dense']}) == []


def test_zero_at_an_end_decides_nothing():
  cell = lambda low, high: wins.wins({'t': result('x', 'auroc', {('a', 'b'): (0.0, low, high)})})[0]['undecided']
  assert [cell(0.0, 0.1), cell(-0.1, 0.0), cell(0.0, 0.0), cell(0.01, 0.1)] == [1, 1, 1, 0]


def test_text_csv_and_page(tmp_path):
  found = wins.wins(FOUND)
  text = wins.text(found)
  assert 'trained - other  2    0     1' in text and '+0.200 [+0.100, +0.300] +' in text
  assert 'MAE' in text and '-2.000 [-3.000, -1.000] +' in text and max(map(len, text.splitlines())) <= 110
  rows = wins.csv_rows(found)
  assert rows[0][:3] == ['features', 'minus', 'task'] and len(rows) == 6
  assert rows[1][2:] == ['classify', 'organ', 'knn', 'balanced_accuracy', '0.2', '0.1', '0.3', 'True']
  assert rows[3][2:] == ['retrieve', 'organ', 'knn', 'map', '0.1', '', '', '']
  (tmp_path / 'evaluation.wins.json').write_text(json.dumps({'wins': found}))
  shown = page.write_report(tmp_path).read_text()
  assert 'Wins over tasks' in shown and '+0.200 [+0.100, +0.300] +' in shown
  (tmp_path / 'evaluation.wins.json').write_text('{"wins": [3]}')
  assert 'is not a table of wins' in page.write_report(tmp_path).read_text()
