"""A manifest read column by column says what the whole table says."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jaxmed.data.corpus.manifest import Columns, Joint, Manifest, distinct
from jaxmed.errors import UserError


def table(count, seed=0):
  rng = np.random.default_rng(seed)
  pick = lambda values: [values[i] for i in rng.integers(len(values), size=count)]
  return pa.table({
    'id': [f'i{i}' for i in range(count)], 'subject': pick(['a', 'b', None, 'c']), 'split': pick(['val', 'train']),
    'source': pick([f's{i}' for i in range(80)]), 'row': pa.array(range(count), pa.int64()),
    'channels': pa.array(pick([['R', 'G'], ['G', 'R'], ['R'], ['DNA', 'R', 'G', 'T1']]), pa.list_(pa.string())),
    'shape': pa.array(pick([[4, 5, 1], [4, 5], [5, 4, 1], [70000, 70000, 70000, 70000, 70001], [70000] * 5]), pa.list_(pa.int32())),
    'spacing': pa.array(pick([None, [], [0.5], [1.0, 0.5]]), pa.list_(pa.float32())),
    'grade': pa.array(pick([1, None, 3]), pa.int64())})


@pytest.fixture
def both(tmp_path):
  whole = table(500)
  pq.write_table(whole, tmp_path / 'm.parquet', row_group_size=64)
  return whole, Manifest(Columns(tmp_path / 'm.parquet'))


def reference(column):
  values = [tuple(v) if isinstance(v, list) else v for v in column.to_pylist()]
  order = list(dict.fromkeys(values))
  return [order.index(v) for v in values], [list(v) if isinstance(v, tuple) else v for v in order]


def test_columns_and_distinct_values(both):
  whole, lazy = both
  rows = np.random.default_rng(1).permutation(500)[:123]
  for got, want in ((lazy, whole), (lazy.take(rows), whole.take(pa.array(rows))), (lazy.slice(7, 20), whole.slice(7, 20)),
                    (lazy.take(rows).slice(100), whole.take(pa.array(rows)).slice(100)),
                    (lazy.filter(pc.equal(lazy['split'], 'val')), whole.filter(pc.equal(whole['split'], 'val'))),
                    (lazy.filter(pc.equal(lazy['subject'], 'a')), whole.filter(pc.equal(whole['subject'], 'a'))),
                    (pickle.loads(pickle.dumps(lazy.take(rows))), whole.take(pa.array(rows)))):
    assert len(got) == got.num_rows == want.num_rows
    assert got.column_names == want.column_names
    for name in want.column_names:
      assert got[name].type == want[name].type
      assert got[name].to_pylist() == want[name].to_pylist()
      codes, values = got.distinct(name)
      expected = reference(want[name])
      assert (codes.tolist(), values) == expected, name
      assert (distinct(want[name])[0].tolist(), distinct(want[name])[1]) == expected
    assert got.to_pylist() == want.to_pylist()
  assert lazy.whole().equals(whole)
  assert lazy.drop_columns(['id']).equals(whole.drop_columns(['id']))  # becomes a table


def test_one_value_everywhere(tmp_path):
  whole = pa.table({'split': ['train'] * 9, 'channels': [['R', 'G']] * 9, 'shape': pa.array([[3, 4]] * 9, pa.list_(pa.int32()))})
  pq.write_table(whole, tmp_path / 'm.parquet')
  lazy = Manifest(Columns(tmp_path / 'm.parquet'))
  for name, value in (('split', 'train'), ('channels', ['R', 'G']), ('shape', [3, 4])):
    codes, values = lazy.distinct(name)
    assert codes.tolist() == [0] * 9
    assert values == [value]
  assert lazy.take([]).distinct('split')[1] == []


@pytest.mark.parametrize('column', [
  pa.array(['a'] * 6), pa.array(['a'] * 5 + [None]), pa.array(['a'] * 3 + ['b'] * 3), pa.array(['x' * 40] * 6),
  pa.array([['a']] * 6), pa.array([['a']] * 5 + [[]]), pa.array([['a']] * 5 + [None]), pa.array([['a']] * 5 + [[None]]),
  pa.array([['a'], ['a', 'a'], [], ['a'], ['a'], ['a']]), pa.array([['a', 'a']] * 3 + [[]] * 3), pa.array([1.5] * 6),
  pa.array([[]] * 6, pa.list_(pa.string())), pa.array([None] * 6, pa.string())])
@pytest.mark.parametrize('group', [3, 6])
def test_constant_columns_by_statistics(tmp_path, column, group):
  name = 'channels' if pa.types.is_list(column.type) else 'subject'
  pq.write_table(pa.table({'row': range(6), name: column}), tmp_path / 'm.parquet', row_group_size=group)
  codes, values = Manifest(Columns(tmp_path / 'm.parquet')).distinct(name)
  assert (codes.tolist(), values) == reference(column)


def test_columns_whose_names_have_dots(tmp_path):
  """They are no parts of others, whose statistics they do not give."""
  whole = pa.table({'channels': [['a'], ['b']], 'channels.x': ['c', 'c'], 'age.years': ['7', '7'], 'row': [0, 1]})
  pq.write_table(whole, tmp_path / 'm.parquet')
  lazy = Manifest(Columns(tmp_path / 'm.parquet'))
  for name in ('channels', 'channels.x', 'age.years'):
    codes, values = lazy.distinct(name)
    assert (codes.tolist(), values) == reference(whole[name]), name


def test_only_what_is_asked_for_is_read(both):
  _, lazy = both
  lazy.filter(pc.equal(lazy['row'], 3)).distinct('channels')
  assert sorted(lazy._file._read) == ['row']
  assert sorted(lazy._file._codes) == ['channels', 'shape', 'split']  # and dtype, which this one lacks


def test_joint(tmp_path):
  parts = [table(30), table(20, 1).drop_columns(['grade'])]
  lazy = []
  for i, part in enumerate(parts):
    pq.write_table(part, tmp_path / f'{i}.parquet')
    lazy.append(Manifest(Columns(tmp_path / f'{i}.parquet')))
  joint = Manifest(Joint(lazy, ['one', 'two']))
  assert joint.num_rows == 50
  assert joint['dataset'].to_pylist() == ['one'] * 30 + ['two'] * 20
  assert joint['grade'].to_pylist() == parts[0]['grade'].to_pylist() + [None] * 20
  assert joint['channels'].to_pylist() == parts[0]['channels'].to_pylist() + parts[1]['channels'].to_pylist()
  named = [f'one/{s}' if s else None for s in parts[0]['subject'].to_pylist()]
  assert joint['subject'].to_pylist()[:30] == named
  assert joint['id'][49].as_py() == 'two/i19'
  again = pickle.loads(pickle.dumps(joint.take([45, 3])))
  assert again['id'].to_pylist() == ['two/i15', 'one/i3']
  pq.write_table(parts[1].append_column('grade', pa.array(['x'] * 20)), tmp_path / '2.parquet')
  with pytest.raises(UserError, match="column 'grade' of two holds string, that of another corpus int64"):
    Joint([lazy[0], Manifest(Columns(tmp_path / '2.parquet'))], ['one', 'two'])
