"""Average precision and recall of boxes against pycocotools: crowds, areas, equal scores, 1, 10 and 100 detections."""

import contextlib
import io

import numpy as np
import pytest

from jaxmed.evaluate import boxes
from tests.evaluate.test_boxes import scene

NAMES = ('map', 'map50', 'map75', 'map_small', 'map_medium', 'map_large', 'mar1', 'mar10', 'mar100', 'mar_small',
         'mar_medium', 'mar_large')


def xywh(box):
  return [*map(float, box[:2]), *map(float, box[2:] - box[:2])]


@pytest.mark.parametrize('images', [20, 1])
def test_coco(images):
  pytest.importorskip('pycocotools')
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval
  truth, found = scene(np.random.default_rng(images), images)
  annotations = [dict(image_id=i, category_id=int(c), bbox=xywh(b), area=float(a), iscrowd=int(k))
                 for i, t in enumerate(truth) for b, c, k, a in zip(*t, strict=True)]
  annotations = [{**a, 'id': n} for n, a in enumerate(annotations, 1)]
  guesses = [dict(image_id=i, category_id=int(c), bbox=xywh(b), score=float(s))
             for i, f in enumerate(found) for b, c, s in zip(*f, strict=True)]
  with contextlib.redirect_stdout(io.StringIO()):
    gt = COCO()
    gt.dataset = {'images': [{'id': i} for i in range(images)], 'annotations': annotations, 'info': {},
                  'categories': [{'id': c, 'name': str(c)} for c in range(3)]}
    gt.createIndex()
    other = COCOeval(gt, gt.loadRes(guesses), 'bbox')
    other.evaluate()
    other.accumulate()
    other.summarize()
  got = boxes.score(truth, found, range(3))
  empty = lambda x: np.where(np.isnan(x), -1, x)
  np.testing.assert_allclose(empty(got.precision), other.eval['precision'], atol=1e-9)
  np.testing.assert_allclose(empty(got.recall), other.eval['recall'], atol=1e-9)
  np.testing.assert_allclose(empty(np.array([got.summary()[n] for n in NAMES])), other.stats, atol=1e-9)
