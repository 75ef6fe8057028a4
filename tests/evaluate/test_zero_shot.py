"""Zero-shot classification against hand computations, and what wrong prompts and encoders say."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize_scalar

from jaxmed.data.feed.texts import Texts
from jaxmed.errors import UserError
from jaxmed.evaluate import calibration, naming, prompts
from jaxmed.evaluate.protocols import PROTOCOLS, channels
from jaxmed.evaluate.protocols.zero_shot import ZeroShot
from jaxmed.pair import tokenize

from . import fakes

RNG = np.random.default_rng(0)
WORDS = {w: RNG.normal(size=16) for w in ('a', 'b', 'c', 'x', 'no')}


@dataclasses.dataclass(frozen=True)
class FakePair:
  """Texts are sums of vectors of their words; images go through unchanged."""

  seed: int = 0
  feature: str = 'mean'
  scale: float = 7.0
  length: int = 12
  wording: Texts = Texts()

  def images(self, x):
    return unit(x)

  def texts(self, texts, batch_size=64):
    return unit(np.stack([sum(WORDS.get(w, WORDS['x']) for w in t.split()) + self.seed for t in texts]))


@dataclasses.dataclass(frozen=True)
class PairEncoder(fakes.FakeEncoder):
  pair: FakePair | None = FakePair()

  def embed_subsets(self, source, subsets, batch_size, feature):
    return np.stack([self.embed_source(source, batch_size)[feature] * (1 + i) for i, _ in enumerate(subsets)])


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope='module')
def source():
  return fakes.make_source(rows=150, subjects_per_split=9)


def test_every_number_is_that_of_a_hand_computation(source, tmp_path):
  file = tmp_path / 'words.json'
  file.write_text(json.dumps({'templates': ['{}', 'x {}'], 'classes': {'A': 'a', 'b': ['b', 'b c'], 'c': 'c', 'd': 'x'}}))
  encoder, protocol = PairEncoder(), ZeroShot(prompts=str(file), k=2, ranks=(5, 20), pool='mean,max')
  result = protocol.run(encoder, source, 'region', untrained=PairEncoder(noise=5.0), draws=50)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert result['prompts'] == {'a': ['a', 'x a'], 'b': ['b', 'b c', 'x b', 'x b c'], 'c': ['c', 'x c']}
  assert any('not offered: d' in n for n in result['notes'])
  rows = {(r['features'], r['method']): r for r in result['rows']}
  parts = {s: source.select(s, 'region') for s in ('val', 'test')}
  y = {s: np.array(['abc'.index(v) for v in p.table['region'].to_pylist()]) for s, p in parts.items()}
  for pool in ('mean', 'max'):
    cosine = {}
    for split, part in parts.items():
      x = np.float64(encoder.embed_source(part, 1)['mean'])
      cosine[split] = np.zeros((len(x), 3))
      for i, v in enumerate(x):
        for k, texts in enumerate(result['prompts'].values()):
          each = [sum(WORDS[w] for w in t.split()) for t in texts]
          each = [e / np.sqrt(e @ e) for e in each]
          mean = sum(each) / len(each)
          found = [v @ mean / np.sqrt(mean @ mean)] if pool == 'mean' else [v @ e for e in each]
          cosine[split][i, k] = max(found) / np.sqrt(v @ v)
    cell, c, t = rows['trained', pool], cosine['test'], y['test']
    value = {m: v['value'] for m, v in cell['metrics'].items()}
    assert value['accuracy'] == pytest.approx(np.mean(c.argmax(axis=1) == t))
    assert value['top_k'] == pytest.approx(np.mean([t[i] in np.argsort(-c[i])[:2] for i in range(len(t))]))
    assert value['balanced_accuracy'] == pytest.approx(np.mean([(c.argmax(axis=1) == t)[t == k].mean() for k in range(3)]))
    for k in (5, 20):
      want = np.mean([np.mean(t[np.argsort(-c[:, j])[:k]] == j) for j in range(3)])
      assert value[f'precision_at_{k}'] == pytest.approx(want)
    p = np.exp(7 * c) / np.exp(7 * c).sum(axis=1, keepdims=True)
    assert value['ece'] == pytest.approx(calibration.score(t, p)['ece'], abs=1e-5)
    nll = lambda s, c=cosine['val'], t=y['val']: np.mean(np.log(np.exp(s * c).sum(axis=1)) - s * c[np.arange(len(t)), t])
    best = minimize_scalar(nll, bounds=(0.1, 200), method='bounded').x
    assert cell['val_scale'] == pytest.approx(best, rel=0.01) and nll(cell['val_scale']) < nll(7.0)
    assert cell['prompts'] == 8 and cell['scale'] == 7
    assert cell['metrics']['accuracy']['low'] < value['accuracy'] < cell['metrics']['accuracy']['high'] or value['accuracy'] in (0, 1)
  assert result['chance']['accuracy'] == pytest.approx(1 / 3) and result['chance']['top_k'] == pytest.approx(2 / 3)
  assert 'pixels' not in json.dumps(result['rows']) and result['splits']['train'] == 0
  text = protocol.tables(result)
  assert 'top-2 accuracy' in text and 'best prompt' in text and 'precision@20' in protocol.html(result)
  found = result['examples'][0]
  assert [f['right'] for f in found['found']] == [f['text'].split()[0] == found['label'] for f in found['found']]


def test_labels_by_pairs_of_prompts(source):
  flags = np.random.default_rng(3).integers(-1, 2, (len(source), 2))
  table = source.table.append_column('a', pa.array(flags[:, 0].tolist())).append_column('c', pa.array(flags[:, 1].tolist()))
  both = dataclasses.replace(source, table=table)
  result = ZeroShot().run(PairEncoder(), both, 'a,c', draws=20)
  assert result['target'] == 'labels' and result['prompts'] == {n: {'yes': [n], 'no': [f'no {n}']} for n in 'ac'}
  test = both.select('test').table
  x = unit(np.float64(PairEncoder().embed_source(both.select('test'), 1)['mean']))
  auroc = []
  for name in 'ac':
    y, yes, no = np.array(test[name].to_pylist()), unit(WORDS[name]), unit(WORDS['no'] + WORDS[name])
    gap = x @ yes - x @ no
    wins = [np.mean([(p > n) + 0.5 * (p == n) for n in gap[y == 0]]) for p in gap[y == 1]]
    auroc.append(np.mean(wins))
    assert result['rows'][0]['labels'][name]['auroc']['value'] == pytest.approx(auroc[-1])
  assert result['rows'][0]['metrics']['auroc']['value'] == pytest.approx(np.mean(auroc))
  assert 'macro AP' in PROTOCOLS['zero_shot'].tables(result)  # the page asks the protocol by its name
  assert PROTOCOLS['zero_shot'].drawings(result, both) == {}


def test_by_channels_and_without_val(source):
  few = source.keep(np.array([s != 'val' for s in source.table['split'].to_pylist()]))
  few = dataclasses.replace(few, table=few.table.append_column('channels', pa.array([['T1', 'GM']] * len(few))))
  whole = ZeroShot(k=3).run(PairEncoder(), few, 'region', draws=20)
  assert whole['rows'][0]['metrics']['ece_val']['value'] is None and 'no val split' in ' '.join(whole['notes'])
  assert whole['rows'][0]['metrics']['top_k']['value'] == whole['chance']['top_k'] == 1
  found = channels.ByChannels(ZeroShot(k=3)).run(PairEncoder(), few, 'region', draws=20)
  every = found['methods']['mean']['subsets']
  assert len(every) == 3  # a longer vector is the same answer
  assert {s['metrics']['accuracy']['value'] for s in every} == {whole['rows'][0]['metrics']['accuracy']['value']}


def test_precision_counts_resampled_images_and_ties_against():
  y, scores = np.array([0, 1, 0, 1, 1]), np.array([[.9, .1], [.8, .1], [.7, .1], [.2, .1], [.1, .1]])
  got = naming.precision_at(y, scores, (1, 3, 9))
  # class 0: ranked 0, 1, 0, 1, 1; class 1, all equal: others first, 0, 0, 1, 1, 1
  assert np.allclose(got, [[(1 + 0) / 2, (2 / 3 + 1 / 3) / 2, (2 / 5 + 3 / 5) / 2]])
  weights = np.array([[0, 2, 1, 0, 1], [0, 3, 0, 0, 2]])
  many = naming.precision_at(y, scores, (1, 3), weights)
  for w, row in zip(weights, many, strict=True):
    again = np.repeat(np.arange(5), w)
    some = [k for k in (0, 1) if (y[again] == k).any()]
    for i, k in enumerate((1, 3)):
      order = [again[np.lexsort((y[again] == c, -scores[again, c]))][:k] for c in some]
      assert row[i] == pytest.approx(np.mean([np.mean(y[o] == c) for c, o in zip(some, order, strict=True)]))
  assert np.array_equal(naming.top(np.array([0, 1]), np.array([[.5, .5, .1], [.5, .6, .1]]), 1), [0, 1])


def test_what_cannot_be_judged_is_one_line(source, tmp_path):
  def said(protocol, encoder=PairEncoder(), label='region', source=source):
    with pytest.raises(UserError) as e:
      protocol.run(encoder, source, label, draws=5)
    assert '\n' not in str(e.value)
    return str(e.value)

  def file(name, value):
    (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return str(tmp_path / name)

  whole = {'a': {'yes': ['one spot', 'spots'], 'no': 'clear'}}
  asked = prompts.make(file('w.json', whole), ['a'])
  assert asked.yes == {'a': ('one spot', 'spots')} and asked.no == {'a': ('clear',)}
  assert "'a scan' of --option zero_shot.template has no slot {}" in said(ZeroShot(template='a scan'))
  assert "'scan' of " in said(ZeroShot(prompts=file('t.json', {'templates': ['scan'], 'classes': {}})))
  assert "no prompt for the class 'c': it has a, b" in said(ZeroShot(prompts=file('c.json', {'a': 'a', 'b': 'b'})))
  assert "did you mean 'nct_crc'" in said(ZeroShot(prompts='nct_crk'))
  assert 'cannot read prompts' in said(ZeroShot(prompts=file('d.json', '{')))
  assert "did you mean 'templates'" in said(ZeroShot(prompts=file('e.json', {'template': ['{}'], 'classes': {'a': 'a'}})))
  assert "names of class 'b' are 3" in said(ZeroShot(prompts=file('f.json', {'a': 'a', 'b': 3, 'c': 'c'})))
  assert 'needs a run with a tower of texts, such as of method clip' in said(ZeroShot(), fakes.FakeEncoder())
  assert 'the same 12 ids' in said(ZeroShot(template='x x x x x x x x {}'))
  assert 'no row of split test' in said(ZeroShot(), source=source.select('train'))
  assert "unknown column 'regoin'" in said(ZeroShot(), label='regoin')
  with pytest.raises(UserError, match="unknown zero_shot.pool 'men': did you mean 'mean'"):
    ZeroShot(pool='men')


def test_lists_that_come_along():
  found = prompts.shipped()
  assert {'nct_crc', 'chexpert_5x200', 'refuge', 'pcam', 'clip'} <= set(found)
  for name, told in found.items():
    assert told['source'] and told['licence'] and all('{}' in t for t in (*told['templates'], *told.get('negatives', ())))
    classes = list(told['classes']) or ['dog']
    asked = prompts.make(name, classes)
    assert set(asked.yes) == set(classes) and all(len(set(t)) == len(told['templates']) for t in asked.yes.values())
  asked = prompts.make('chexpert_5x200', ['pleural_effusion', 'EDEMA'])
  assert 'no edema' in asked.no['EDEMA'] and 'pleural effusion' in asked.yes['pleural_effusion'] and len(asked.unused) == 3
  assert prompts.make('', ['1', '-1']).yes == {'1': ('1',), '-1': ('-1',)}
  assert tokenize(FakePair(), ['ab', 'a' * 20]).tolist() == [[98, 99] + [0] * 10, [98] * 12]
