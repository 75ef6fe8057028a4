"""PitVis, anticipation, presence, instruments in frames and prompts: published cases in both forms, and slow loops."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from jaxmed.errors import UserError
from jaxmed.evaluate import anticipation, instruments, pitvis, presence, prompted

NAN = float('nan')
TRUTH = [-1, 1, 1, 2, 2, 13, 2, 3, 3]


@pytest.mark.parametrize(('predicted', 'f1', 'edit'), [
  ([-1, 1, 1, 2, 11, 13, 2, 3, 3], 0.70, 0.60), ([-1, 1, 2, 1, 2, 13, 2, 3, 3], 0.722, 0.60), (TRUTH, 1.0, 1.0)])
def test_steps(predicted, f1, edit):
  got = pitvis.steps(TRUTH, predicted)
  assert got['f1'] == pytest.approx(f1, abs=5e-4) and got['edit'] == pytest.approx(edit)
  assert got['score'] == pytest.approx((got['f1'] + got['edit']) / 2)


def test_steps_of_given_classes_and_without_rows():
  assert pitvis.steps(TRUTH, [-1, 1, 1, 2, 11, 13, 2, 3, 3], (1, 2, 3))['f1'] == pytest.approx((1 + 0.8 + 1) / 3)
  assert np.isnan(pitvis.steps([-1, 11], [1, 1])['score'])
  rng = np.random.default_rng(0)
  y, p = rng.integers(1, 9, (2, 60))
  assert pitvis.steps(y, p)['f1'] == pytest.approx(f1_score(y, p, average='macro'))


@pytest.mark.parametrize(('predicted', 'weighted', 'macro', 'script', 'script_macro'), [
  ([[6], [6], [9], [3]], 0.833, 0.930, 0.0, 0.842), ([[6], [6, 5], [9], [9]], 1.0, 0.947, 0.333, None)])
def test_instruments(predicted, weighted, macro, script, script_macro):
  truth = [[6], [6], [9], [9]]
  close = lambda value: pytest.approx(value, abs=5e-4)
  assert pitvis.instruments(truth, predicted, 'weighted') == close(weighted)
  assert pitvis.instruments(truth, predicted) == close(macro)
  assert pitvis.instruments(truth, predicted, 'weighted', 'pitvis') == close(script)
  if script_macro:
    assert pitvis.instruments(truth, predicted, 'macro', 'pitvis') == close(script_macro)


def test_instruments_outside_of_the_patient():
  truth, predicted = [[0, 5], [-1, -2], [5, -2]], [[0, 5], [7, -2], [5]]
  assert pitvis.instruments(truth, predicted) == 1
  assert pitvis.instruments(truth, predicted, compat='pitvis') < 1
  with pytest.raises(UserError, match='class 19 in row 0'):
    pitvis.instruments([[19]], [[1]])


def test_time_errors():
  target = np.array([[0, 1.0], [0.2, 9], [3, NAN], [np.inf, 2]])
  predicted = np.array([[4, 2.0], [0.7, 4], [1, 5], [2, 2]])
  got = anticipation.time_errors(predicted, target, 5.0)
  into, out = ((0.5 + 2) / 2 + (1 + 0) / 2) / 2, (3 + 1) / 2
  want = {'in': into, 'out': out, 'exp': 0.5, 'w': ((1.25 + 3) / 2 + (0.5 + 1) / 2) / 2}
  assert got == pytest.approx(want)
  pooled = anticipation.time_errors(predicted, target, 5.0, 'pooled')
  assert pooled == pytest.approx({'in': (0.5 + 2 + 1 + 0) / 4, 'out': 2.0, 'exp': 0.5, 'w': (3.5 / 4 + 2) / 2})


def test_time_errors_slow_loop():
  rng = np.random.default_rng(0)
  target, predicted = rng.uniform(-1, 8, (30, 3)), rng.uniform(0, 6, (30, 3))
  terms = {name: [[] for _ in range(3)] for name in ('in', 'out', 'exp')}
  for (i, k), t in np.ndenumerate(np.clip(target, 0, 5)):
    e = abs(predicted[i, k] - t)
    for name, ok in (('in', 0 < t < 5), ('out', t == 5), ('exp', 0 < t < 0.5)):
      terms[name][k] += [e] * int(ok)
  each = {name: [np.mean(x) for x in rows if x] for name, rows in terms.items()}
  got = anticipation.time_errors(predicted, target, 5)
  for name, values in each.items():
    assert got[name] == pytest.approx(np.mean(values))


def test_future_f1():
  rng = np.random.default_rng(0)
  y, p = rng.integers(0, 4, (2, 12, 6))
  want = np.mean([f1_score(a, b, average='weighted', zero_division=0) for a, b in zip(y, p, strict=True)])
  assert anticipation.future_f1(y, p) == pytest.approx(want)
  assert anticipation.future_f1(np.array([[0, 1, -1], [-1, -1, -1]]), np.array([[0, 2, 2], [0, 0, 0]])) == 0.5


def test_baselines():
  """Phases of fixed length: the prior knows what follows, and repetition does not."""
  labels = np.repeat([0, 1, 2], 3)
  padded = np.append(labels, [3] * 4)
  tokens = np.stack([padded[t : t + 4] for t in range(len(labels))])
  prior = anticipation.transition_prior([tokens, tokens], 3)
  np.testing.assert_allclose(prior.sum(axis=-1), 1)
  np.testing.assert_allclose(prior[1, 0], [2 / 3, 1 / 3, 0, 0])
  np.testing.assert_allclose(prior[3, 2], [0, 0, 0, 1])
  repeat = anticipation.future_f1(tokens, anticipation.repeated(labels, 3))
  assert anticipation.future_f1(tokens, anticipation.from_prior(labels, prior)) > repeat + 0.2


def test_presence():
  rng = np.random.default_rng(0)
  y, s = [rng.integers(0, 2, (9, 3)) for _ in range(3)], [rng.random((9, 3)) for _ in range(3)]
  y[0][:, 1], y[1][:, 2], y[2][:, 2], y[0][:, 2] = 0, 0, 0, 0
  got = presence.average_precision(y, s)
  column = lambda v, c: average_precision_score(y[v][:, c], s[v][:, c])
  want = [np.mean([column(v, 0) for v in range(3)]), np.mean([column(v, 1) for v in (1, 2)])]
  np.testing.assert_allclose(got['ap'], [*want, NAN])
  assert got['map'] == pytest.approx(np.mean(want))
  pooled = presence.average_precision(y, s, 'pooled')['ap']
  all_y, all_s = np.concatenate(y), np.concatenate(s)
  np.testing.assert_allclose(pooled[:2], [average_precision_score(all_y[:, c], all_s[:, c]) for c in range(2)])
  with pytest.warns(UserWarning, match='No positive class'):
    assert average_precision_score(np.zeros(3), np.zeros(3)) == 0 and np.isnan(pooled[2])


def test_presence_compat_and_unknown():
  y, s = [np.array([[1], [-1], [0]])], [np.array([[0.2], [0.9], [0.1]])]
  assert presence.average_precision(y, s)['map'] == 1
  assert presence.average_precision(y, s, compat='ivtmetrics')['map'] == 1
  with pytest.raises(UserError, match='presence'):
    presence.average_precision(y, [np.zeros((2, 1))])


def test_critical_view():
  ds = np.array([[0.333, 0, 0.667], [0.667, 0, 1], [0, 0.333, 0], [1, 0.5, 0]])
  s = np.random.default_rng(0).random((4, 3))
  got = presence.critical_view([ds[:2], ds[2:]], [s[:2], s[2:]])
  want = [average_precision_score(y, s[:, c]) for c, y in ((0, [0, 1, 0, 1]), (2, [1, 1, 0, 0]))]
  np.testing.assert_allclose(got['ap'], [want[0], NAN, want[1]])
  assert got['map'] == pytest.approx(np.mean(want))
  with pytest.raises(UserError, match='0 to 1'):
    presence.critical_view([3 * ds], [s])


def frame(text):
  return np.array([[int(c) for c in part] for part in text.split()])


GOLDEN = [(frame(a), frame(b)) for a, b in (('1111 0000', '1110 2000'), ('1122 0000', '1100 0000'),
                                            ('1111 0000', '1111 0000'), ('0000 0000', '0000 0000'))]


def test_instrument_iou():
  got = instruments.score(*zip(*GOLDEN, strict=True), classes=2)
  want = {'challenge': 0.750, 'isi': 0.625, 'mean_class': 0.458, 'cumulative': 0.692, 'pooled': 0.450}
  assert got == pytest.approx(want, abs=5e-4)


def test_missed_frames_and_false_positives():
  missed, made_up = (frame('1100'), frame('0000')), (frame('0000'), frame('0300'))
  truth, predicted = zip(*GOLDEN, missed, made_up, strict=True)
  got, script = (instruments.score(truth, predicted, 3, compat) for compat in instruments.COMPAT)
  assert got['cumulative'] == pytest.approx(9 / 16) and script['cumulative'] == pytest.approx(9 / 14)
  assert got['challenge'] == pytest.approx((0.75 + 0.5 + 1 + 0) / 4)  # the made-up frame costs nothing
  assert got['isi'] == pytest.approx((0.375 + 0.5 + 1 + 0 + 0) / 5)
  assert {m: v for m, v in got.items() if m != 'cumulative'} == {m: v for m, v in script.items() if m != 'cumulative'}
  assert all(np.isnan(v) for v in instruments.score([frame('00')], [frame('00')], 2).values())


SCENE = frame('1110002 1110002 1110000 0000222')


def test_prompts():
  parts = prompted.instances(SCENE)
  assert [(c, int(m.sum())) for c, m in parts] == [(1, 9), (2, 2), (2, 3)]
  assert prompted.point(parts[0][1]).tolist() == [1, 1] and prompted.box(parts[0][1]).tolist() == [0, 0, 3, 3]
  for c, mask in parts:
    for seed in range(5):
      assert mask[tuple(prompted.point(mask, 'random', seed))], c
  assert prompted.point(parts[0][1], 'random', 3).tolist() == prompted.point(parts[0][1], 'random', 3).tolist()
  with pytest.raises(UserError, match='no point'):
    prompted.point(np.zeros((2, 2), bool))


def test_the_protocol_in_images_and_videos():
  def grow(pixels, prompt):  # an oracle that answers with the part at the prompt, and needs no more
    y, x = prompt.values[:2] if prompt.kind == 'point' else (prompt.values[:2] + prompt.values[2:]) // 2
    return next(m for _, m in prompted.instances(pixels) if m[y, x])
  for kind in prompted.PROMPTS:
    assert (prompted.image(grow, SCENE, SCENE, kind) == SCENE).all()
  whole = lambda pixels, prompt: np.ones(pixels.shape, bool)
  assert (prompted.image(whole, SCENE, SCENE) == 2).all()  # of equal masks the last
  moved = [SCENE, np.roll(SCENE, 1, axis=0)]
  follow = lambda frames, prompt: [np.roll(grow(frames[0], prompt), t, axis=0) for t in range(len(frames))]
  got = prompted.video(follow, moved, SCENE)
  assert all((a == b).all() for a, b in zip(got, moved, strict=True))
