"""The `jaxmed` command: one file a verb; this one parses, dispatches, and maps exceptions to exit codes.

A verb's file has DOES, EXAMPLE, `options(parser)` and `run(args)`, which calls the rooms that do the work and returns
{'json': ..., 'text': ...}, and maybe 'code'. What is heavy it imports in `run`: no help waits for JAX.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from jaxmed import __version__, owner
from jaxmed.cli import (
  compare,
  curate,
  demo_data,
  doctor,
  embed,
  evaluate,
  export,
  finetune,
  fingerprint,
  import_,
  launch,
  list_,
  plan,
  predict,
  prepare,
  report,
  shrink,
  status,
  stop,
  streams,
  study,
  study_fit,
  train,
  transfer,
)
from jaxmed.errors import DISK, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER, Stopped, Unavailable, UserError, choose
from jaxmed.files import shown
from jaxmed.parallel import tpu
from jaxmed.train.monitor.signals import raising_on_sigterm

_MODULES = (prepare, curate, fingerprint, train, finetune, launch, status, stop, study, study_fit, transfer, compare,
            evaluate, predict, embed, export, shrink, import_, report, demo_data, list_, plan, doctor)
_NAMES = {study_fit: 'study fit'}  # of two words
VERBS: dict[str, ModuleType] = {
    _NAMES.get(m, m.__name__.rpartition('.')[2].strip('_').replace('_', '-')): m for m in _MODULES}
_RAW = ('inputs', 'data', 'table')  # arguments whose names may have bytes that are not UTF-8
EXIT_CODES = {
    0: 'done',
    EXIT_USER: "the user's mistake: one line says what",
    EXIT_STOPPED: 'stopped by a signal, with everything saved: start again with --resume',
    EXIT_UNAVAILABLE: 'no progress, or another process is gone: start again from the last checkpoint',
    1: 'a defect of jaxmed, with a traceback',
}


def command() -> int:
  """The installed `jaxmed`: `main`, for training in huge pages where the system has them (see parallel.memory)."""
  if sys.argv[1:2] in (['train'], ['finetune'], ['compare'], ['study'], ['transfer']):
    from jaxmed.parallel.memory import restart_with_huge_pages
    restart_with_huge_pages()
  return main()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code. A reader of its output that goes away does not end its work."""
  with streams.kept():
    return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
  """`main`, with streams that can be written."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  _quiet_libraries()
  tpu.leave_out()
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return _run(argv)
  except UserError as e:
    print(f'jaxmed: {" ".join(str(e).split())}', file=sys.stderr)
    return EXIT_USER
  except OSError as e:
    if e.errno not in DISK:
      raise
    print(f'jaxmed: cannot write {e.filename or "to disk"}: {e.strerror}', file=sys.stderr)
    return EXIT_USER
  except Stopped as e:
    print(f'jaxmed: stopped by {e}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_STOPPED)  # a compilation may still be running in a thread that nothing can end
  except Unavailable as e:
    print(f'jaxmed: {e}', file=sys.stderr, flush=True)
    return EXIT_UNAVAILABLE
  except KeyboardInterrupt:
    print('jaxmed: stopped by Ctrl-C; nothing is left half-written', file=sys.stderr, flush=True)
    return EXIT_STOPPED


def _run(argv: list[str]) -> int:
  """Parses, dispatches and prints."""
  if ' '.join(argv[:2]) in VERBS:
    argv = [' '.join(argv[:2]), *argv[2:]]
  if argv and not argv[0].startswith('-'):
    choose('command', argv[0], VERBS)
  args = _parse(argv)
  with raising_on_sigterm(), _owned(args):
    result = VERBS[args.verb].run(args)
  sys.stdout.write(json.dumps(_texts(result['json'])) + '\n' if args.json else result.get('text', '') + '\n')
  sys.stdout.flush()
  return int(result.get('code', 0))


def _owned(args: argparse.Namespace) -> contextlib.AbstractContextManager:
  """What the verb writes, for this process alone; runs, corpora and selections see to it themselves."""
  if args.verb == 'compare' or (args.verb == 'finetune' and args.control and args.out):
    return owner.of_folder(args.out)
  grid = args.verb in ('study', 'transfer') and args.out and args.launcher != 'jobset'
  if grid and not (args.dry_run or args.cell or args.cell_index):
    return owner.of_folder(args.out)
  if args.verb == 'evaluate' and not args.out and os.path.isdir(args.path):
    return owner.of_file(os.path.join(args.path, 'evaluation.json'))
  if args.verb in ('embed', 'evaluate', 'export', 'import', 'shrink') and args.out:
    return owner.of_file(args.out)
  if args.verb in ('study fit', 'predict') and args.out:
    return owner.of_folder(args.out)
  return contextlib.nullcontext()


def _texts(value: Any) -> Any:
  """A value for JSON whose texts are UTF-8, whatever file names they hold."""
  if isinstance(value, dict):
    return {_texts(k): _texts(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_texts(v) for v in value]
  return shown(value) if isinstance(value, str) else value


def _quiet_libraries() -> None:
  """Libraries below report through absl and warnings; what a user must know is said by us."""
  import logging
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  logging.getLogger('jax').setLevel(logging.ERROR)


class _Parser(argparse.ArgumentParser):
  """argparse whose errors are one line that names the nearest verb or option."""

  def error(self, message: str):
    raise UserError(f'{message} (see {self.prog} --help)')


def _wide(prog: str) -> argparse.HelpFormatter:
  return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100)


def parser() -> argparse.ArgumentParser:
  """The parser of every verb and option; the reference is written from it too."""
  whole = _Parser(prog='jaxmed', formatter_class=_wide,
                  description='Pretrains encoders for medical images of any number of channels.')
  whole.add_argument('--version', action='version', version=f'jaxmed {__version__}')
  verbs = whole.add_subparsers(dest='verb', required=True, metavar='VERB')
  for name, module in VERBS.items():
    verb = verbs.add_parser(name, help=module.DOES, description=module.DOES[0].upper() + module.DOES[1:] + '.',
                            epilog=f'example:\n  {module.EXAMPLE}', formatter_class=_wide)
    module.options(verb)
    verb.set_defaults(parser=verb)
    verb.add_argument('--json', action='store_true', help='print one JSON object on stdout')
  return whole


def _parse(argv: list[str]) -> argparse.Namespace:
  """argparse gives a list of words up at the first option; here they may stand on both sides of it."""
  args, rest = parser().parse_known_args(argv)
  if hasattr(args, 'words'):
    args.words += [word for word in rest if not word.startswith('-')]
    rest = [word for word in rest if word.startswith('-')]
  if rest:
    raise UserError(f'{args.verb} does not know {" ".join(rest)} (see jaxmed {args.verb} --help)')
  _check_words(args)
  return args


def _check_words(args: argparse.Namespace) -> None:
  """Raises a UserError for an argument that is empty, as an unset variable is, or no UTF-8 where more than raw files is
  meant."""
  for action in args.parser._actions:
    given = getattr(args, action.dest, None)
    name = '/'.join(action.option_strings) or action.metavar
    for value in given if isinstance(given, list) else [given]:
      if value == '' and action.default != '':
        raise UserError(f'{name} is empty: expected a value (is a variable unset?)')
      if isinstance(value, str) and action.dest not in _RAW and shown(value) != value:
        raise UserError(f'{name} {value} is no UTF-8: choose another name')


if __name__ == '__main__':
  sys.exit(main())
