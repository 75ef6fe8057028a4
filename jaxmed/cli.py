"""The `jaxmed` command: parses words, calls one function of the room that does the work, prints what it returned.

Exit codes: 0 done, 2 the user's mistake (one line says what), 75 stopped by a signal with everything saved, 69 no
progress or another process is gone (go on from the last checkpoint), 1 a defect of ours.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxmed import __version__
from jaxmed.errors import DISK, EXIT_STOPPED, EXIT_UNAVAILABLE, EXIT_USER, Stopped, Unavailable, UserError, choose
from jaxmed.parallel import tpu
from jaxmed.train.monitor.signals import raising_on_sigterm

VERBS: dict[str, tuple[str, str]] = {  # verb -> (what it does, example)
    'prepare': ('turn folders of images into a corpus', 'jaxmed prepare scans/ --out corpus'),
    'curate': ('select records of a corpus, or look for those that an evaluation set holds too', 'jaxmed curate corpus '
               '--methods quality,hash --out lean && jaxmed train --data corpus@lean --out run'),
    'train': ('pretrain an encoder', 'jaxmed train --data corpus --out run'),
    'launch': ('train with several processes, or on a cluster', 'jaxmed launch slurm --data corpus --out run --nodes 2 '
               '--gpus-per-task 4 --time 12:00:00'),
    'status': ('how what was launched is doing', 'jaxmed status run'),
    'stop': ('let what was launched save and end', 'jaxmed stop run'),
    'compare': ('train several methods alike and set them side by side', 'jaxmed compare --data corpus --methods '
                'mae,dino,simclr --model channel_vit_micro/16 --label diagnosis --out comparison'),
    'evaluate': ('judge frozen features beside two baselines', 'jaxmed evaluate run --data corpus --label diagnosis '
                 '--out evaluation.json'),
    'embed': ('write features of images', 'jaxmed embed run --data scans/ --out features.npz'),
    'export': ('write the encoder for PyTorch', 'jaxmed export run --format timm --out encoder.safetensors'),
    'shrink': ('find how few numbers hashed channel embeddings need', 'jaxmed shrink run --data corpus '
               '--out encoder.safetensors'),
    'import': ('take an encoder from PyTorch', 'jaxmed import vit.safetensors --format timm --out encoder.safetensors'),
    'report': ('write report.html of a run again', 'jaxmed report run'),
    'demo-data': ('write a few sample files to try the commands on', 'jaxmed demo-data samples'),
    'list': ('show methods, models, formats and recipes', 'jaxmed list'),
    'plan': ('say what a run takes on a TPU pod or GPU cluster, without one', 'jaxmed plan experiments/dinov2.py '
             '--topology v5e:16x16'),
    'doctor': ('show versions, devices, memory and advice', 'jaxmed doctor --data corpus'),
}


def command() -> int:
  """The installed `jaxmed`: `main`, for training in huge pages where the system has them (see parallel.memory)."""
  if sys.argv[1:2] in (['train'], ['compare']):
    from jaxmed.parallel.memory import restart_with_huge_pages
    restart_with_huge_pages()
  return main()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  _quiet_libraries()
  tpu.leave_out()
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    if argv and not argv[0].startswith('-'):
      choose('command', argv[0], VERBS)
    args = _parse(argv)
    with raising_on_sigterm():
      verbs = importlib.import_module('jaxmed.verbs')  # only now: --help needs no JAX
      result = getattr(verbs, {'import': 'import_', 'list': 'list_'}.get(args.verb, args.verb.replace('-', '_')))(args)
    sys.stdout.write(json.dumps(result['json']) + '\n' if args.json else result.get('text', '') + '\n')
    return int(result.get('code', 0))
  except UserError as e:
    print(f'jaxmed: {" ".join(str(e).split())}', file=sys.stderr)
    return EXIT_USER
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
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


def _quiet_libraries() -> None:
  """Libraries below report through absl and warnings; what a user must know is said by us."""
  import logging
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  logging.getLogger('jax').setLevel(logging.ERROR)


def _positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise ValueError
  return value


class _Parser(argparse.ArgumentParser):
  """argparse whose errors are one line that names the nearest verb or option."""

  def error(self, message: str):
    raise UserError(f'{message} (see {self.prog} --help)')


def _wide(prog: str) -> argparse.HelpFormatter:
  return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110)


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='jaxmed', formatter_class=_wide,
                   description='Pretrains encoders for medical images of any number of channels.')
  parser.add_argument('--version', action='version', version=f'jaxmed {__version__}')
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')
  for name, (does, example) in VERBS.items():
    verb = verbs.add_parser(name, help=does, description=does[0].upper() + does[1:] + '.',
                            epilog=f'example:\n  {example}', formatter_class=_wide)
    _OPTIONS[name](verb)
    verb.add_argument('--json', action='store_true', help='print one JSON object on stdout')
  return parser


def _parse(argv: list[str]) -> argparse.Namespace:
  """argparse gives a list of words up at the first option; here they may stand on both sides of it."""
  args, rest = _parser().parse_known_args(argv)
  if args.verb in ('train', 'compare', 'curate', 'launch', 'plan'):
    args.words += [word for word in rest if not word.startswith('-')]
    rest = [word for word in rest if word.startswith('-')]
  if rest:
    raise UserError(f'{args.verb} does not know {" ".join(rest)} (see jaxmed {args.verb} --help)')
  return args


def _prepare(p: argparse.ArgumentParser) -> None:
  p.add_argument('inputs', nargs='+', metavar='FOLDER', help="folders or files; the word 'demo' for the demo corpus, "
                 "'synthetic' for one that is generated (--seed)")
  p.add_argument('--out', required=True, help='the corpus to write')
  p.add_argument('--table', help='CSV or Parquet with a column path, and subject, split, source, labels ...')
  p.add_argument('--labels-from-folders', action='store_true', help="each file's folder is its label")
  p.add_argument('--layout', default='auto', help='of a published benchmark, which says channels, labels and splits: '
                 'jumpcp, chammi, so2sat, brats; auto by default, none to ignore it')
  p.add_argument('--subject-pattern', help='regular expression whose first group in the path is the subject')
  p.add_argument('--channels', help='names of the channels, comma-separated')
  p.add_argument('--volumes', choices=('slices', 'whole'), default='slices', help='cut volumes into slices or not')
  p.add_argument('--plane', choices=('axial', 'acquired'), default='axial', help='which slices of a volume: axial, or '
                 'across its coarsest spacing')
  p.add_argument('--spacing', metavar='MM', help='bring images and volumes to this spacing: 1, or 3,1,1 along z, y, x')
  p.add_argument('--crop', choices=('none', 'foreground'), default='none', help='keep the box around what is not '
                 'background')
  p.add_argument('--margin', type=int, default=4, help='of the crop, in pixels')
  p.add_argument('--min-content', type=float, default=0.0, help='leave images and slices out of whose pixels a smaller '
                 'share is not background')
  p.add_argument('--splits', default='0.8,0.1,0.1', help='shares of train, val, test (by subject)')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--max-bad', type=float, default=0.0, help='share of unreadable files that is put up with')
  p.add_argument('--overwrite', action='store_true', help='replace an existing corpus')
  p.add_argument('--workers', type=_positive, help='processes that read; all cores by default')
  p.add_argument('--scheduler', metavar='ADDRESS', help='let the workers of a Dask scheduler read instead')
  p.add_argument('--slurm', metavar='JOBS', type=_positive, help='let so many SLURM jobs read instead')
  p.add_argument('--cores', type=_positive, default=4, help='of a SLURM job, and processes in it')
  p.add_argument('--memory', default='16GB', help='of a SLURM job')
  p.add_argument('--time', default='12:00:00', help='limit of a SLURM job')
  p.add_argument('--partition', default='', help='of SLURM')
  p.add_argument('--account', default='', help='of SLURM')
  p.add_argument('--sbatch', action='append', default=[], metavar='OPTION', help='a further option of sbatch')
  p.add_argument('--dry-run', action='store_true', help='read headers only, show what would be done, write nothing')
  p.add_argument('--salt', default=os.environ.get('JAXMED_SALT', ''), help="secret for the hashes of patients' "
                 'identifiers in DICOM; the variable JAXMED_SALT by default')
  p.add_argument('--slides', choices=('auto', 'tiles'), default='auto', help='cut every TIFF into tiles, or only large '
                 'ones with a pyramid')
  p.add_argument('--mpp', type=float, default=0.5, help="microns per pixel of a slide's tiles")
  p.add_argument('--tile', type=_positive, default=256, help='pixels along the side of a tile')
  p.add_argument('--every', type=float, default=1.0, help='seconds between the frames taken from a video')


def _curate(p: argparse.ArgumentParser) -> None:
  p.add_argument('corpus', metavar='CORPUS', help='a corpus, or a selection of one: CORPUS@NAME')
  p.add_argument('words', nargs='*', metavar='key=value', help='hash.radius=4, quality.blur=0.2 ... (see '
                 'jaxmed/data/curate/curate.py)')
  p.add_argument('--out', metavar='NAME', help='the selection to write; train on it with --data CORPUS@NAME')
  p.add_argument('--methods', help='in this order, comma-separated: quality, hash, ssim, mutual_information, entropy, '
                 'embedding, semdedup, balance; hash by default')
  p.add_argument('--scope', default='all', help='where near-duplicates are sought: volume (records of one file) or all')
  p.add_argument('--split', default='train', help='which records are judged, the others stay: train, val, test or all')
  p.add_argument('--encoder', metavar='RUN|FILE', help='embeds the records for the methods that need features')
  p.add_argument('--features', metavar='FILE.npz', help='of jaxmed embed instead; comma-separated for --against too')
  p.add_argument('--against', metavar='CORPUS', help='evaluation sets, comma-separated: looks for the same files, '
                 'subjects, images; leakage.csv beside the selections lists them')
  p.add_argument('--drop-leaks', action='store_true', help='leave these records out of the selection')
  p.add_argument('--strict', action='store_true', help='exit code 2 where there are leaks')
  p.add_argument('--seed', type=int, default=0)
  p.add_argument('--overwrite', action='store_true', help='replace a selection of that name')


def _train(p: argparse.ArgumentParser) -> None:
  p.add_argument('words', nargs='*', metavar='CONFIG key=value', help='a config file and overrides')
  p.add_argument('--data', help='a corpus, or a folder of images that is prepared first')
  p.add_argument('--out', help='the run directory to make')
  p.add_argument('--resume', metavar='RUN', help='go on with a run')
  p.add_argument('--auto-resume', action='store_true', help='start, or go on where --out RUN is there already: one '
                 'command for every start of a job')


def _launch(p: argparse.ArgumentParser) -> None:
  from jaxmed.launch import options
  p.add_argument('launcher', metavar='LAUNCHER', help=', '.join(options.LAUNCHERS))
  p.add_argument('words', nargs='*', metavar='CONFIG key=value', help='a config file and overrides')
  p.add_argument('--data', required=True, help='a corpus')
  p.add_argument('--out', required=True, metavar='RUN', help='the run directory, which all machines must share; the '
                 "launcher's own files are in RUN.launch")
  p.add_argument('--dry-run', action='store_true', help='show the script or manifest and do nothing')
  options.add(p)


def _run(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='RUN', help='what --out was')


def _compare(p: argparse.ArgumentParser) -> None:
  p.add_argument('words', nargs='*', metavar='key=value',
                 help='config values for all methods, or METHOD:key=value for one')
  p.add_argument('--data', required=True, help='a corpus with labels and splits')
  p.add_argument('--methods', required=True, help='names, comma-separated (see jaxmed list)')
  p.add_argument('--model', required=True, help='for example channel_vit_micro/16')
  p.add_argument('--label', required=True, metavar='COLUMN', help='column of the manifest to judge by')
  p.add_argument('--out', required=True, help='folder of the runs, compare.md, compare.json and compare.png')
  p.add_argument('--samples', type=_positive, default=20_000, help='images that each run sees')
  p.add_argument('--seeds', type=_positive, default=3, help='runs a method')


def _which(p: argparse.ArgumentParser, what: str = 'a run or an exported file') -> None:
  p.add_argument('path', metavar='RUN|FILE', help=what)
  p.add_argument('--checkpoint', default='latest', help='of a run: latest, best or a step')


def _unseen(p: argparse.ArgumentParser) -> None:
  p.add_argument('--unseen', choices=('error', 'allow'), default='error', help='channels that the encoder was not '
                 'trained on: an error, or what hashed embeddings make of their names (a table: the mean of its rows)')


def _evaluate(p: argparse.ArgumentParser) -> None:
  _which(p)
  _unseen(p)
  p.add_argument('--data', required=True, help='a corpus with labels and splits')
  p.add_argument('--label', required=True, metavar='COLUMN', help='column of the manifest')
  p.add_argument('--where', default='', metavar='COLUMN=A,B', help='judge the rows with these values alone')
  p.add_argument('--out', help='file for the results; in a run also RUN/evaluation.json and the report')
  p.add_argument('--feature', choices=('cls', 'mean'), help='the vector to judge; the method\'s own by default')
  p.add_argument('--channels', metavar='all', help='all: judge test images that show each subset of their channels')
  p.add_argument('--subsets', type=_positive, default=255, help='how many subsets at most; beyond it a random sample')
  p.add_argument('--beside', metavar='RUN|FILE', help='with --channels: another encoder, side by side')
  p.add_argument('--batch-size', type=_positive, default=64)
  p.add_argument('--seed', type=int, default=0)


def _embed(p: argparse.ArgumentParser) -> None:
  _which(p)
  _unseen(p)
  p.add_argument('--data', required=True, help='a folder of images or a corpus')
  p.add_argument('--out', required=True, metavar='FILE.npz', help='features [N, D] float32 and id [N]')
  p.add_argument('--feature', choices=('cls', 'mean', 'map'), help='map: of each patch, [N, *grid, D], the mean over '
                 'channels')
  p.add_argument('--split', help='of a corpus: only this split')
  p.add_argument('--channels', help='names of the channels of a folder, comma-separated')
  p.add_argument('--batch-size', type=_positive, default=64)


def _export(p: argparse.ArgumentParser) -> None:
  _which(p)
  p.add_argument('--format', required=True, help='timm, channelvit or jaxmed')
  p.add_argument('--out', required=True, metavar='FILE.safetensors')


def _shrink(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='RUN', help='trained with encoder.channel_embedding=hashed encoder.hash_draw=True')
  p.add_argument('--data', required=True, help='the corpus, whose val split judges')
  p.add_argument('--out', required=True, metavar='FILE.safetensors')
  p.add_argument('--rounds', type=_positive, default=30, help='generations of 20 candidates')
  p.add_argument('--rows', type=_positive, default=256, help='held-out rows that a candidate is judged on')
  p.add_argument('--seed', type=int, default=0)


def _import(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='FILE', help='weights of a PyTorch model: safetensors, or .pth, .pt, .bin, .ckpt, of '
                 'which nothing is executed')
  p.add_argument('--format', help='timm or channelvit; told by the tensors by default')
  p.add_argument('--out', required=True, metavar='FILE.safetensors')
  p.add_argument('--num-heads', type=int, help='attention heads; width / 64 by default')
  p.add_argument('--image-size', type=int, nargs='+', help='native size; square by default')
  p.add_argument('--channels', help='names of the input channels, comma-separated')
  p.add_argument('--inflate', help='make it a model of --channels, which may be more or others: name (what has the '
                 'name of a known channel keeps its weights, the rest gets the mean), mean or repeat')
  p.add_argument('--to', help='make a vit a channel_vit, or the other way round as far as that is linear')


def _report(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='RUN')


def _demo_data(p: argparse.ArgumentParser) -> None:
  p.add_argument('path', metavar='FOLDER')


def _plan(p: argparse.ArgumentParser) -> None:
  p.add_argument('words', nargs='*', metavar='CONFIG key=value', help='a config file and overrides')
  p.add_argument('--topology', required=True, metavar='CHIP:SIZE',
                 help='v4:4x4x8, v5e:16x16, v5p:8x8x8, v6e:16x16, two slices v5e:16x16*2; a100:16, h100:64, h200:64')
  p.add_argument('--slices', type=_positive, default=1, help='slices of that size')
  p.add_argument('--channels', type=_positive, default=3, help='of an image')
  p.add_argument('--rows', type=_positive, default=1_000_000, help='images of the corpus')
  p.add_argument('--search', action='store_true', help='try meshes, batches and rematerialisation')
  p.add_argument('--compile', type=int, default=3, metavar='N', help='of a search: how many of the best to compile')
  p.add_argument('--hlo', metavar='FILE', help='write the optimised program')


def _doctor(p: argparse.ArgumentParser) -> None:
  p.add_argument('--data', help='a corpus: measure how fast it is read, and what is in the way')
  p.add_argument('--size', type=_positive, nargs='+', help='image_size of the run that is meant; with --data')
  p.add_argument('--fit', choices=('resize', 'crop'), default='resize', help='loader.fit of that run')
  p.add_argument('--batch', type=_positive, default=64, help='its batch_size')
  p.add_argument('--seconds', type=float, default=1.0, help='for each measurement')


def _nothing(p: argparse.ArgumentParser) -> None:
  del p


_OPTIONS: dict[str, Callable[[Any], None]] = {
    'prepare': _prepare, 'curate': _curate, 'train': _train, 'launch': _launch, 'status': _run, 'stop': _run,
    'compare': _compare,
    'evaluate': _evaluate, 'embed': _embed, 'export': _export, 'shrink': _shrink,
    'import': _import, 'report': _report,
    'demo-data': _demo_data, 'list': _nothing, 'plan': _plan,
    'doctor': _doctor,
}


if __name__ == '__main__':
  sys.exit(main())
