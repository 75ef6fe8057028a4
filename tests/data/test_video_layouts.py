"""Folders of surgical video sets, written small, come out with names of labels, times and splits by operation."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxmed import cli
from jaxmed.data.corpus import operations
from jaxmed.data.corpus.labels import labels_of
from jaxmed.data.corpus.open import open_source
from jaxmed.data.curate import leakage
from jaxmed.data.prepare.benchmarks import LAYOUTS, find, videos
from jaxmed.data.prepare.benchmarks.phases import CHOLEC80, M2CAI16
from jaxmed.data.prepare.benchmarks.scenes import ENDOVIS18, WATERSHED
from jaxmed.data.prepare.prepare import prepare
from jaxmed.data.prepare.survey import survey
from jaxmed.errors import UserError

av = pytest.importorskip('av')
SECONDS = 4
OPTIONS = {'splits': (1, 0, 0), 'progress': False}


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """A video of SECONDS at 5 frames a second, [16, 24], whose brightness tells the frame."""
  path = tmp_path_factory.mktemp('clip') / 'clip.mp4'
  with av.open(str(path), 'w') as out:
    stream = out.add_stream('mpeg4', rate=5)
    stream.width, stream.height, stream.pix_fmt = 24, 16, 'yuv420p'
    for i in range(5 * SECONDS):
      frame = av.VideoFrame.from_ndarray(np.full((16, 24, 3), 10 * i, np.uint8), format='rgb24')
      for packet in stream.encode(frame):
        out.mux(packet)
    for packet in stream.encode():
      out.mux(packet)
  return path


def put(clip, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(clip, path)


def write(path, lines, encoding='utf-8'):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n', encoding=encoding)


def picture(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(array, np.uint8)).save(path)


def run(root, out, layout, **options):
  prepare([root], out, layout=layout, **OPTIONS | options)
  source = open_source(out)
  return source.table.to_pylist(), source


def column(rows, name, **which):
  return [r[name] for r in rows if all(r[k] == v for k, v in which.items())]


# Cholec80: a row of 25 a second, names, a tool table that lacks its last row

def cholec80(root, clip, number='01', phases=None, tools=SECONDS - 1, end=25 * SECONDS):
  phase = phases or (lambda f: CHOLEC80[0] if f < 30 else CHOLEC80[1])
  put(clip, root / 'videos' / f'video{number}.mp4')
  write(root / 'phase_annotations' / f'video{number}-phase.txt',
        ['Frame\tPhase', *(f'{f}\t{phase(f)}' for f in range(end))])
  flags = lambda s: '\t'.join('1' if k in (s, 6) else '0' for k in range(7))
  write(root / 'tool_annotations' / f'video{number}-tool.txt',
        ['Frame\t' + '\t'.join(videos.TOOLS), *(f'{25 * s}\t{flags(s)}' for s in range(tools))])


def test_cholec80(tmp_path, clip):
  root = tmp_path / 'd'
  cholec80(root, clip)
  cholec80(root, clip, '45')
  assert find('auto', [root], []) == 'cholec80'
  assert survey([root], tmp_path / 'x')['records'] == 2 * SECONDS
  rows, source = run(root, tmp_path / 'c', 'auto')
  one = [r for r in rows if r['subject'] == 'cholec80/1']
  assert column(one, 'frame_seconds') == [0, 1, 2, 3]
  assert column(one, 'phase') == [CHOLEC80[0]] * 2 + [CHOLEC80[1]] * 2  # rows 0, 25, 50, 75; the change is at 30
  assert column(one, 'tools') == ['Grasper|SpecimenBag', 'Bipolar|SpecimenBag'] + ['Hook|SpecimenBag'] * 2
  assert {(r['subject'], r['split']) for r in rows} == {('cholec80/1', 'train'), ('cholec80/45', 'val')}
  assert abs(source[2]['image'].mean() - 100) < 6 and {r['video'] for r in rows} == {'cholec80/1', 'cholec80/45'}


def test_labels_between_seconds_are_those_of_their_own_rows(tmp_path, clip):
  cholec80(tmp_path / 'd', clip)
  rows, _ = run(tmp_path / 'd', tmp_path / 'c', 'cholec80', every=0.2)
  assert column(rows, 'phase') == [CHOLEC80[0] if s < 1.2 - 1e-6 else CHOLEC80[1] for s in np.arange(20) / 5]


def test_the_order_of_integers_matters_to_no_label():
  """The two public orders of the last three phases differ; names do not."""
  assert CHOLEC80[4:] == ('GallbladderPackaging', 'CleaningCoagulation', 'GallbladderRetraction')
  assert M2CAI16[1:] == CHOLEC80


@pytest.mark.parametrize('change, message', [
  (dict(phases=lambda f: 'Calot'), "unknown phase in .*video01-phase.txt 'Calot'"),
  (dict(end=25 * 60), r'its annotation goes on to 60 s, but the video has no frame after 3 s: it ends early'),
])
def test_damaged_annotations_name_file_and_cure(tmp_path, clip, change, message):
  cholec80(tmp_path / 'd', clip, **change)
  with pytest.raises(UserError, match=message):
    run(tmp_path / 'd', tmp_path / 'c', 'cholec80')


def test_frames_out_of_order_and_missing_tables(tmp_path, clip):
  cholec80(tmp_path / 'd', clip)
  table = tmp_path / 'd' / 'phase_annotations' / 'video01-phase.txt'
  write(table, ['Frame\tPhase', f'0\t{CHOLEC80[0]}', f'50\t{CHOLEC80[0]}', f'25\t{CHOLEC80[0]}'])
  with pytest.raises(UserError, match='frames are out of order: 25 in row 4 comes after 50'):
    run(tmp_path / 'd', tmp_path / 'c', 'cholec80')
  table.rename(table.with_name('video02-phase.txt'))
  with pytest.raises(UserError, match='has no video01-phase.txt'):
    run(tmp_path / 'd', tmp_path / 'c', 'cholec80')


# Other tables of phases

def test_m2cai16(tmp_path, clip):
  root = tmp_path / 'd'
  for folder, name in (('train_dataset', 'workflow_video_01'), ('test_dataset', 'test_workflow_video_01')):
    put(clip, root / folder / f'{name}.mp4')
    write(root / folder / f'{name}.txt', ['Frame\tPhase', *(f'{f}\t{M2CAI16[f // 50]}' for f in range(100))])
  assert find('auto', [root], []) == 'm2cai16'
  rows, _ = run(root, tmp_path / 'c', 'm2cai16')
  assert column(rows, 'phase', split='train') == ['TrocarPlacement'] * 2 + ['Preparation'] * 2
  assert {(r['video'], r['split']) for r in rows} == {('m2cai16/workflow-train-1', 'train'),
                                                      ('m2cai16/workflow-test-1', 'test')}


def test_autolaparo_and_heichole(tmp_path, clip):
  for number in ('01', '15'):
    put(clip, tmp_path / 'a' / 'videos' / f'{number}.mp4')
    write(tmp_path / 'a' / 'labels' / f'label_{number}.txt', ['Frame\tPhase', '0\t1', '1\t1', '2\t7', '3\t7'])
  assert find('auto', [tmp_path / 'a'], []) == 'autolaparo'
  rows, _ = run(tmp_path / 'a', tmp_path / 'ca', 'autolaparo')
  assert column(rows, 'phase', video='autolaparo/15') == ['Preparation'] * 2 + ['Washing'] * 2
  assert set(column(rows, 'split', video='autolaparo/15')) == {'test'}
  write(tmp_path / 'a' / 'labels' / 'label_01.txt', ['0\t0'])
  with pytest.raises(UserError, match="unknown number of a phase in .*label_01.txt '0'"):
    run(tmp_path / 'a', tmp_path / 'cb', 'autolaparo')
  put(clip, tmp_path / 'h' / 'Videos' / 'Hei-Chole7.mp4')
  write(tmp_path / 'h' / 'Phase' / 'Hei-Chole7_Annotation_Phase.csv', [f'{f},{6 if f > 60 else 0}' for f in range(100)])
  assert find('auto', [tmp_path / 'h'], []) == 'heichole'
  rows, _ = run(tmp_path / 'h', tmp_path / 'ch', 'heichole')
  assert column(rows, 'phase') == ['Preparation'] * 3 + ['GallbladderRetraction']


def test_pitvis(tmp_path, clip):
  root = tmp_path / 'd'
  put(clip, root / 'video_03.mp4')
  write(root / 'map_steps.csv', ['int_step,str_step', '-1,out', '-1,operation_ended', '1,nasal_corridor_creation ',
                                 '2,anterior_sphenoidotomy'])
  write(root / 'map_instruments.csv', ['int_instrument,str_instrument', '-1,out', '0,no_instrument', '5,drill'])
  write(root / 'annotations_03.csv', ['int_time,int_step,int_instrument1,int_instrument2', '0,-1,-1,-2', '1,1,0,-2',
                                      '2,1,5,-2', '3,2,5,0', '4,2,5,0'], 'utf-8-sig')
  rows, _ = run(root, tmp_path / 'c', 'auto')
  assert column(rows, 'step') == [None, 'nasal_corridor_creation', 'nasal_corridor_creation', 'anterior_sphenoidotomy']
  assert column(rows, 'instruments') == [None, 'no_instrument', 'drill', 'drill|no_instrument']


# Segments and clips

OPHNET = ['video_id,start,end,split,surgery_id,phase_id,operation_id', 'case_a,0.5,2.2,train,1,4,7',
          'case_a,1.8,3.0,train,1,5,8', 'case_b,0,4,test,2,4,7']


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_ophnet_keeps_overlapping_segments(tmp_path, clip, encoding):
  for name in ('case_a', 'case_b'):
    put(clip, tmp_path / 'd' / f'{name}.mp4')
  write(tmp_path / 'd' / 'OphNet2024_loca_all.csv', OPHNET, encoding)
  rows, _ = run(tmp_path / 'd', tmp_path / 'c', 'auto')
  assert column(rows, 'phase', video='ophnet/case_a') == [None, 'phase_4', 'phase_4|phase_5', None]
  assert column(rows, 'operation', video='ophnet/case_a')[2] == 'operation_7|operation_8'
  assert json.loads(column(rows, 'segments', video='ophnet/case_a')[2]) == [
    [0.5, 2.2, 'phase_4', 'operation_7', 'surgery_1'], [1.8, 3.0, 'phase_5', 'operation_8', 'surgery_1']]
  assert set(column(rows, 'split', video='ophnet/case_b')) == {'test'}


def test_ophnet_json_in_gbk(tmp_path, clip):
  put(clip, tmp_path / 'd' / 'case_a.mp4')
  database = {'case_a': {'subset': 'Validation', 'annotations': [{'label': '切口', 'segment': [0, 2]}]}}
  (tmp_path / 'd' / 'a.json').write_bytes(json.dumps({'database': database}, ensure_ascii=False).encode('gbk'))
  rows, _ = run(tmp_path / 'd', tmp_path / 'c', 'ophnet')
  assert column(rows, 'phase') == ['切口', '切口', None, None] and set(column(rows, 'split')) == {'val'}
  database['case_a']['annotations'][0]['segment'] = [2, 2]
  (tmp_path / 'd' / 'a.json').write_text(json.dumps({'database': database}))
  with pytest.raises(UserError, match='from 2 to 2 s: expected an end after its begin'):
    run(tmp_path / 'd', tmp_path / 'e', 'ophnet')


def test_surgtoolloc(tmp_path, clip):
  root = tmp_path / 'd'
  put(clip, root / 'video_clips' / 'clip_000003.mp4')
  table = [',clip_name,tools_present', '0,clip_000003,"[needle driver, nan, needle driver, cadiere forceps]"']
  write(root / 'labels.csv', table)
  rows, _ = run(root, tmp_path / 'c', 'auto')
  assert set(column(rows, 'tools')) == {'needle driver|cadiere forceps'} and len(rows) == SECONDS
  assert 'splits by clip may part an operation' in (tmp_path / 'c' / 'card.md').read_text().replace('\n', ' ')
  write(root / 'labels.csv', [table[0], '0,clip_000003,"[needle drivers]"'])
  with pytest.raises(UserError, match="did you mean 'needle driver'"):
    run(root, tmp_path / 'e', 'surgtoolloc')


# Masks

def test_cholecseg8k(tmp_path):
  root, values = tmp_path / 'd', sorted(WATERSHED)
  grey = np.resize(values, (4, 5))
  place = root / 'video12' / 'video12_00080' / 'frame_105_endo.png'
  picture(place, np.full((4, 5, 3), 9))
  picture(place.with_name('frame_105_endo_watershed_mask.png'), np.repeat(grey[..., None], 3, -1))
  picture(place.with_name('frame_105_endo_mask.png'), np.zeros((4, 5)))
  rows, source = run(root, tmp_path / 'c', 'auto')
  [row] = rows
  assert (row['video'], row['frame_seconds'], row['clip']) == ('cholec80/12', 4.2, 'video12_00080')
  assert np.array_equal(source[0]['mask'], np.vectorize(WATERSHED.get)(grey))
  assert labels_of(source).names[10] == 'gallbladder'
  picture(place.with_name('frame_105_endo_watershed_mask.png'), np.full((4, 5), 77))
  with pytest.raises(UserError, match='holds the value 77, which the layout does not know'):
    run(root, tmp_path / 'e', 'cholecseg8k')


def test_endovis17(tmp_path):
  root = tmp_path / 'd'
  for number in (1, 4):
    place = root / f'instrument_dataset_{number}'
    picture(place / 'left_frames' / 'frame003.png', np.full((4, 5, 3), 9))
    for word, rows in (('Bipolar_Forceps_labels', 0), ('Monopolar_Curved_Scissors_labels', 2)):
      mask = np.zeros((4, 5))
      mask[rows] = (0, 10, 20, 30, 0)
      picture(place / 'ground_truth' / word / 'frame003.png', mask)
  rows, source = run(root, tmp_path / 'c', 'auto')
  assert {(r['video'], r['fold']) for r in rows} == {('endovis17/1', '0'), ('endovis17/4', '2')}
  expected = np.zeros((4, 5), int)
  expected[0, 1:4], expected[2, 1:4] = 1, 6
  assert np.array_equal(source[0]['mask'], expected) and labels_of(source).names[6] == 'monopolar curved scissors'
  (root / 'instrument_dataset_1' / 'ground_truth' / 'Laser_labels').mkdir()
  with pytest.raises(UserError, match='Laser_labels names no known instrument'):
    run(root, tmp_path / 'e', 'endovis17')


def test_endovis18(tmp_path):
  root, colours = tmp_path / 'd', list(ENDOVIS18.values())
  codes = np.arange(12).reshape(3, 4)
  for place, mask in (('train/seq_1', codes), ('train/seq_5', 0 * codes), ('test/seq_1', codes[::-1])):
    picture(root / place / 'left_frames' / 'frame000.png', np.full((3, 4, 3), 9))
    picture(root / place / 'labels' / 'frame000.png', np.array(colours)[mask])
  rows, source = run(root, tmp_path / 'c', 'endovis18')
  by = {r['subject']: (r['split'], source[i]['mask']) for i, r in enumerate(rows)}
  assert by['endovis18/1'][0] == 'train' and np.array_equal(by['endovis18/1'][1], codes)
  assert by['endovis18/5'][0] == 'val' and not by['endovis18/5'][1].any()
  assert by['endovis18/test-1'][0] == 'test' and np.array_equal(by['endovis18/test-1'][1], codes[::-1])


# Boxes and criteria

def test_endoscapes(tmp_path):
  root = tmp_path / 'd'
  categories = [{'id': 1, 'name': 'gallbladder'}, {'id': 6, 'name': 'tool'}]
  for split, video in (('train', 3), ('val', 130), ('test', 170)):
    for frame in (25, 50):
      picture(root / split / f'{video}_{frame}.jpg', np.full((6, 8, 3), 9))
    boxes = [{'id': 1, 'image_id': 0, 'category_id': 6, 'bbox': [1, 2, 3, 4], 'iscrowd': 0}]
    (root / split / 'annotation_coco.json').write_text(json.dumps({
      'images': [{'id': 0, 'file_name': f'{video}_25.jpg'}], 'categories': categories, 'annotations': boxes}))
    (root / split / 'annotation_ds_coco.json').write_text(json.dumps({
      'images': [{'id': 0, 'file_name': f'{video}_25.jpg', 'ds': [1 / 3, 2 / 3, 1.0]}], 'annotations': []}))
  picture(root / 'semseg' / '3_25.png', np.full((6, 8, 3), 2))
  write(root / 'seg_label_map.txt', ['0: cystic_plate', '2: gallbladder'])
  rows, source = run(root, tmp_path / 'c', 'auto')
  by = {(r['video'], r['frame_seconds']): r for r in rows}
  row = by['endoscapes/3', 1.0]
  assert (row['cvs'], row['box_names'], json.loads(row['boxes'])) == ('hepatocystic_triangle|cystic_plate', 'tool',
                                                                    [[2, 1, 6, 4]])
  assert row['mask_values'] == [2] and labels_of(source).names == ('cystic plate', 'gallbladder')
  assert by['endoscapes/3', 2.0]['cvs'] is None and by['endoscapes/3', 2.0]['boxes'] is None
  assert {r['split'] for r in rows if r['subject'] == 'endoscapes/170'} == {'test'}


def test_hsdb(tmp_path):
  root = tmp_path / 'd'
  for name in ('case1_0010', 'case1_0020', 'case2_0001'):
    picture(root / 'images' / f'{name}.jpg', np.full((6, 8, 3), 9))
  base = {'categories': [{'id': 1, 'name': 'Scissors_Head'}]}
  (root / 'train.json').write_text(json.dumps(base | {'images': [
    {'id': k, 'file_name': f'case1_00{k}0.jpg'} for k in (1, 2)], 'annotations': [
    {'id': 1, 'image_id': 2, 'category_id': 1, 'bbox': [0, 0, 2, 2]}]}))
  (root / 'test.json').write_text(json.dumps(base | {'images': [{'id': 1, 'file_name': 'case2_0001.jpg'}],
                                                     'annotations': []}))
  rows, _ = run(root, tmp_path / 'c', 'hsdb')
  assert sorted(zip(column(rows, 'video'), column(rows, 'box_names'), column(rows, 'split'))) == [
    ('hsdb/case1', '', 'train'), ('hsdb/case1', 'Scissors_Head', 'train'), ('hsdb/case2', '', 'test')]
  (root / 'test.json').write_text('{"images": [{"id": 1}]}')
  with pytest.raises(UserError, match="'file_name' is missing or odd"):
    run(root, tmp_path / 'e', 'hsdb')


# Relations

def test_cholect45(tmp_path):
  root = tmp_path / 'd'
  write(root / 'dict' / 'triplet.txt', ['0:grasper,grasp,liver', '1:hook,cut,liver', '2:hook,cut,fluid'])
  for number in (1, 12, 79, 111):
    for frame in range(2):
      picture(root / 'data' / f'VID{number:02d}' / f'{frame:06d}.png', np.full((4, 4, 3), 9))
    write(root / 'triplet' / f'VID{number:02d}.txt', ['0,1,0,1', '1,0,0,0'])
  rows, _ = run(root, tmp_path / 'c', 'auto')
  one = [r for r in rows if r['video'] == 'cholec80/1']
  assert column(one, 'triplets') == ['grasper,grasp,liver|hook,cut,fluid', '']
  assert (one[0]['tools'], one[0]['verbs'], one[0]['targets']) == ('grasper|hook', 'grasp|cut', 'liver|fluid')
  assert {(r['video'], r['split'], r['fold']) for r in rows} == {
    ('cholec80/1', 'val', '5'), ('cholec80/12', 'train', '4'), ('cholec80/79', 'test', '1'),
    ('cholect50/111', 'train', None)}
  write(root / 'triplet' / 'VID01.txt', ['0,1,0'])
  with pytest.raises(UserError, match='a row has 2 flags: expected 3'):
    run(root, tmp_path / 'e', 'cholect45')


def test_or4d(tmp_path):
  root = tmp_path / 'd'
  for take in (1, 2):
    place = root / f'export_holistic_take{take}_processed'
    for camera in (1, 2):
      for frame in (100, 101):
        picture(place / 'colorimage' / f'camera{camera:02d}_colorimage-000{frame}.jpg', np.full((4, 4, 3), 9))
    (place / 'timestamp_to_pcd_and_frames_list.json').write_text(json.dumps(
      [[str(k), {'color_1': f'00010{k}', 'color_2': f'00010{k}', 'pcd': '7'}] for k in range(2)]))
  scans = [{'take_idx': 1, 'scan': '000000', 'objects': {'1': 'human', '2': 'Patient'},
            'human_idx_to_name': {'1': 'human_0'}, 'relationships': [[1, 2, 3, 'CloseTo'], [2, 1, 3, 'CloseTo']]},
           {'take_idx': 1, 'scan': '000001', 'objects': {}, 'relationships': [], 'human_idx_to_name': {}}]
  (root / 'relationships_train.json').write_text(json.dumps({'scans': scans}))
  rows, _ = run(root, tmp_path / 'c', 'auto')
  assert column(rows, 'relations', video='or4d/1', camera='camera02') == [
    'human_0>CloseTo>Patient|Patient>CloseTo>human_0', '']
  assert set(column(rows, 'relations', video='or4d/2')) == {None} and len(rows) == 8
  assert {(r['video'], r['split']) for r in rows} == {('or4d/1', 'train'), ('or4d/2', 'test')}


# Operations that sets share

def test_operations_are_told_and_found_across_sets(tmp_path, clip, capsys):
  cholec80(tmp_path / 'a', clip, '12')
  cholec80(tmp_path / 'a', clip, '03')
  place = tmp_path / 'b' / 'video12' / 'video12_00080' / 'frame_100_endo.png'
  picture(place, np.random.default_rng(0).integers(0, 255, (16, 24, 3)))
  picture(place.with_name('frame_100_endo_watershed_mask.png'), np.full((16, 24), 50))
  assert cli.main(['prepare', str(tmp_path / 'a'), '--out', str(tmp_path / 'ca'), '--workers', '1']) == 0
  told = capsys.readouterr().out
  assert 'operations of Cholec80: 2 of 80; sets with the same operations: Cholec80, CholecT45' in told
  assert 'pretraining of SurgeNet holds 76 of its 80 videos' in told
  run(tmp_path / 'b', tmp_path / 'cb', 'cholecseg8k')
  train, held = open_source(tmp_path / 'ca'), open_source(tmp_path / 'cb')
  leaks = leakage.between(train, 'cb', held)
  videos_of = train.table['video'].to_pylist()
  assert (leaks.matches['video'] >= 0).tolist() == [v == 'cholec80/12' for v in videos_of]
  assert leaks.rows.sum() == SECONDS and (leaks.matches['hash'] < 0).all() and (leaks.matches['file'] < 0).all()
  assert 'the same operation 4' in leaks.text()


def test_counts_of_operations():
  found = operations.counted(['cholec80/1', 'cholec80/1', 'cholec80/2', 'hsdb/a', 'surgery-0-1', None, 3])
  assert found == {'cholec80': 2, 'hsdb': 1} and operations.told({'unheard': 3}) == []


def test_a_table_of_frames_needs_subjects(tmp_path):
  for k in range(3):
    picture(tmp_path / 'd' / f'v{k % 2}_{k}.png', np.full((4, 4), k))
  write(tmp_path / 't.csv', ['path,frame_seconds', *(f'v{k % 2}_{k}.png,{k}' for k in range(3))])
  with pytest.raises(UserError, match='has a column frame_seconds, but no column subject'):
    prepare([tmp_path / 'd'], tmp_path / 'c', table=tmp_path / 't.csv', **OPTIONS)
  prepare([tmp_path / 'd'], tmp_path / 'c', table=tmp_path / 't.csv', subject_pattern='(v.)_', **OPTIONS)
  assert set(open_source(tmp_path / 'c').table['subject'].to_pylist()) == {'v0', 'v1'}


# Spans

def test_merged_spans_equal_a_loop_over_time():
  rng = np.random.default_rng(0)
  for _ in range(20):
    some = []
    for name in ('a', 'b'):
      edges = np.sort(rng.choice(60, 8, replace=False))
      some.append([(float(x), float(y), {name: int(x)}) for x, y in zip(edges[::2], edges[1::2])])
    found = videos.merged(*some)
    for time in np.arange(0, 60, 0.5):
      expected = {k: v for spans in some for x, y, c in spans if x <= time < y for k, v in c.items()}
      over = [c for x, y, c in found if x <= time < y]
      assert len(over) <= 1 and (over[0] if over else {}) == expected
  assert videos.merged([], []) == ()


def test_each_layout_is_known_and_says_what_it_expects(tmp_path):
  (tmp_path / 'd').mkdir()
  picture(tmp_path / 'd' / 'a.png', np.zeros((4, 4)))
  assert find('auto', [tmp_path / 'd'], []) == ''
  for name in ('cholec80', 'm2cai16', 'autolaparo', 'heichole', 'cholecseg8k', 'endovis17', 'endovis18', 'endoscapes',
               'hsdb', 'or4d'):
    with pytest.raises(UserError, match=f'is not laid out as {LAYOUTS[name]}: expected'):
      run(tmp_path / 'd', tmp_path / 'c', name)
