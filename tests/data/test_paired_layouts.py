"""Folders of images with texts, written small in each published form, come out with their texts, subjects and splits."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxmed.data import readers
from jaxmed.data.prepare import benchmarks
from jaxmed.data.prepare.benchmarks import captioned, mimic, webdataset
from jaxmed.data.prepare.survey import survey
from jaxmed.data.readers import wfdb
from jaxmed.errors import UserError

from .test_layouts import by_path, run, write_csv

RNG = np.random.default_rng(0)


def png(path, value):
  """Writes a picture of one grey value."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((4, 5), value, np.uint8)).save(path)


def picked(row, *keys):
  return [row[k] for k in keys]


def planned(root, layout='auto'):
  """(name, {path: item}, {path: reason}) without reading a pixel."""
  name = benchmarks.find(layout, [root], [])
  plan = benchmarks.plan(name, root)
  return name, {i.rel: i for i in plan.items}, dict(plan.rejects)


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  A person with a cough.

 FINDINGS:

 The lungs are clear.  No
 effusion is seen.

 IMPRESSION:

 Nothing acute.
"""


@pytest.mark.parametrize('packed', [False, True])
def test_mimic_as_physionet_has_it(tmp_path, packed, capsys):
  root, end = tmp_path / 'in', '.csv.gz' if packed else '.csv'
  cases = [('d1', 10000032, 50414267, 'PA', 'train'), ('d2', 10000032, 50414267, 'LATERAL', 'train'),
           ('d3', 10000084, 53189527, 'AP', 'validate'), ('d4', 11000011, 51314598, 'AP', 'test'),
           ('d5', 11000011, 51314598, 'AP', 'test')]
  place = lambda person, study: root / f'files/p{str(person)[:2]}/p{person}/s{study}'
  for i, (name, person, study, _, _) in enumerate(cases[:4]):
    png(place(person, study) / f'{name}.png', 10 * i)
  place(*cases[0][1:3]).with_suffix('.txt').write_text(REPORT, encoding='utf-8')
  place(*cases[2][1:3]).with_suffix('.txt').write_text('No  heading\nat all', encoding='utf-8')
  write_csv(root / f'mimic-cxr-2.0.0-metadata{end}', ['dicom_id', 'subject_id', 'study_id', 'ViewPosition', 'Rows'],
            [[*c[:4], 4] for c in cases])
  write_csv(root / f'mimic-cxr-2.0.0-split{end}', ['dicom_id', 'study_id', 'subject_id', 'split'],
            [[c[0], c[2], c[1], c[4]] for c in cases])
  write_csv(root / f'mimic-cxr-2.0.0-chexpert{end}', ['subject_id', 'study_id', 'Edema', 'No Finding'],
            [[10000032, 50414267, '', 1.0], [10000084, 53189527, -1.0, '']])
  if packed:
    name, items, rejects = planned(root)
    assert (name, len(items), len(rejects)) == ('mimic', 4, 1)
    return
  summary = run(root, tmp_path / 'c', max_bad=0.5)
  assert 'laid out as MIMIC-CXR' in capsys.readouterr().err
  assert {k: v['records'] for k, v in summary['splits'].items()} == {'train': 2, 'val': 1, 'test': 1}
  assert summary['rejected'] == 1 and summary['subjects'] == 3
  rows = {p.rpartition('/')[2]: r for p, r in by_path(tmp_path / 'c').items()}
  for name in ('d1.png', 'd2.png'):
    assert rows[name]['record']['text'] == rows[name]['text'] == 'Nothing acute. The lungs are clear. No effusion is seen.'
    assert picked(rows[name], 'findings', 'impression', 'subject', 'study', 'No Finding', 'Edema') == [
        'The lungs are clear. No effusion is seen.', 'Nothing acute.', 'p10000032', 's50414267', '1.0', None]
  assert picked(rows['d3.png'], 'text', 'findings', 'view', 'Edema') == ['No heading at all', None, 'AP', '-1.0']
  assert rows['d4.png']['text'] is None and 'text' not in rows['d4.png']['record']
  assert (rows['d2.png']['image'] == 10).all()
  with pytest.raises(UserError, match=r'd5.jpg: mimic-cxr-2.0.0-metadata.csv names it, but no such file exists'):
    run(root, tmp_path / 'd')


def test_a_report_by_its_headings():
  assert mimic.report(REPORT)['findings'] == 'The lungs are clear. No effusion is seen.'
  assert mimic.report('FINDINGS: a: b\nIMPRESSION: c')['text'] == 'c a: b'
  assert mimic.report('IMPRESSION: only') == {'findings': None, 'impression': 'only', 'text': 'only'}
  assert mimic.report('FINDINGS AND IMPRESSION: both')['text'] == 'both'
  assert mimic.report(None)['text'] is None and mimic.report(' ')['text'] is None


def test_mimic_as_one_table(tmp_path):
  root, head = tmp_path / 'in', ['Path', 'ViewPosition', 'split', 'impression', 'findings']
  png(root / 'files/p10/p10000032/s50414267/a.jpg', 3)
  png(root / 'files/p11/p11000011/s51314598/b.jpg', 4)
  write_csv(root / 'master.csv', head, [
      ['files/p10/p10000032/s50414267/a.jpg', 'PA', 'train', 'calm', 'two\nlines'],
      ['/data/mimic/files/p11/p11000011/s51314598/b.jpg', 'AP', 'valid', '', 'seen'],
      ['files/p11/p11000011/s51314598/b.jpg', 'AP', 'valid', '', 'seen'], ['files/c.jpg', 'AP', 'test', 'x', 'y'],
      ['', 'AP', 'test', 'x', 'y'], ['../../etc/passwd', 'AP', 'test', 'x', 'y']])
  name, items, rejects = planned(root)
  assert name == 'mimic'
  a, b = items.values()
  assert (a.subject, a.split, a.extra['text'], a.extra['study']) == ('p10000032', 'train', 'calm two lines', 's50414267')
  assert (b.subject, b.split, b.extra['text'], b.extra['impression']) == ('p11000011', 'val', 'seen', None)
  assert sorted(rejects.values()) == ['has a row without an image', 'is listed twice',
                                      *2 * ['master.csv names it, but no such file exists']]


XML = """<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{n}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="INDICATION">cough</AbstractText><AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">calm &amp; clear</AbstractText></Abstract></Article></MedlineCitation>
<MeSH><major>Opacity/lung</major><major>normal</major></MeSH>{images}</eCitation>"""


def test_openi(tmp_path):
  root = tmp_path / 'in'
  (root / 'ecgen-radiology').mkdir(parents=True)
  for n, names in ((1, ('a', 'b')), (2, ()), (10, ('c', 'gone'))):
    (root / f'ecgen-radiology/{n}.xml').write_text(XML.format(
        n=n, findings='' if n == 10 else 'two\n  lines', images=''.join(f'<parentImage id="CXR{n}_{k}"/>' for k in names)))
    for k in names[:2 if n == 1 else 1]:
      png(root / f'images/CXR{n}_{k}.png', n)
  (root / 'ecgen-radiology/3.xml').write_text('<eCitation><parentImage')
  name, items, rejects = planned(root)
  assert name == 'openi' and list(items) == ['images/CXR1_a.png', 'images/CXR1_b.png', 'images/CXR10_c.png']
  a, _, c = items.values()
  assert a.extra == {'text': 'calm & clear two lines', 'captions': None, 'findings': 'two lines', 'indication': 'cough',
                     'impression': 'calm & clear', 'mesh': 'Opacity/lung|normal'}
  assert [i.subject for i in items.values()] == ['CXR1', 'CXR1', 'CXR10'] and c.extra['text'] == 'calm & clear'
  assert 'is no report in XML' in rejects['ecgen-radiology/3.xml'] and 'no such file' in rejects['CXR10_gone']


def test_captions_of_publications(tmp_path):
  one, two, three = (tmp_path / n for n in ('one', 'two', 'three'))
  for split in ('train', 'validation'):
    for kind in ('radiology', 'non-radiology'):
      png(one / split / kind / f'images/ROCO_{split}_{kind}.jpg', 1)
      (one / split / kind / 'captions.txt').write_text(f'ROCO_{split}_{kind}\t CT  of {kind} \n\nROCO_x\tgone\n')
  png(one / 'data/test/radiology/images/PMC12_f-g1.jpg', 1)
  (one / 'data/test/radiology/captions.txt').write_text('ROCO_7\tas fetched\n')
  (one / 'data/test/radiology/dlinks.txt').write_text('ROCO_7\twget -r ftp://host/a/PMC12.tar.gz -O x\tf-g1.jpg\n')
  name, items, rejects = planned(one)
  fetched = items.pop('data/test/radiology/images/PMC12_f-g1.jpg')
  assert (fetched.split, fetched.extra['text']) == ('test', 'as fetched')
  assert name == 'roco' and len(items) == 4 and list(rejects) == ['ROCO_x'] * 1
  item = items['validation/non-radiology/images/ROCO_validation_non-radiology.jpg']
  assert (item.split, item.extra['text'], item.extra['kind']) == ('val', 'CT of non-radiology', 'non-radiology')
  for split, word in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
    png(two / f'{word}/ROCOv2_{word}_1.jpg', 2)
    write_csv(two / f'{word}_captions.csv', ['ID', 'Caption'], [[f'ROCOv2_{word}_1', f'a, "{split}"'], ['x', '']])
  name, items, rejects = planned(two)
  assert {i.split: i.extra['text'] for i in items.values()} == {s: f'a, "{s}"' for s in ('train', 'val', 'test')}
  assert (name, list(rejects)) == ('roco', ['x'])
  png(three / 'caption_T060_filtered_top4_sep_v0_subfigures/PMC1_a.jpg', 3)
  (three / 'pmc_oa.jsonl').write_text('{"image": "PMC1_a.jpg", "caption": "two\\nlines"}\n{broken\n{"image": "b.jpg"}\n')
  name, items, rejects = planned(three)
  item, = items.values()
  assert (name, item.source, item.split, item.extra['text']) == ('roco', 'pmc_oa', None, 'two lines')
  assert rejects == {'pmc_oa.jsonl:2': 'is no JSON object', 'b.jpg': 'pmc_oa.jsonl names it, but no such file exists'}


def test_quilt(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  for k in 'abc':
    png(one / f'quilt_1m/{k}.jpg', 1)
    png(two / f'images/{k}.jpg', 1)
  write_csv(one / 'quilt_1M_lookup.csv', ['', 'caption', 'image_path', 'subset', 'split', 'pathology', 'magnification'], [
      [0, 'first', 'a.jpg', 'quilt', 'train', "['Skin']", 1.0], [1, 'second', 'a.jpg', 'quilt', 'train', '', 1.0],
      [2, 'first', 'a.jpg', 'quilt', 'train', '', 1.0], [3, 'own', 'b.jpg', 'pubmed', 'val', '', ''],
      [4, '', 'c.jpg', 'laion', 'train', '', '']])
  name, items, rejects = planned(one)
  assert name == 'quilt' and list(items) == ['quilt_1m/a.jpg', 'quilt_1m/b.jpg'] and 'no caption' in rejects['c.jpg']
  a, b = items.values()
  assert (a.extra['text'], json.loads(a.extra['captions']), a.split) == ('first', ['first', 'second'], 'train')
  assert (b.extra['captions'], b.extra['subset'], b.split, b.extra['pathology']) == (None, 'pubmed', 'val', None)
  write_csv(two / 'quilt_data.csv', ['video_id', 'image_path', 'medical_text'], [
      ['v1', 'a.jpg', "['one', 'it\\'s two']"], ['v1', 'b.jpg', "[]"], ['v2', 'c.jpg', 'plain']])
  _, items, _ = planned(two)
  assert [(i.subject, i.extra['text']) for i in items.values()] == [('v1', 'one'), ('v2', 'plain')]
  assert json.loads(items['images/a.jpg'].extra['captions']) == ['one', "it's two"]
  assert captioned.listed("__import__('os')") == ["__import__('os')"] and captioned.listed('[1, 2]') == ['[1, 2]']


def tar(path, members):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as shard:
    for name, data in members:
      data = data if isinstance(data, bytes) else data.encode()
      member = tarfile.TarInfo(name)
      member.size = len(data)
      shard.addfile(member, io.BytesIO(data))


def picture(value, form='PNG'):
  out = io.BytesIO()
  Image.fromarray(np.full((6, 4, 3), value, np.uint8)).save(out, form)
  return out.getvalue()


def test_shards_of_webdataset(tmp_path, capsys):
  root = tmp_path / 'in'
  many = [f'c{i}' for i in range(12)]
  tar(root / 'train/dataset-000001.tar', [
      ('000000.png', picture(0)), ('000000.txt', '._radimagenet_'.join(many)), ('000001.png', picture(1)),
      ('000001.txt', ' plain \n text '), ('000001.cls', '3\n'), ('000002.txt', 'no image'), ('000003.png', b'\x89PNG broken'),
      ('000003.txt', 'x'), ('000004.png', picture(4)), ('000004.txt', b'\xff\xfe\xff')])
  tar(root / 'val-000000.tar', [('a/b.JPG', picture(90, 'JPEG')), ('a/b.json', '{"caption": "of json"}'),
                                ('a/c.png', picture(5))])
  (root / 'train/whole.tar').write_bytes(gzip.compress(b'0' * 600))
  planned_, summary = survey([root], tmp_path / 'c'), run(root, tmp_path / 'c', max_bad=0.9)
  assert 'laid out as WebDataset' in capsys.readouterr().err and planned_['items'] == 5
  assert (planned_['records'], planned_['formats'], len(planned_['rejects'])) == (4, {'image': 5}, 4)
  rows = by_path(tmp_path / 'c')
  assert summary['rejected'] == 4
  first, second, jpeg, bare = (rows[n] for n in ('train/dataset-000001.tar/000000', 'train/dataset-000001.tar/000001',
                                                 'val-000000.tar/a/b', 'val-000000.tar/a/c'))
  assert len(rows) == 4 and [r['split'] for r in (first, second, jpeg, bare)] == ['train', 'train', 'val', 'val']
  assert (first['text'], json.loads(first['captions']), first['set']) == (
      'c0.', [f'{c}.' for c in many[:10]], 'radimagenet')
  assert picked(second, 'text', 'captions', 'label', 'set') == ['plain text', None, '3', None]
  assert second['record']['text'] == 'plain text' and jpeg['text'] == 'of json' and bare['text'] is None
  assert (second['image'] == 1).all() and np.abs(jpeg['image'].astype(int) - 90).max() < 3
  assert len({r['sha256'] for r in rows.values()}) == 4
  assert second['sha256'] == readers.digest_rows(planned(root)[1][second['path']].parts)


@pytest.mark.parametrize('text, want', [
    ('a_chestxray8_b_chestxray8_', (['a', 'b'], 'chestxray8')), ('report_openi_t1_openi_t2', (['report'], 'openi')),
    ('t1_mimiccxr_t2_mimiccxr_the report', (['the report'], 'mimiccxr')),
    ('t1_mimiccxr_t2_mimiccxr_noreportpresent', (['t1', 't2'], 'mimiccxr')),
    ('a_medicat_nothingpresent', (['a'], 'medicat')), ('a_medicat_b', (['a', 'b'], 'medicat')),
    ('_dr_'.join('abcdefghijklmnopq'), (list('abcdefghijklmno'), 'dr')), ('', ([], None)), (' a  b', (['a b'], None))])
def test_captions_that_a_marker_joins(text, want):
  assert webdataset.captions(text) == want


LEADS = ('I', 'II', 'III')


def ecg(folder, name, samples, form='16', gain=1000.0, baseline=0, wrong=0):
  """Writes integers [T, C] as WFDB, sample by sample; returns them in mV."""
  folder.mkdir(parents=True, exist_ok=True)
  flat = [int(v) for row in samples for v in row]
  if form == '16':
    data = b''.join((v & 0xffff).to_bytes(2, 'little') for v in flat)
  else:
    data = b''
    for k in range(0, len(flat), 2):
      a, b = flat[k] & 0xfff, (flat[k + 1] if k + 1 < len(flat) else 0) & 0xfff
      data += bytes([a & 255, a >> 8 | (b >> 8) << 4, b & 255])
  (folder / f'{name}.dat').write_bytes(data)
  lines = [f'{name} {samples.shape[1]} 100 {len(samples)}']
  for k in range(samples.shape[1]):
    total = (int(samples[:, k].sum()) + wrong + 2**15) % 2**16 - 2**15
    lines.append(f'{name}.dat {form} {gain}({baseline})/mV 16 0 {samples[0, k]} {total} 0 {LEADS[k]}')
  (folder / f'{name}.hea').write_text('\n'.join(lines) + '\n# a comment\n')
  return (samples - baseline) / gain


def test_signals_of_physionet(tmp_path):
  for form, most in (('16', 30000), ('212', 2000)):
    for count in (7, 8):
      samples = RNG.integers(-most, most, (count, 3))
      want = ecg(tmp_path, f'{form}_{count}', samples, form, 200.0, 12)
      got, rate, names = wfdb.read(tmp_path / f'{form}_{count}.hea')
      assert got.dtype == np.float32 and np.allclose(got, want, atol=1e-6) and (rate, names) == (100, list(LEADS))
  for change, words in ((lambda s: s.replace(' 16 ', ' 80 ', 1), 'expected one file of format 16 or 212'),
                        (lambda s: s.replace(' 3 100 8', ' 3 100 9'), 'holds 48 bytes of samples: its header tells of 54'),
                        (lambda s: s.replace('16_8 3', '16_8/2 3'), 'no WFDB header of one segment'),
                        (lambda s: s.replace(' 3 100 8', ' 9 100 8'), 'it tells of 9 channels'), (lambda s: '', 'no WFDB header')):
    good = (tmp_path / '16_8.hea').read_text()
    (tmp_path / 'bad.hea').write_text(change(good))
    with pytest.raises(ValueError, match=words):
      wfdb.read(tmp_path / 'bad.hea')
  ecg(tmp_path, 'sum', samples, wrong=1)
  with pytest.raises(ValueError, match='channel I has another checksum'):
    wfdb.read(tmp_path / 'sum.hea')
  samples[2, 1] = -32768
  ecg(tmp_path, 'missing', samples)
  with pytest.raises(ValueError, match='marked as missing'):
    wfdb.read(tmp_path / 'missing.hea')


def test_ptbxl(tmp_path, capsys):
  root, lines, made = tmp_path / 'in', [], {}
  for n, (fold, codes) in enumerate(((1, "{'NORM': 100.0, 'SR': 0.0}"), (9, "{'IMI': 0.0, 'NST_': 50.0}"), (10, "{'SR': 0.0}"),
                                     (8, "{'NORM': 80.0}"))):
    name = f'records100/00000/{n:05}_lr'
    lines.append([n, float(100 + n), 'Sinus  rhythm' if n else '', codes, fold, name, name.replace('100', '500')])
    if n < 3:
      made[f'{name}.hea'] = ecg(root / 'records100/00000', f'{n:05}_lr', RNG.integers(-900, 900, (20, 3)))
  write_csv(root / 'ptbxl_database.csv', ['ecg_id', 'patient_id', 'report', 'scp_codes', 'strat_fold', 'filename_lr',
                                          'filename_hr'], lines)
  write_csv(root / 'scp_statements.csv', ['', 'description', 'diagnostic_class'], [
      ['NORM', 'normal', 'NORM'], ['IMI', 'inferior', 'MI'], ['NST_', 'st', 'STTC'], ['SR', 'sinus', '']])
  planned_, summary = survey([root], tmp_path / 'c'), run(root, tmp_path / 'c', max_bad=0.5)
  assert 'laid out as PTB-XL' in capsys.readouterr().err
  assert (planned_['records'], planned_['formats'], summary['rejected']) == (3, {'wfdb': 3}, 1)
  rows = by_path(tmp_path / 'c')
  for path, values in made.items():
    record = rows[path]['record']
    assert np.allclose(record['signal'], values, atol=1e-6) and record['signal_rate'] == 100
    assert np.allclose(record['image'][..., 0], values.T, atol=1e-6) and record['channels'] == ['ECG']
  assert [picked(rows[p], 'split', 'label', 'subject', 'text') for p in made] == [
      ['train', 'NORM', 'patient 100', None], ['val', 'MI|STTC', 'patient 101', 'Sinus rhythm'],
      ['test', None, 'patient 102', 'Sinus rhythm']]
  lines[0][4] = 11
  write_csv(root / 'ptbxl_database.csv', ['ecg_id', 'patient_id', 'report', 'scp_codes', 'strat_fold', 'filename_lr'], [
      line[:6] for line in lines])
  with pytest.raises(UserError, match="strat_fold of 0 is '11': expected 1 to 10"):
    planned(root)


def test_rows_of_mmeb(tmp_path):
  root = tmp_path / 'in'
  for k in 'abc':
    png(root / f'images/{k}.png', 1)
  some = [{'qry': '<|image_1|>\nWhat is it?', 'qry_image_path': 'images/a.png', 'pos_text': 'a lung', 'pos_image_path': '',
           'neg_text': "['a heart', 'a bone']", 'neg_image_path': ''},
          {'qry': 'Find a bone', 'qry_image_path': '', 'pos_text': '<|image_1|>', 'pos_image_path': 'b.png', 'neg_text': ''},
          {'qry': 'text only', 'qry_image_path': '', 'pos_text': 'x', 'pos_image_path': ''}, {'qry': 'x'},
          {'qry': '<|image_1|> Again?', 'qry_image_path': 'images/a.png', 'pos_text': 'lungs', 'neg_text': ['no']},
          {'qry': 'q', 'qry_image_path': 'gone.png', 'pos_text': 'x'}]
  (root / 'test.jsonl').write_text('\n'.join(map(json.dumps, some)) + '\n{\n')
  pq.write_table(pa.table({'qry': ['q'], 'qry_image_path': ['c.png'], 'pos_text': ['of parquet']}), root / 'train.parquet')
  name, items, rejects = planned(root)
  assert name == 'mmeb'
  a, b, c = (items[f'images/{k}.png'] for k in 'abc')
  assert (a.extra['text'], json.loads(a.extra['captions']), a.extra['query'], a.split) == (
      'a lung', ['a lung', 'lungs'], 'What is it?', 'test')
  assert json.loads(a.extra['negatives']) == ['a heart', 'a bone', 'no'] and a.extra['side'] == 'query'
  assert (b.extra['text'], b.extra['side'], b.extra['negatives']) == ('Find a bone', 'target', None)
  assert (c.extra['text'], c.split) == ('of parquet', 'train')
  assert rejects == {'test.jsonl:3': 'has no image', 'test.jsonl:4': 'is no row with qry, qry_image_path, pos_text',
                     'test.jsonl:7': 'is no row with qry, qry_image_path, pos_text',
                     'gone.png': 'test.jsonl names it, but no such file exists'}


def test_folders_that_are_none_of_these(tmp_path):
  png(tmp_path / 'a/x.png', 1)
  (tmp_path / 'a/notes.csv').write_text('path,label\nx.png,1\n')
  (tmp_path / 'a/settings.json').write_text('{"qry": 1}')
  (tmp_path / 'a/some.xml').write_text('<svg/>')
  tar(tmp_path / 'a/code.tar', [('main.py', 'x'), ('README.txt', 'y')])
  assert benchmarks.find('auto', [tmp_path / 'a'], []) == ''
  with pytest.raises(UserError, match='is not laid out as Quilt-1M: expected quilt_1M_lookup.csv or quilt_data.csv'):
    benchmarks.plan('quilt', tmp_path / 'a')
