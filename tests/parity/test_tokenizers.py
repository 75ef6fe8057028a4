"""Ids of CLIP's and BERT's tokenizers beside the packages that they come from, on awkward strings."""

import random

import numpy as np
import pytest

from jaxmed.data.feed import tokenizers

PARTS = ['pleural effusion', 'No acute  cardiopulmonary\tprocess.', '', ' ', 'XXXX', "doesn't", "it's 3.5cm x 12,000",
         'naïve café Ångström', '&lt;b&gt; &amp;amp; &eacute;', 'H&amp;E', '漢字と仮名', '한국어', '🙂🩻', '\u200b\u00a0x', '\r\n\n',
         'ＡＢＣ', 'T1-weighted/FLAIR (1.5T)', '!!!', '…', '“quoted”', 'a' * 60, '1234567890', 'ß ẞ İ ı', 'µm ± 3 °C',
         'x_y_z', 'e\u0301', '\x07bell', 'ﬁne', 'Ⅳ ½ ²', "'s 'S can'T", 'ÀÉÎ', 'Привет', 'שלום', '<p>', '\\n', '~`|']


def awkward(count=200):
  rng = random.Random(0)
  return [*PARTS, *(rng.choice(['', ' ', ' ']).join(rng.choices(PARTS, k=rng.randint(2, 24))) for _ in range(count))]


def test_ids_are_those_of_open_clip():
  open_clip = pytest.importorskip('open_clip')
  theirs, ours = open_clip.get_tokenizer('ViT-B-32'), tokenizers.clip()
  assert ours.vocab_size == 49408
  longer = 0
  for text in awkward():
    found, wanted = ours.encode(text, 77)[0], theirs([text])[0].numpy()
    if not tokenizers.cleaned(text, 'clip'):
      assert not found.any()  # a record without a text: padding alone, there the two special ids
      continue
    np.testing.assert_array_equal(found, wanted, err_msg=repr(text))
    longer += ours.count(text) > 77
  assert longer > 5


@pytest.mark.parametrize('lower', [True, False])
def test_ids_are_those_of_bert(tmp_path, lower):
  transformers = pytest.importorskip('transformers')
  base = tokenizers.trained('wordpiece', 400, '', awkward())
  pieces = sorted(tokenizers._engine(base.model).get_vocab().items(), key=lambda p: p[1])
  names = [name for name, _ in pieces] + ([] if lower else ['T', '##Y', 'XX', '##X', 'No'])
  (tmp_path / 'vocab.txt').write_text('\n'.join(names) + '\n', encoding='utf-8')
  theirs = transformers.BertTokenizer(str(tmp_path / 'vocab.txt'), do_lower_case=lower)
  ours = tokenizers.load(tmp_path)
  for text in filter(str.strip, awkward()):
    wanted = theirs(text, truncation=True, max_length=40, padding='max_length')['input_ids']
    np.testing.assert_array_equal(ours.encode(text, 40)[0], wanted, err_msg=repr(text))
