"""Generated videos of operations, and training images from one background, are what their tables say of them."""

import hashlib
import json

import numpy as np
import pytest
from scipy import ndimage

from jaxmed import cli
from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.prepare import one_image, surgery
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.surgery import CLASSES, PHASES, TOOLS, Wanted
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError


@pytest.fixture(scope='module')
def frames():
  return list(surgery.records(Wanted(3, 6, 40, 32, 2)))


def test_columns_follow_from_masks_and_phases(frames):
  assert len(frames) == 240
  for number in range(6):
    video = frames[40 * number:40 * number + 40]
    phases = [extra['phase'] for *_, extra in video]
    for t, (record, _, path, digest, extra) in enumerate(video):
      mask = record['mask']
      assert record['subject'] == path == extra['video'] and extra['frame_seconds'] == t
      assert digest == hashlib.sha256(record['image'].tobytes()).hexdigest()
      assert extra['tools'].split('|') == [n for k, n in enumerate(TOOLS, 2) if (mask == k).any()] or not extra['tools']
      assert extra['remaining'] == 40 - t and extra['procedure'] == f'look-{number % 2}'
      end = next((k for k in range(t, 40) if phases[k] != phases[t]), 40)
      assert extra['phase_remaining'] == end - t
      names = extra['box_names'].split('|') if extra['box_names'] else []
      assert len(names) == len(boxes := json.loads(extra['boxes']))
      for name, (top, left, bottom, right) in zip(names, boxes):
        own = mask == CLASSES.index(name)
        assert own[top:bottom, left:right].sum() == own.sum() > 0
        assert own[top].any() and own[bottom - 1].any() and own[:, left].any() and own[:, right - 1].any()
    assert phases[0] == PHASES[0]


def test_phases_are_a_chain_and_tools_depend_on_them():
  """Counted over long videos: transitions go to the next phase mostly, use is near the table's."""
  wanted = Wanted(0, 3, 3000, 24)
  tracks = [surgery.tracked(wanted, n) for n in range(3)]
  steps = np.concatenate([np.stack([t.phase[:-1], t.phase[1:]], 1) for t in tracks])
  moves = steps[steps[:, 0] != steps[:, 1]]
  assert 0 < len(moves) < 60 and (moves[:, 1] - moves[:, 0] == 1).mean() > .6
  on = np.concatenate([t.inside for t in tracks]) > .5
  phase = np.concatenate([t.phase for t in tracks])
  for k in np.flatnonzero(np.bincount(phase, minlength=len(PHASES)) > 500):
    assert np.abs(on[phase == k].mean(axis=0) - surgery._USE[k]).max() < .15
    assert not on[phase == k][20:, surgery._USE[k] == 0].mean() > .1
  assert surgery.look(0, 1).use.tolist() != surgery._USE.tolist()


def test_criteria_rise_and_stay(frames):
  for number in range(6):
    met = [set(filter(None, extra['cvs'].split('|'))) for *_, extra in frames[40 * number:40 * number + 40]]
    assert all(a <= b for a, b in zip(met, met[1:]))
    if any(extra['phase'] == 'dissection' for *_, extra in frames[40 * number:40 * number + 40]):
      assert met[-1] == set(surgery.CRITERIA)


def test_the_same_seed_gives_the_same_frames_and_larger_ones_the_same_tracks(frames):
  again = list(surgery.records(Wanted(3, 6, 40, 32, 2)))
  assert [f[3] for f in again] == [f[3] for f in frames]
  assert next(surgery.records(Wanted(4, 6, 40, 32, 2)))[3] != frames[0][3]
  small, large = (surgery.tracked(Wanted(3, 6, 40, n), 1) for n in (32, 64))
  assert all(np.array_equal(vars(small)[k], vars(large)[k]) for k in vars(small))


def test_a_chunk_more_changes_no_frame(monkeypatch):
  wanted = Wanted(1, 3, 30, 24)
  tracks = surgery.tracked(wanted, 0)
  masks = [m for _, m in surgery.painted(wanted, 0, tracks)]
  monkeypatch.setattr(surgery, '_CHUNK', 7)
  assert np.array_equal(masks, [m for _, m in surgery.painted(wanted, 0, tracks)])


def test_each_look_has_each_split():
  for wanted in (Wanted(0, 12, 8, 24, 4), Wanted(0, 31, 8, 24, 3)):
    found = surgery.subjects(wanted)
    for look in range(wanted.looks):
      assert {s for s, _ in found[look::wanted.looks]} == {'train', 'val', 'test'}


def test_a_corpus_of_videos(tmp_path, capsys):
  assert cli.main(['prepare', 'surgery', '--out', str(tmp_path / 'c'), '--videos', '3', '--frames', '8', '--size', '24',
                   '--masks', 'instrument']) == 0
  source = open_source(tmp_path / 'c')
  assert len(source) == 24 and labels_of(source).names == ('background', 'instrument')
  assert 'Synthetic: videos of operations' in (tmp_path / 'c' / 'card.md').read_text()
  assert source.table['frame_seconds'].to_pylist()[:3] == [0.0, 1.0, 2.0]
  assert survey(['surgery'], tmp_path / 'd', videos=3, frames=8)['splits']['test'] == {'items': 1, 'subjects': 1}
  for bad, message in ((dict(videos=3, looks=2), '--videos 3: expected 6'), (dict(size=8), '--size 8'),
                       (dict(masks='class'), "did you mean 'classes'"), (dict(frames=2), '--frames 2')):
    with pytest.raises(UserError, match=message):
      Wanted(**bad)
  with pytest.raises(UserError, match='--looks is of surgery: jaxmed prepare surgery'):
    survey(['phantoms'], 'nowhere', looks=2)


# One image

@pytest.fixture(scope='module')
def parts():
  return one_image.pictures(0, 32)


def test_a_tool_covers_its_mask_and_nothing_else(parts):
  background, sprites = parts
  assert len(sprites) == 2 * len(TOOLS)
  (_, one, a), (_, two, b) = sprites[0], sprites[5]
  image, mask = one_image.pasted(background, np.zeros(a.shape, bool), one, a)
  image, mask = one_image.pasted(image, mask, two, b)
  assert np.array_equal(mask, a | b) and a.any() and b.any()
  assert np.array_equal(image[~mask], background[~mask]) and np.array_equal(image[b], two[b])
  assert np.array_equal(image[a & ~b], one[a & ~b])


def test_geometry_moves_image_and_mask_together():
  """A picture that is bright where its mask is stays so under any motion, up to the pixels of the edge."""
  rng = np.random.default_rng(0)
  mask = np.zeros((64, 64), bool)
  mask[20:40, 24:50] = True
  image = np.where(mask[..., None], 200.0, 10.0) * np.ones(3)
  for _ in range(8):
    picture, shape = one_image.moved(image, mask, rng)
    assert not np.array_equal(shape, mask)
    sure, off = ndimage.binary_erosion(shape, iterations=2), ~ndimage.binary_dilation(shape, iterations=2)
    assert (picture[sure] > 190).all() and (picture[off] < 20).all()
    picture, shape = one_image.tool_changed(image, mask, rng)
    sure, off = ndimage.binary_erosion(shape, iterations=4), ~ndimage.binary_dilation(shape, iterations=4)
    assert (picture[sure] > 180).all() and (picture[off] < 30).all()


class Fixed(np.random.Generator):
  """A generator whose Beta is a number that is told."""

  def __init__(self, much):
    super().__init__(np.random.PCG64(0))
    self.much = much

  def beta(self, a, b):
    return self.much


def test_mixing_is_the_image_at_no_weight_and_the_chains_at_full_one(parts):
  background, _ = parts
  assert np.array_equal(one_image.mixed(background, one_image.OPERATIONS['II'], Fixed(0.0)), background)
  constant = (lambda x, level, rng: x + 10,)
  image = np.full((8, 8, 3), 50.0)
  for much in (0.25, 1.0):
    found = one_image.mixed(image, constant, Fixed(much))
    rng = Fixed(much)
    weights = rng.dirichlet(np.ones(3))
    depths = []
    for _ in range(3):
      depths.append(int(rng.integers(1, 4)))
      for _ in range(depths[-1]):
        rng.integers(1), rng.uniform(0, 3)
    assert np.allclose(found, 50 + much * 10 * (weights * depths).sum(), atol=1e-4)


def test_operations_keep_a_grey_image_within_its_range():
  rng, ramp = np.random.default_rng(0), np.linspace(20, 200, 64).reshape(8, 8, 1) * np.ones(3)
  auto, equal, poster, solar = (op(ramp, 0.3, rng) for op in one_image.OPERATIONS['I'])
  assert np.allclose([auto.min(), auto.max()], [0, 255]) and np.isclose(equal.max(), 255)
  assert np.allclose(np.diff(np.sort(equal[..., 0].ravel())), 255 / 64)
  assert len(np.unique(poster)) < 16 and (poster <= ramp).all()
  assert np.array_equal(solar, np.where(ramp < 256 - 76.8, ramp, 255 - ramp))


@pytest.mark.parametrize('mixing', one_image.MIXING)
def test_images_follow_from_seed_and_number(parts, mixing):
  background, sprites = parts
  wanted = one_image.Wanted(0, 20, 32, mixing)
  image, mask, tools = one_image.made(background, sprites, wanted, 7)
  again = one_image.made(background, sprites, wanted, 7)
  assert np.array_equal(image, again[0]) and np.array_equal(mask, again[1]) and tools == again[2]
  assert image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1} and len(tools) in (1, 2)
  assert not np.array_equal(image, one_image.made(background, sprites, wanted, 8)[0])


def test_a_corpus_of_one_image(tmp_path):
  summary = prepare(['one_image'], tmp_path / 'c', images=20, size=24, variants=10, progress=False)
  assert summary['splits'] == {'train': {'records': 18, 'subjects': 9}, 'val': {'records': 2, 'subjects': 1}}
  assert labels_of(open_source(tmp_path / 'c')).names == one_image.CLASSES
  with pytest.raises(UserError, match="unknown .*'V'|--mixing"):
    one_image.Wanted(mixing='V')
