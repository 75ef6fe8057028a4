"""Ids and words of texts, vocabularies made of a corpus, cleaning, and what is refused."""

import json

import numpy as np
import pytest

from jaxmed.data.feed import tokenizers
from jaxmed.data.feed.tokenizers import Tokenizer
from jaxmed.errors import UserError

TEXTS = ['Small right pleural effusion.', 'No pneumothorax, no effusion.', 'The heart is normal in size.', ''] * 3


@pytest.fixture(scope='module')
def pieces():
  return tokenizers.of('wordpiece:200', '', TEXTS)


def test_bytes_and_their_words():
  ids, words = Tokenizer().encode('No é-x', 10)
  assert ids.tolist() == [*(b + 1 for b in 'No é-x'.encode()), 0, 0, 0] and ids.dtype == words.dtype == np.int32
  assert words.tolist() == [1, 1, 0, 2, 2, 3, 4, 0, 0, 0]
  assert Tokenizer().encode('abc', 2)[0].tolist() == [98, 99] and Tokenizer().vocab_size == 257
  assert not np.any(Tokenizer().encode(' \n', 4))


def test_a_vocabulary_of_the_corpus(pieces):
  assert tokenizers.of('wordpiece:200', '', TEXTS) == pieces  # the same texts, the same vocabulary
  ids, words = pieces.encode('Heart effusion', 8)
  assert ids[0] == 2 and words[0] == 0  # [CLS]
  end = int(np.argmax(ids == 3))
  assert words[end] == 0 and not ids[end + 1:].any() and words[1:end].tolist() == sorted(words[1:end].tolist())
  assert set(words[1:end]) == {1, 2}
  assert pieces.encode('HEART effusion', 8)[0].tolist() == ids.tolist()  # lower case
  cut, kept = pieces.encode('The heart is normal in size.', 4)
  assert cut[-1] == 3 and kept[-1] == 0 and pieces.count('The heart is normal in size.') > 4
  assert not pieces.encode('', 4)[0].any()  # no text is all padding, without special ids
  assert pieces.vocab_size <= 200


def test_bpe_joins_what_is_frequent():
  found = tokenizers.of('bpe:80', '', TEXTS)
  assert found.count('effusion') < 2 + len('effusion') and found.encode('effusion', 12)[1].max() == 1


def test_a_file_and_a_folder_give_back_what_was_saved(pieces, tmp_path):
  pieces.save(tmp_path)
  assert tokenizers.load(tmp_path).encode('Small heart', 9)[0].tolist() == pieces.encode('Small heart', 9)[0].tolist()
  assert tokenizers.load(tmp_path).end == pieces.end == 3
  import tokenizers as package
  whole = package.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))  # the package reads the file as it is
  assert whole.encode('Small heart').ids == pieces.encode('Small heart', 99)[0][:pieces.count('Small heart')].tolist()
  vocab = sorted(json.loads(pieces.model)['model']['vocab'].items(), key=lambda p: p[1])
  (tmp_path / 'vocab.txt').write_text('\n'.join(name for name, _ in vocab))
  (tmp_path / 'tokenizer.json').unlink()
  assert tokenizers.of(str(tmp_path), '', ()).encode('Small heart', 9)[0].tolist() == pieces.encode('Small heart', 9)[0].tolist()


@pytest.mark.parametrize('text, clean, wanted', [
    ('A_large, (left) MASS!', 'canonicalize', 'a large left mass'), (' H&amp;amp;E \n Stain', 'clip', 'h&e stain'),
    (' As It is ', '', ' As It is ')])
def test_cleaning(text, clean, wanted):
  assert tokenizers.cleaned(text, clean) == wanted


def test_what_fills_the_end():
  filled = Tokenizer(fill=7)
  assert filled.encode('ab', 4)[0].tolist() == [98, 99, 7, 7] and not filled.encode('', 4)[0].any()


def test_sizes_without_texts(pieces, tmp_path):
  pieces.save(tmp_path)
  assert [tokenizers.size_of(w) for w in ('', 'clip', 'wordpiece:300', str(tmp_path))] == [257, 49408, 300, pieces.vocab_size]


def test_bad_input(tmp_path):
  other = json.loads(tokenizers.of('wordpiece:80', '', TEXTS).model)
  vocab = other['model']['vocab']
  vocab['[PAD]'], vocab['[UNK]'] = vocab['[UNK]'], vocab['[PAD]']
  other['added_tokens'] = []
  (tmp_path / 'other.json').write_text(json.dumps(other))
  (tmp_path / 'broken.json').write_text('{')
  (tmp_path / 'list.txt').write_text('a\nb\n')
  for words, told in (('wordpiece', 'expected wordpiece:SIZE with a size of 7 to 1000000'), ('bpe:3', 'expected bpe:SIZE'), ('wordpiece:20', 'expected a size of'),
                      ('missing.json', 'loader.tokenizer=missing.json: expected bytes, clip, wordpiece:SIZE'),
                      (str(tmp_path / 'broken.json'), 'broken.json is no tokenizer'),
                      (str(tmp_path / 'list.txt'), r'begins with \[PAD\]'),
                      (str(tmp_path / 'other.json'), 'pads with id 1: expected a tokenizer whose padding is 0'),
                      (f'clip:{tmp_path / "list.txt"}', 'expected bpe_simple_vocab_16e6.txt.gz')):
    with pytest.raises(UserError, match=told):
      tokenizers.of(words, '', TEXTS)
  with pytest.raises(UserError, match='no record to train on has a text'):
    tokenizers.of('bpe:50', '', ['', ' '])
  with pytest.raises(UserError, match="did you mean 'canonicalize'"):
    Tokenizer(clean='canonical')
