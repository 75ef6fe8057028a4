"""The protocols robustness, corruptions, confounded and bottleneck on a corpus that prepare wrote, and their command."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import tifffile
from sklearn.metrics import balanced_accuracy_score

from jaxmed import cli
from jaxmed.data.corpus.open import open_source
from jaxmed.data.feed.pipeline import eval_batches
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.evaluate import clusters, corruptions, probes, protocols
from jaxmed.evaluate.protocols import tasks
from jaxmed.evaluate.protocols.bottleneck import Bottleneck
from jaxmed.evaluate.protocols.confounded import Confounded
from jaxmed.evaluate.protocols.corruptions import Corruptions
from jaxmed.evaluate.protocols.robustness import Robustness

SIZE = (8, 8)
SMALL = {'repetitions': 1, 'fits': 2, 'steps': 3, 'severities': '1,5', 'kinds': 'noise,brightness'}


@dataclasses.dataclass(frozen=True)
class Seen:
  """An encoder that sees what the class changes in an image, what the centre changes, or both, the class maybe weakly."""

  what: str = 'both'
  image_size: tuple[int, ...] = SIZE
  vocabulary: tuple[str, ...] = ('a',)
  feature: str = 'mean'

  def embed_source(self, source, batch_size):
    batches = eval_batches(source, batch_size=batch_size, size=SIZE, vocabulary=self.vocabulary)
    x = np.concatenate([np.asarray(b['image'], np.float32)[b['index'] >= 0] for b in batches])[..., 0] - 100
    biology, centre = x[:, :4].mean(axis=(1, 2)) - x[:, 4:].mean(axis=(1, 2)), x[:, :, 0].mean(axis=1)
    keep = {'biology': (1, 0), 'centre': (0, 1), 'both': (1, 1), 'weak': (1, 1), 'nothing': (0, 0)}[self.what]
    noise = [x[:, 1, 3] - x[:, 1, 4], x[:, 6, 5] - x[:, 6, 6]]
    if self.what == 'weak':
      biology = biology + 2 * (x[:, 2, 3] - x[:, 2, 4])
    return {'mean': np.stack([keep[0] * biology, keep[1] * centre, np.full(len(x), 5), *noise], axis=1)}


def image(rng, y, centre):
  """The class makes the upper or the lower half bright, the centre the left edge."""
  x = 100 + 6 * rng.normal(size=SIZE)
  x[:4] += 12 * (2 * y - 1)
  x[:, 0] += 40 * (centre - 1)
  return np.clip(x, 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Subjects of two images, each of one class and centre: 8 in train, 4 in val and in test of every cell."""
  place, rng = tmp_path_factory.mktemp('centres'), np.random.default_rng(0)
  (place / 'raw').mkdir()
  lines = []
  for split, count in (('train', 8), ('val', 4), ('test', 4)):
    for j in range(6 * count):
      y, centre = j % 2, j // 2 % 3
      for _ in range(2):
        i = len(lines)
        tifffile.imwrite(place / 'raw' / f'{i:03}.tif', image(rng, y, centre), photometric='minisblack')
        lines.append({'path': f'{i:03}.tif', 'subject': f'{split}{j}', 'split': split, 'ill': 'ab'[y],
                      'centre': '' if i == 0 else 'ABC'[centre], 'upper': '' if i % 10 == 0 else y,
                      'noise': int(rng.integers(2)), 'rare': int(i < 5), 'own': f'p{i}', 'both': 'xyz'[centre] + 'ab'[y],
                      'one': 'K', 'none': '', 'only': 'KL'[split == 'val' and centre == 1]})
  with open(place / 'raw' / 'table.csv', 'w', newline='', encoding='utf-8') as f:
    table = csv.DictWriter(f, lines[0])
    table.writeheader()
    table.writerows(lines)
  prepare([place / 'raw'], place / 'out', table=place / 'raw' / 'table.csv', channels=['a'], progress=False)
  return place / 'out'


@pytest.fixture(scope='module')
def source(place):
  return open_source(place)


def cells(result, method, metric):
  return {r['features']: r['metrics'][metric] for r in result['rows'] if r['method'] == method}


def check(result, protocol, source, tmp_path):
  """It is JSON, its text is narrow, its table whole, its pictures drawn."""
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert max(map(len, protocol.tables(result).splitlines())) <= 120
  assert protocol.html(result).count('<table') == 2 * (1 + ('corruptions' in result)) and 'None' not in protocol.html(result)
  head, *lines = protocol.csv_rows(result)
  assert lines and all(len(line) == len(head) and all(isinstance(c, str) for c in line) for line in lines)
  for name, draw in protocol.drawings(result, source).items():
    draw(tmp_path / f'{name}.png')
    assert (tmp_path / f'{name}.png').stat().st_size > 1000


def test_robustness(source, tmp_path, monkeypatch):
  """Features of the class have index 1 and no drop, those of the centre 0; both stand beside each other in pairs."""
  monkeypatch.setattr(clusters, 'STARTS', (2, 2))
  protocol = Robustness(centre='centre', **SMALL)
  result = protocol.run(Seen('biology'), source, 'ill', untrained=Seen('centre'), draws=50)
  check(result, protocol, source, tmp_path)
  assert result['parts'] == ['index', 'clustering', 'drop', 'corruptions']
  assert '1 of 192 labelled rows' in result['notes'][0]
  index, score = cells(result, 'frozen', 'index'), cells(result, 'frozen', 'clustering')
  assert index['trained']['value'] > 0.95 and index['untrained']['value'] < 0.1
  assert score['trained']['value'] > 0.3 > 0 > score['untrained']['value']
  assert result['index']['chosen_on'] == 'val' and result['chance']['index'] == pytest.approx(2 / 3, abs=0.01)
  drop = cells(result, 'frozen', 'drop_id')
  assert abs(drop['trained']['value']) < 0.05 and set(cells(result, 'frozen', 'drop_ood')) == {'trained', 'untrained', 'pixels (PCA)'}
  assert len(result['drop']['others']) == 1 and len(result['drop']['known']) == 2
  difference = next(d for d in result['differences'] if d['minus'] == 'untrained')['metrics']
  assert difference['index']['low'] > 0.8
  assert difference['index']['value'] == pytest.approx(index['trained']['value'] - index['untrained']['value'])
  assert difference['drop_id']['low'] <= difference['drop_id']['value'] <= difference['drop_id']['high']
  assert result['corruptions']['kinds'] == ['noise', 'brightness']
  text = protocol.tables(result)
  assert 'robustness index' in text and 'performance drop, OOD' in text and 'mean change' in text


def test_parts_and_new_splits(source):
  """A given k; all rows; several centres of training; no encoder untrained and no pixels."""
  protocol = Robustness(centre='centre', parts='index,drop', k=7, splits='new', known='A,B,C', fits=1, steps=2)
  result = protocol.run(Seen('both'), source, 'ill', pixels=False, draws=20, seed=1)
  assert result['parts'] == ['index', 'drop'] and result['index']['k'] == 7 and result['index']['chosen_on'] == ''
  assert sum(result['splits'].values()) == 191 and result['drop']['others'] == []
  assert [r['features'] for r in result['rows']] == ['trained']
  assert set(result['rows'][0]['metrics']) == {'index', 'drop_id'} and 'no OOD drop' in protocol.tables(result)
  beside = Robustness(centre='centre', parts='index', pairs=True).run(
      Seen('both'), source, 'ill', pixels=False, beside={'other': Seen('centre')}, draws=20)
  assert [d['minus'] for d in beside['differences']] == ['other']


def test_what_the_rows_do_not_allow_is_left_out_or_refused(source):
  """Centre 'L' has rows of val alone."""
  with pytest.raises(UserError, match=r"column 'only': all 48 test rows are 'K'.*robustness.splits=new"):
    Robustness(centre='only', parts='index').check(source, 'ill')
  with pytest.raises(UserError, match=r'left out'):
    Robustness(centre='only').check(source, 'ill')
  few = source.keep(np.array([s != 'val' or c == 'A' for s, c in zip(
      *(source.table[n].to_pylist() for n in ('split', 'centre')), strict=True)]))
  result = Robustness(centre='centre', repetitions=1).check(few, 'ill')
  assert result is None
  plans, notes = Robustness(centre='centre')._planned(Robustness(centre='centre')._origins(few, 'ill', 0))
  assert list(plans) == ['index', 'clustering', 'corruptions'] and "drop is left out: val rows of 'a' with 'B': 0" in notes[-1]
  with pytest.raises(UserError, match="val rows of 'a' with 'B': 0 rows"):
    Robustness(centre='centre', parts='drop').check(few, 'ill')


@pytest.mark.parametrize('make', [lambda c: Robustness(centre=c), lambda c: Confounded(confounder=c)])
@pytest.mark.parametrize('column, words', [
    ('', 'is not set: expected a column'), ('center', "did you mean 'centre'"), ('ill', 'is the label itself'),
    ('one', r"column 'one': all 192 labelled rows are 'K'"), ('none', "column 'none' is empty in all 192 rows"),
    ('both', "column 'both' determines the label 'ill'"), ('own', 'is it an identifier')])
def test_columns_that_tell_nothing(source, make, column, words):
  with pytest.raises(UserError, match=words) as e:
    make(column).check(source, 'ill')
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('options, words', [
    ({'robustness.parts': 'indx'}, "'index'"), ({'robustness.k': -1}, 'whole number'), ({'robustness.steps': 1}, '2 or more'),
    ({'robustness.pairs': 3}, 'true or false'), ({'robustness.splits': 'all'}, 'corpus, new'),
    ({'robustness.severities': '0'}, 'severities'), ({'robustness.severities': (1, 1)}, 'each once'),
    ({'robustness.kinds': 'blurr'}, "'blur'"), ({'robustness.rows': 0}, '1 or more'),
    ({'confounded.correlation': 1.5}, 'from 0 to 1'), ({'bottleneck.weight': -1}, '0 or more'),
    ({'bottleneck.epochs': 'many'}, 'whole number')])
def test_options(options, words):
  with pytest.raises(UserError, match=words):
    protocols.get(next(iter(options)).split('.')[0], options)


def test_wants_of_parts(source):
  for options, words in (({'k': 60, 'parts': 'index'}, r'robustness.k=60: some of the 48 test rows have 46 neighbours'),
                         ({'k': 31, 'parts': 'index', 'pairs': True}, r'have 30 neighbours'),
                         ({'known': 'A', 'parts': 'drop'}, 'two or more centres'),
                         ({'known': 'A,D', 'parts': 'drop'}, "value of column 'centre' 'D'"),
                         ({'kinds': 'stain', 'parts': 'corruptions'}, 'stain does not suit')):
    with pytest.raises(UserError, match=words):
      Robustness(centre='centre', **options).check(source, 'ill')


def test_corruptions(source, tmp_path):
  """Changes are those of probes of clean rows on images that are corrupted by hand."""
  protocol = Corruptions(kinds='noise,contrast', severities=(2, 5))
  result = protocol.run(Seen('both'), source, 'ill', untrained=Seen('nothing'), draws=30, seed=4)
  check(result, protocol, source, tmp_path)
  assert (result['kinds'], result['left_out'], result['notes']) == (['noise', 'contrast'], {}, [])
  task = tasks.make_task(source, 'ill', 4)
  x = {s: Seen('both').embed_source(p.source, 64)['mean'] for s, p in task.parts.items()}
  want = {}
  for kind, severity in (('clean', 0), ('contrast', 2), ('contrast', 5)):
    test = corruptions.corrupted(task.test.source, SIZE, ('contrast',), (2, 5))['' if kind == 'clean' else kind, severity]
    got = probes.knn(x['train'], task.train.y, Seen('both').embed_source(test, 64)['mean'], 2).argmax(axis=1)
    want[kind, severity] = balanced_accuracy_score(task.test.y, got)
  found = {(r['kind'], r['severity']): r for r in result['severities'] if (r['features'], r['method']) == ('trained', 'knn')}
  for key, value in want.items():
    assert found[key]['accuracy']['value'] == pytest.approx(value)
    assert found[key]['change']['value'] == pytest.approx(value - want['clean', 0])
  change = cells(result, 'knn', 'contrast')['trained']
  assert change['value'] == pytest.approx(np.mean([want['contrast', s] for s in (2, 5)]) - want['clean', 0])
  assert change['low'] <= change['value'] <= change['high']
  assert cells(result, 'knn', 'mean')['trained']['value'] == pytest.approx(
      np.mean([cells(result, 'knn', k)['trained']['value'] for k in ('noise', 'contrast')]))
  assert found['clean', 0]['change'] == {'value': 0, 'low': 0, 'high': 0}


def test_fewer_rows_are_whole_subjects_and_noted(source):
  result = Corruptions(kinds='noise', severities=5, rows=9).run(Seen(), source, 'ill', pixels=False, draws=5)
  assert result['splits']['test'] == 9 and result['subjects']['test'] == 5
  assert '9 of 48 test rows are used (corruptions.rows)' in result['notes']
  everything = Corruptions().chosen(source)
  assert everything == (tuple(k for k in corruptions.KINDS if k != 'stain'), {
      'stain': 'images do not all have red, green and blue in an unsigned type'})


def test_confounded(source, tmp_path):
  """What sees the centre fails where it turns round, what sees the class does not; rows are as many and apart."""
  protocol = Confounded(confounder='centre', correlation=0.9)
  two = source.where({'centre': ('A', 'C')})
  result = protocol.run(Seen('weak'), two, 'ill', untrained=Seen('biology'), draws=50)
  check(result, protocol, two, tmp_path)
  for method in ('knn', 'logistic'):
    gap, ood = cells(result, method, 'gap'), cells(result, method, 'ood')
    assert gap['trained']['value'] > 0.3 and gap['trained']['low'] > 0 and abs(gap['untrained']['value']) < 0.15
    assert gap['trained']['value'] == pytest.approx(cells(result, method, 'id')['trained']['value'] - ood['trained']['value'])
  assert result['parts']['id'] == result['parts']['ood'] and result['home'] == {'a': ['A'], 'b': ['C']}
  assert result['correlations'] == {'train': 0.875, 'val': 1, 'id': 1, 'ood': -1}
  assert 'cells are too small for the correlation 0.9: val 1.00, id 1.00' in result['notes']
  assert 'ID - OOD' in protocol.tables(result)
  chosen = protocol.run(Seen('weak'), two, 'ill', draws=5, pixels=False)
  assert chosen['rows'][0]['metrics']['id']['value'] == result['rows'][0]['metrics']['id']['value']
  new = Confounded(confounder='centre', splits='new').run(Seen('weak'), source, 'ill', draws=5, pixels=False)
  assert new['values'] == ['A', 'B', 'C'] and sum(new['splits'].values()) == 191
  with pytest.raises(UserError, match=r"test rows of 'a' with 'C': 0 rows; expected \d+ or more for the splits"):
    protocol.check(two.keep(np.array([(s, c, y) != ('test', 'C', 'a') for s, c, y in zip(
        *(two.table[n].to_pylist() for n in ('split', 'centre', 'ill')), strict=True)])), 'ill')


def test_subjects_in_two_splits_are_refused(source):
  names = source.table['subject'].to_pylist()
  names = ['p' if n in ('train0', 'test0') else n for n in names]
  table = source.table.whole()
  at = table.column_names.index('subject')
  split = dataclasses.replace(source, table=table.set_column(at, 'subject', [names]))
  for protocol in (Confounded(confounder='centre'), Robustness(centre='centre'), Corruptions()):
    with pytest.raises(UserError, match="subject 'p' has rows in"):
      protocol.check(split, 'ill')
  Confounded(confounder='centre', splits='new').check(split, 'ill')


def test_bottleneck(source, tmp_path):
  """Through the concept alone the class is known whatever the centre is; without confounder it is a plain test."""
  table = tmp_path / 'table.json'
  table.write_text(json.dumps({'a': {'upper': -1, 'noise': 0}, 'b': {'upper': 1, 'noise': 0}}))
  two = source.where({'centre': ('A', 'C')})
  protocol = Bottleneck(table=str(table), confounder='centre', epochs=30)
  result = protocol.run(Seen('weak'), two, 'ill', untrained=Seen('nothing'), draws=30, pixels=False)
  check(result, protocol, two, tmp_path)
  gap = {m: cells(result, m, 'gap')['trained']['value'] for m in ('linear', 'bottleneck', 'no_prior')}
  assert gap['linear'] > 0.3 > gap['bottleneck'] and cells(result, 'bottleneck', 'ood')['trained']['value'] > 0.65
  assert [c['name'] for c in result['concepts']] == ['upper', 'noise'] and result['concepts'][0]['accuracy'] > 0.7
  assert result['concepts'][0]['rows']['train'] < 64 and result['prior'] == [[-1, 0], [1, 0]]
  assert result['weights'][1][0] > 0 > result['weights'][0][0]
  plain = Bottleneck(table=str(table), epochs=5)
  result = plain.run(Seen('weak'), source, 'ill', draws=5)
  check(result, plain, source, tmp_path)
  assert set(result['rows'][0]['metrics']) == {'id'} and cells(result, 'linear', 'id')['trained']['value'] > 0.65
  table.write_text(json.dumps({'a': {'uper': -1}, 'b': {}}))
  with pytest.raises(UserError, match="'uper': did you mean 'upper'"):
    plain.check(source, 'ill')
  table.write_text(json.dumps({'a': {'rare': -1}, 'b': {}}))
  with pytest.raises(UserError, match="concept 'rare': 5 training rows have it"):
    plain.check(source, 'ill')
  with pytest.raises(UserError, match='bottleneck.table is not set'):
    Bottleneck().check(source, 'ill')


def test_the_command(trained, tiles, tmp_path, capsys):
  """The tasks of a run on a corpus of colour tiles with two centres."""
  import shutil
  rows = list(csv.DictReader((tiles / 'table.csv').open(encoding='utf-8')))
  folder, table = tmp_path / 'tiles', tmp_path / 'table.csv'
  shutil.copytree(tiles, folder)
  for i, row in enumerate(rows):
    row['centre'] = 'UV'[i // 12 % 2]
  with open(table, 'w', newline='', encoding='utf-8') as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  prepare([folder], tmp_path / 'corpus', table=table, progress=False)
  run = shutil.copytree(trained, tmp_path / 'run')
  words = ['evaluate', str(run), '--data', str(tmp_path / 'corpus'), '--label', 'tissue', '--task', 'robustness,confounded']
  small = ['--option', 'robustness.repetitions=1', '--option', 'robustness.fits=1', '--option', 'robustness.steps=2',
           '--option', 'robustness.severities=5', '--option', 'confounded.confounder=centre']
  assert cli.main([*words, *small, '--option', 'robustness.centre=centre', '--json']) == 0
  said = json.loads(capsys.readouterr().out)['protocols']
  assert said['robustness']['parts'] == ['index', 'clustering', 'drop', 'corruptions']
  assert said['robustness']['corruptions']['kinds'] == ['noise', 'blur', 'compression', 'brightness', 'contrast', 'stain']
  assert said['robustness'] == json.loads((run / 'evaluation.robustness.json').read_text())
  assert (run / 'figures' / 'evaluation.robustness.index.png').exists()
  page = (run / 'report.html').read_text()
  assert all(words in page for words in ('Evaluation: robustness', 'clustering score', 'Evaluation: confounded', 'OOD accuracy'))
  assert cli.main([*words, *small, '--option', 'robustness.centre=center']) == 2
  assert "did you mean 'centre'" in capsys.readouterr().err
