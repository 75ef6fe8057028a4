"""Standard output and error that end no work: closed ones, and readers that went away."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

from jaxmed.files import shown


class Stream:
  """A text stream that drops what nobody reads, and writes every text whatever its encoding holds."""

  def __init__(self, stream: IO[str]):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """Writes a text; bytes of file names that are not UTF-8 as files.shown has them."""
    encoding = getattr(self._stream, 'encoding', None) or 'utf-8'
    with self._unread():
      self._stream.write(shown(text).encode(encoding, 'backslashreplace').decode(encoding))
    return len(text)

  def flush(self) -> None:
    """Flushes what the stream holds."""
    with self._unread():
      self._stream.flush()

  @contextlib.contextmanager
  def _unread(self) -> Iterator[None]:
    """Sends all further text nowhere once the reader has gone."""
    try:
      yield
    except BrokenPipeError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)


@contextlib.contextmanager
def kept() -> Iterator[None]:
  """Standard output and error are `Stream`s meanwhile. A descriptor that is closed gets the null device, or the next
  file that is opened would take its number and what is printed."""
  for number in (0, 1, 2):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
  before = sys.stdout, sys.stderr
  nowhere = open(os.devnull, 'w', encoding='utf-8') if None in before else None  # noqa: SIM115
  sys.stdout, sys.stderr = (Stream(stream or nowhere) for stream in before)  # type: ignore[assignment,arg-type]
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before
