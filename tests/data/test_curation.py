"""`jaxmed curate`: selections that a source opens, near-duplicates exactly as by comparing all, leaks that are found."""

import csv
import json
import shutil
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed import cli
from jaxmed.data.corpus import selection
from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import bands, curate, hashes, leakage
from jaxmed.data.curate.curate import Request
from jaxmed.data.prepare.prepare import prepare
from jaxmed.errors import UserError
from jaxmed.train.build import records


def flipped_bits(rng, values, most):
  """Hashes with 0 to `most` bits of each turned."""
  out = values.copy()
  for i in range(len(out)):
    for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
      out[i] ^= np.uint64(1) << np.uint64(bit)
  return out


def near_copies(seed, count, constant=0):
  """Hashes in clusters of near-duplicates, in random order; the lowest `constant` bits hardly vary."""
  rng = np.random.default_rng(seed)
  centres = rng.integers(0, 2**64, count // 3, np.uint64) >> np.uint64(constant) << np.uint64(constant)
  return flipped_bits(rng, rng.choice(centres, count), 7)


def one_by_one(values, radius):
  """Each row against all rows kept before it."""
  kept = []
  for i, value in enumerate(values):
    if not (np.bitwise_count(values[kept] ^ value) <= radius).any():
      kept.append(i)
  return kept


def opened(user):
  """The corpus and the rows to train on, after the search for leaks, as a run begins."""
  corpus, source = records.open_records(user)
  records.tell_leaks(user, source)
  return corpus, source


@pytest.fixture(scope='module')
def studies(tmp_path_factory):
  """Corpus `a` of 12 real pictures (train), `b` of 9 for evaluation: a copy, a mirrored, a subject of a, flat ones."""
  import skimage
  with Image.open(f'{skimage.__path__[0]}/data/retina.jpg') as image:
    retina = np.asarray(image.convert('L'))
  root = tmp_path_factory.mktemp('studies')
  cut = lambda i: retina[200 + 60 * (i // 8):, 200 + 110 * (i % 8):][:96, :96]
  own = [cut(i) for i in range(12)]
  _write(root, 'a', own, ['train'] * 10 + ['val'] * 2, [f's{i}' for i in range(12)])
  other = [cut(20), own[3], own[4][:, ::-1], own[5][::-1], own[6][::-1, ::-1], cut(21), cut(22), cut(23), cut(18) // 255]
  _write(root, 'b', other, ['train'] + ['val'] * 2 + ['test'] * 6, ['t0', 't1', 't2', 't3', 't4', 's7', 't6', 't7', 't8'])
  return root


def _write(root, name, images, splits, subjects):
  place = root / f'{name}-files'
  place.mkdir()
  lines = ['path,split,subject']
  for i, image in enumerate(images):
    Image.fromarray(np.ascontiguousarray(image)).save(place / f'{name}{i:02}.png')
    lines.append(f'{name}{i:02}.png,{splits[i]},{subjects[i]}')
  (place / 't.csv').write_text('\n'.join(lines))
  prepare([place], root / name, table=place / 't.csv', progress=False)


@pytest.fixture
def a(studies, tmp_path):
  return shutil.copytree(studies / 'a', tmp_path / 'a')


# ---- hashes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('radius', [0, 1, 6, 10])
@pytest.mark.parametrize('constant', [0, 40])
def test_keeps_what_comparing_all_would_keep(radius, constant, monkeypatch):
  monkeypatch.setattr(bands, 'FEW', 1 << 8)  # so that tables are used on a few hashes
  monkeypatch.setattr(bands, '_CANDIDATES', 1 << 10)
  monkeypatch.setattr('jaxmed.data.curate.greedy.BASE', 16)
  values = near_copies(radius, 1500, constant)
  like = hashes.near_duplicates(values, radius)
  kept = one_by_one(values, radius)
  assert np.flatnonzero(like < 0).tolist() == kept
  gone = np.flatnonzero(like >= 0)
  assert (like[gone] < gone).all() and (like[like[gone]] < 0).all()
  assert np.bitwise_count(values[gone] ^ values[like[gone]]).max() <= radius
  assert 100 < len(kept) < 1490


@pytest.mark.parametrize('radius, agree', [(6, 1), (6, 2), (6, 3), (2, 4), (0, 1), (12, 1)])
def test_tables_miss_no_pair(radius, agree):
  """Whichever bits differ, in at least one table they lie outside the key; keys stay within their limit."""
  rng = np.random.default_rng(1)
  tables = list(bands.tables(radius, agree))
  covered = np.zeros((len(tables), 64), bool)
  for row, blocks in zip(covered, tables):
    for start, width in blocks:
      row[start:start + width] = True
  assert covered.sum(axis=1).max() <= 24
  for _ in range(500):
    bits = rng.choice(64, radius, replace=False)
    assert (~covered[:, bits].any(axis=1)).any()


def test_match_finds_the_first_and_only_what_is_near():
  rng = np.random.default_rng(2)
  index = rng.integers(0, 2**64, 3000, np.uint64)
  queries = np.concatenate([flipped_bits(rng, index[:500], 6), rng.integers(0, 2**64, 500, np.uint64)])
  found = bands.match(queries, index, 6)
  near = np.bitwise_count(queries[:, None] ^ index) <= 6
  np.testing.assert_array_equal(found >= 0, near.any(axis=1))
  assert (found[:500] == np.arange(500)).all() and (found[500:] < 0).sum() > 490


def test_groups_are_apart():
  values = np.array([5, 5, 5, 7, 2**63], np.uint64)
  assert hashes.near_duplicates(values, 1, np.array([0, 1, 0, 1, 1])).tolist() == [-1, -1, 0, 1, -1]
  assert hashes.near_duplicates(values, 1).tolist() == [-1, 0, 0, 0, -1]
  assert hashes.near_duplicates(values[:0], 6).tolist() == []


def test_bits_in_another_order_have_the_same_distances():
  values = near_copies(3, 300, 50)
  order = bands.spread(values)
  assert sorted(order) == list(range(64)) == sorted(bands.spread(values, sample=100))
  other = bands.permuted(values, order)
  np.testing.assert_array_equal(bands.distances(values[:, None], values), bands.distances(other[:, None], other))
  # The 50 dead bits are dealt out: any 16 neighbours hold some of the 14 that vary.
  varies = np.unpackbits(other.view(np.uint8).reshape(-1, 8), axis=1, bitorder='little').std(axis=0) > 0.3
  assert min(varies[i:i + 16].sum() for i in range(0, 64, 16)) >= 2


def test_hash_is_the_dhash_of_an_eight_bit_image(studies):
  """As imagehash computes it: mode L, Lanczos to 9 x 8, brighter than the left neighbour."""
  source = open_source(studies / 'a')
  got = hashes.of_source(source)
  for i in range(len(source)):
    grey = source[i]['image'][..., 0].astype(float)
    full = np.rint((grey - grey.min()) / (grey.max() - grey.min()) * 255).astype(np.uint8)
    for image, value in ((full, got[i, 0]), (full[:, ::-1], got[i, 1])):
      tiny = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((9, 8), Image.Resampling.LANCZOS)).astype(int)
      want = int(''.join('01'[int(b)] for b in (tiny[:, 1:] > tiny[:, :-1]).reshape(-1)), 2)
      assert int(value) == want
  assert len(set(got[:, 0].tolist())) == 12


def test_hash_ignores_affine_changes_of_channels_and_knows_flips():
  rng = np.random.default_rng(4)
  image = np.kron(rng.integers(0, 200, (6, 7, 2)), np.ones((8, 8, 1))).astype(np.int16)
  value, mirrored = hashes.difference_hash(image)
  assert hashes.difference_hash((image * [3, 5] + [100, -700]).astype(np.int32))[0] == value
  four = hashes.variants(np.array([[value, mirrored]], np.uint64))[0].tolist()
  turned = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
  assert all((hashes.difference_hash(x)[0] ^ want).bit_count() <= 1 for x, want in zip(turned, four))
  assert hashes.difference_hash(np.full((9, 9, 1), 7, np.uint8)) == (0, 0)


def test_hashes_are_computed_once(a, monkeypatch):
  source = open_source(a)
  part = hashes.of_source(source.select('val'))
  whole = hashes.of_source(source)
  np.testing.assert_array_equal(whole[10:], part)
  assert pq.read_table(a / 'selections' / 'hashes.parquet').num_rows == 12
  monkeypatch.setattr('jaxmed.data.curate.pictures.each', None)
  np.testing.assert_array_equal(hashes.of_source(source), whole)
  monkeypatch.undo()
  (a / 'selections' / 'hashes.parquet').write_bytes(b'damaged')
  np.testing.assert_array_equal(hashes.of_source(source), whole)


def test_volumes_are_hashed_by_their_middle_plane(tmp_path):
  rng = np.random.default_rng(5)
  volume = np.kron(rng.integers(0, 2000, (5, 6, 7)), np.ones((1, 8, 8))).astype(np.int16)[..., None]
  (tmp_path / 'in').mkdir()
  np.savez(tmp_path / 'in' / 'v.npz', image=volume, channels=['CT'], spacing=[1.0, 1.0, 1.0])
  prepare([tmp_path / 'in'], tmp_path / 'c', volumes='whole', progress=False)
  assert hashes.of_source(open_source(tmp_path / 'c')).tolist() == [list(hashes.difference_hash(volume[2]))]


# ---- selections ----------------------------------------------------------------------------------------------------

def test_a_selection_is_a_source(a):
  whole = open_source(a)
  ids = whole.table['id'].to_pylist()
  selection.write(a, 'few', [ids[7], ids[2], ids[11]], {'why': 'test'})
  few = open_source(f'{a}@few')
  assert few.table['id'].to_pylist() == [ids[2], ids[7], ids[11]]  # the manifest's order
  for i, j in enumerate((2, 7, 11)):
    np.testing.assert_array_equal(few[i]['image'], whole[j]['image'])
  assert few.stats == whole.stats
  assert [len(few.select(s)) for s in ('train', 'val', 'test')] == [2, 1, 0]
  assert selection.names(a) == ['few']


def test_a_folder_with_an_at_wins(a):
  other = shutil.copytree(a, a.with_name('a@few'))
  assert len(open_source(other)) == 12
  assert selection.split_uri(other) == (other, '')
  assert selection.split_uri('x@y/z') [1] == ''


def test_bad_selections(a):
  with pytest.raises(UserError, match='nor any: jaxmed curate'):
    open_source(f'{a}@lean')
  selection.write(a, 'lean', ['a00.png'], {})
  with pytest.raises(UserError, match="did you mean 'lean'"):
    open_source(f'{a}@leen')
  selection.write(a, 'old', ['a00.png', 'gone.png'], {})
  with pytest.raises(UserError, match='names 2 records, of which .* has 1'):
    open_source(f'{a}@old')
  (a / 'selections' / 'lean.parquet').write_bytes(b'x')
  with pytest.raises(UserError, match='damaged'):
    open_source(f'{a}@lean')
  for name in ('hashes', 'leakage', '../x', 'a@b', ''):
    with pytest.raises(UserError, match='cannot name a selection'):
      selection.check_name(name)


# ---- the command ---------------------------------------------------------------------------------------------------

def command(capfd, *argv):
  code = cli.main([str(x) for x in argv])
  out, err = capfd.readouterr()
  return code, out, err


def test_curate_writes_a_selection_that_training_takes(corpus, tmp_path, capfd):
  place = shutil.copytree(corpus, tmp_path / 'c')
  before = sorted((p.name, p.stat().st_mtime_ns) for p in place.iterdir())
  code, out, _ = command(capfd, 'curate', place, 'hash.radius=20', '--out', 'lean', '--json')
  about = json.loads(out)
  assert code == 0
  whole, lean = open_source(place), open_source(f'{place}@lean')
  train = whole.select('train')
  kept = one_by_one(hashes.of_source(train)[:, 0], 20)
  assert lean.select('train').table['id'].to_pylist() == train.table['id'].take(kept).to_pylist()
  assert 5 < len(kept) < 60
  assert len(lean.select('val')) == len(lean.select('test')) == 16  # untouched
  assert about['kept'] == len(lean) and about['steps'][0] | {'seconds': 0} == {
      'method': 'hash', 'before': 64, 'kept': len(kept), 'seconds': 0, 'options': {'radius': 20},
      'reasons': {'duplicate': 64 - len(kept)}}
  with open(place / 'selections' / 'lean.csv', newline='') as f:
    rows = list(csv.DictReader(f))
  assert {r['id'] for r in rows} == set(train.table['id'].to_pylist()) - set(lean.table['id'].to_pylist())
  value = dict(zip(whole.table['id'].to_pylist(), hashes.of_source(whole)[:, 0].tolist()))
  assert all((value[r['id']] ^ value[r['like']]).bit_count() == float(r['value']) <= 20 for r in rows)
  assert [p for p in before if p[0] != 'selections'] == sorted(
      (p.name, p.stat().st_mtime_ns) for p in place.iterdir() if p.name != 'selections')

  assert len(opened({'data': f'{place}@lean'})[1]) == len(kept)
  code, _, err = command(capfd, 'train', '--data', f'{place}@lean', '--out', tmp_path / 'run', f'batch_size={len(kept) + 1}')
  assert code == 2 and f'larger than the {len(kept)} training records' in err


@pytest.mark.parametrize('argv, words', [
    (['--out', 'x', '--methods', 'hahs'], "unknown method 'hahs': did you mean 'hash'"),
    (['--out', 'x', '--against', 'b', '--features', 'f,g,h'], 'takes one file for the corpus, or 2'),
    (['--out', 'x', 'hash.radios=3'], "did you mean 'hash.radius'"),
    (['--out', 'x', 'hash.radius=65'], 'hash.radius=65: expected 0 to 63 bits'),
    (['--out', 'x', '--scope', 'volumes'], "did you mean 'volume'"),
    (['--out', 'x', '--split', 'trian'], "did you mean 'train'"),
    (['--methods', 'hash'], 'give --out NAME'),
    ([], 'nothing to do'),
    (['--out', 'x', '--drop-leaks'], '--drop-leaks needs --against'),
    (['--out', 'a/b'], 'cannot name a selection'),
    (['--out', 'x', '--methods', 'semdedup'], 'needs features'),
    (['--out', 'x', '--features', 'nothing.npz'], 'nothing.npz does not exist'),
    (['--against', 'nowhere'], 'nowhere does not exist'),
    (['--out', 'x', '--methods', 'balance', 'balance.target=0'], 'needs'),
    (['--out', 'x', '--methods', 'entropy', 'entropy.least=9'], 'nothing of split train is left'),
])
def test_mistakes_are_one_line(a, capfd, argv, words):
  code, out, err = command(capfd, 'curate', a, *argv)
  assert (code, out, err.count('\n')) == (2, '', 1), err
  assert words in err
  assert selection.names(a) == []


def test_a_name_is_not_taken_twice(a, capfd):
  assert command(capfd, 'curate', a, '--out', 'x')[0] == 0
  code, _, err = command(capfd, 'curate', a, '--out', 'x')
  assert code == 2 and 'has a selection x already' in err
  assert command(capfd, 'curate', a, '--out', 'x', '--overwrite', 'hash.radius=0')[0] == 0
  assert json.loads((a / 'selections' / 'x.json').read_text())['steps'][0]['options'] == {'radius': 0}


# ---- leaks ---------------------------------------------------------------------------------------------------------

def test_leaks_are_found(studies, a, capfd):
  b = studies / 'b'
  code, out, err = command(capfd, 'curate', a, '--against', b, '--json')
  assert code == 0, err
  found = json.loads(out)['leaks'][0]
  with open(a / 'selections' / 'leakage.csv', newline='') as f:
    rows = [(r['id'], r['kind'], r['evaluation_id']) for r in csv.DictReader(f)]
  assert sorted(rows) == [
      ('a03.png', 'file', 'b01.png'), ('a03.png', 'hash', 'b01.png'), ('a04.png', 'hash', 'b02.png'),
      ('a05.png', 'hash', 'b03.png'), ('a06.png', 'hash', 'b04.png'), ('a07.png', 'subject', 'b05.png')]
  assert found == {'evaluation': str(b), 'records': 10, 'evaluated': 8, 'leaks': 5,
                   'kinds': {'file': 1, 'subject': 1, 'hash': 4}}
  code, out, _ = command(capfd, 'curate', a, '--against', b, '--strict')
  assert code == 2 and '5 of 10 records are in' in out
  assert command(capfd, 'curate', a, '--against', b, '--drop-leaks', '--out', 'clean')[0] == 0
  assert open_source(f'{a}@clean').table['id'].to_pylist() == [
      f'a{i:02}.png' for i in (0, 1, 2, 8, 9, 10, 11)]
  code, out, _ = command(capfd, 'curate', f'{a}@clean', '--against', b, '--strict')
  assert code == 0 and '0 of 5 records' in out


def test_leaks_by_features(studies):
  source, held = open_source(studies / 'a').select('train'), leakage.held_out(str(studies / 'b'))
  rng = np.random.default_rng(6)
  mine, theirs = (rng.normal(size=(len(x), 8)).astype(np.float32) for x in (source, held))
  theirs[2] = 3 * mine[9] + 0.01
  request = Request(str(studies / 'a'), against=(str(studies / 'b'),),
                    features=(mine, np.array(source.table['id'].to_pylist())),
                    against_features=((theirs, np.array(held.table['id'].to_pylist())),))
  kinds = curate.curate(request)['leaks'][0]['kinds']
  assert kinds['embedding'] == 1
  with open(studies / 'a' / 'selections' / 'leakage.csv', newline='') as f:
    row = next(r for r in csv.DictReader(f) if r['kind'] == 'embedding')
  assert (row['id'], row['evaluation_id']) == ('a09.png', 'b03.png') and float(row['value']) > 0.99


def test_the_command_takes_features_of_both(studies, a, tmp_path, capfd):
  files = []
  for name in ('a', 'b'):
    ids = open_source(studies / name).table['id'].to_pylist()
    x = np.eye(32)[np.arange(len(ids)) + (0 if name == 'a' else 12)]  # all orthogonal
    if name == 'b':
      x[7] = np.eye(32)[8]
    files.append(tmp_path / f'{name}.npz')
    np.savez(files[-1], features=x, id=np.array(ids))
  both = f'{files[0]},{files[1]}'
  code, out, err = command(capfd, 'curate', a, '--against', studies / 'b', '--features', both, '--json')
  assert code == 0, err
  assert json.loads(out)['leaks'][0]['kinds'] == {'file': 1, 'subject': 1, 'hash': 4, 'embedding': 1}
  code, out, err = command(capfd, 'curate', a, '--methods', 'balance', '--features', files[0], '--out', 'even',
                           'balance.target=4', 'balance.levels=(3,)')
  assert code == 0 and 'balance: 4 of 10 kept (balance 6)' in out


def test_flat_images_are_no_leaks():
  mine = np.array([0, 1, 2**64 - 1], np.uint64)
  theirs = np.repeat(np.array([[0], [3], [2**64 - 2]], np.uint64), 4, axis=1)
  found, value = leakage.near_hashes(mine, theirs, 6)
  assert found.tolist() == [-1, -1, 2] and value[2] == 1 and np.isnan(value[:2]).all()


def test_training_tells_leaks(studies, a, tmp_path, capfd):
  b = studies / 'b'
  _, source = opened({'data': str(a), 'evaluation': f'{b}, {a}'})
  _, err = capfd.readouterr()
  assert len(source) == 10 and err.count('\n') == 1
  assert f'5 of 10 records are in {b} too' in err and f'in {a} too' not in err
  assert f'jaxmed curate {a} --against {b},{a} --drop-leaks --out clean' in err and f'data={a}@clean' in err
  opened({'data': f'{a},{studies / "a"}', 'evaluation': str(b)})  # subjects keep their names in several
  _, err = capfd.readouterr()
  assert '10 of 20 records are in' in err and 'the same subject 2' in err
  assert f'(and so for each corpus), train with data={a}@clean,{studies / "a"}@clean' in err
  opened({'data': str(a), 'evaluation': str(b), 'on_leak': 'ignore'})
  opened({'data': str(a)})
  assert capfd.readouterr() == ('', '')
  train = lambda *more: command(capfd, 'train', '--data', a, '--out', tmp_path / 'run', *more)
  for more, words in (((f'evaluation={b}', 'on_leak=stop'), '5 of 10 records are in'), (('on_leak=wran',), "mean 'warn'"),
                      (('evaluation=nowhere',), 'nowhere does not exist')):
    code, _, err = train(*more)
    assert code == 2 and err.count('\n') == 1 and words in err, err
    assert not (tmp_path / 'run').exists()


def test_training_tells_leaks_by_an_encoder(studies, a, tmp_path, capfd):
  """`leak_encoder` embeds both sets: as many leaks by features as NumPy counts pairs of a cosine of 0.98."""
  import flax.linen as nn
  import jax

  import jaxmed
  from jaxmed.interop import export_file
  b, path = studies / 'b', tmp_path / 'encoder.safetensors'
  model = jaxmed.create_model('channel_vit_micro/8', image_size=16, in_channels=1, embed_dim=16, depth=1, num_heads=2)
  params = nn.unbox(model.init(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))['params'])
  names = open_source(a).table['channels'].to_pylist()[0]
  export_file(path, 'jaxmed', model, params, {'channels': [{'name': names[0], 'mean': 100.0, 'std': 50.0}],
                                              'normalize': 'corpus', 'feature': 'mean'})
  _, source = opened({'data': str(a), 'evaluation': str(b), 'leak_encoder': str(path)})
  _, err = capfd.readouterr()
  encoder = jaxmed.load(path)
  mine, theirs = (encoder.embed_source(s)['mean'].astype(np.float64)
                  for s in (source, leakage.held_out(str(b))))
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  count = int(((unit(mine) @ unit(theirs).T).max(axis=1) >= leakage.COSINE).sum())
  assert count and f'nearly the same features {count})' in err and f'--encoder {path} --drop-leaks' in err
  with pytest.raises(UserError, match='leak_encoder=nowhere does not exist'):
    opened({'data': str(a), 'evaluation': str(b), 'leak_encoder': 'nowhere'})


def test_empty_text_is_no_ones():
  """Records without a subject are not of one subject: neither null nor '' finds another."""
  held = types.SimpleNamespace(table={'path': pa.chunked_array([['', 'b', None, 'b']])}, datasets=())
  mine = types.SimpleNamespace(table={'path': pa.chunked_array([['a', '', None, 'b']])}, datasets=())
  assert leakage._same(mine, held, 'path').tolist() == [-1, -1, -1, 1]
