"""What each verb of the command does: it calls the rooms and returns {'json': ..., 'text': ...} to print."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxmed import __version__, files
from jaxmed.errors import EXIT_USER, Stopped, UserError, choose

EXTRAS = {'cluster': ('distributed', 'dask_jobqueue'), 'curate': ('faiss',), 'demo': ('nilearn', 'skimage'),
          'microscopes': ('nd2',), 'parity': ('torch', 'timm'), 'tpu-plan': ('libtpu',)}
EXPORT_TOLERANCE = 1e-4  # largest difference of a float32 feature that `export` accepts


def prepare(args: argparse.Namespace) -> dict[str, Any]:
  """Turns folders into a corpus, or says what would come out."""
  from jaxmed.data.prepare.prepare import prepare as run
  from jaxmed.data.prepare.survey import survey
  from jaxmed.parallel.devices import cores
  try:
    splits = tuple(float(s) for s in args.splits.split(','))
  except ValueError as e:
    raise UserError(f'--splits {args.splits} must be three numbers, for example 0.8,0.1,0.1') from e
  options = dict(table=args.table, labels_from_folders=args.labels_from_folders, subject_pattern=args.subject_pattern,
                 channels=_names(args.channels), volumes=args.volumes, splits=splits, seed=args.seed, salt=args.salt,
                 slides=args.slides, mpp=args.mpp, tile=args.tile, every=args.every, plane=args.plane,
                 spacing=_spacing(args.spacing), crop=args.crop, margin=args.margin, min_content=args.min_content,
                 layout=args.layout)
  if args.dry_run:
    return _surveyed(survey(args.inputs, args.out, **options), args.min_content)
  try:
    summary = run(args.inputs, args.out, max_bad=args.max_bad, overwrite=args.overwrite, progress=sys.stderr.isatty(),
                  workers=args.workers or cores(), scheduler=_scheduler(args), **options)
  except (KeyboardInterrupt, Stopped) as e:
    by = 'SIGTERM' if isinstance(e, Stopped) else 'Ctrl-C'
    raise Stopped(f'{by}; what is done is kept in {args.out}.part: the same command goes on there') from e
  shares = ', '.join(f'{k} {v["records"]}' for k, v in summary['splits'].items())
  text = (f'{summary["records"]} records of {summary["subjects"]} subjects ({shares}) in {args.out}\n'
          f'channels: {", ".join(summary["channels"])}; {summary["rejected"]} files rejected, '
          f'{summary["ignored"] + summary["empty"]} ignored\ncard: {args.out}/card.md')
  if summary['groups'] and not args.salt:
    text += "\npatients are hashed without a salt, so who knows an identifier can look for it: --salt SECRET"
  return {'json': summary, 'text': text}


def _scheduler(args: argparse.Namespace) -> Any:
  """What `prepare` takes as scheduler."""
  from jaxmed.data.prepare.cluster import Slurm
  if args.slurm and args.scheduler:
    raise UserError('give --slurm or --scheduler, not both')
  return Slurm(args.slurm, args.cores, args.memory, args.time, args.partition, args.account, tuple(args.sbatch)
               ) if args.slurm else args.scheduler


def _spacing(text: str | None) -> tuple[float, ...] | None:
  try:
    return tuple(float(s) for s in text.split(',')) if text else None
  except ValueError as e:
    raise UserError(f'--spacing {text}: expected one number of mm, or three (z, y, x), for example 3,1,1') from e


def _surveyed(found: dict[str, Any], min_content: float) -> dict[str, Any]:
  """The text of a dry run."""
  untold = f', and those of {found["untold"]} items that are cropped before they are cut' if found['untold'] else ''
  before = ' before --min-content' if min_content else ''
  splits = ', '.join(f'{k} {v["items"]} ({v["subjects"]} subjects)' for k, v in found['splits'].items())
  lines = [', '.join(f'{n} {kind}' for kind, n in found['formats'].items()) or 'a corpus that comes with jaxmed',
           f'{found["items"]} items of {found["files"]} files ({found["groups"]} groups), '
           f'{found["bytes"] / 1e6:.1f} MB in {found["blocks"]} blocks',
           f'{found["subjects"]} subjects; items: {splits}', f'{found["records"]} records{before}{untold}',
           f'{len(found["rejects"])} files rejected already, {found["ignored"] + found["empty"]} ignored',
           *(f'  {path}: {reason}' for path, reason in found['rejects'][:20]), 'nothing was written']
  return {'json': found, 'text': '\n'.join(lines)}


def train(args: argparse.Namespace) -> dict[str, Any]:
  """Starts a run, or goes on with one."""
  from jaxmed import config
  from jaxmed.train import loop
  words = list(args.words)
  user: dict[str, Any] = {}
  if words and '=' not in words[0]:
    user = config.load_file(words.pop(0))
  changes = config.parse_overrides(words)
  if args.data:
    changes['data'] = args.data
  if args.resume:
    if args.out or user or args.auto_resume:
      raise UserError('--resume RUN goes on with the config of the run: leave --out, --auto-resume and the config '
                      'file out')
    summary = loop.resume(args.resume, changes)
  elif args.auto_resume and args.out and (pathlib.Path(args.out) / 'config.json').is_file():
    # All processes look before they join each other, and only then does one of them write: they see the same.
    summary = _go_on(pathlib.Path(args.out), config.merge(user, changes))
  else:
    if not args.out:
      raise UserError('give --out RUN, the directory to make, or --resume RUN')
    user = config.merge(user, changes)
    loop.check_new(args.out)
    with _corpus(str(user.get('data', '')), pathlib.Path(args.out)) as corpus:
      summary = loop.train(user | {'data': corpus}, args.out)
  text = (f'{summary["steps"]} steps, loss {summary["loss"]:.4g}, {summary["images_per_second"]:.3g} images/s\n'
          f'run: {summary["run"]}\nreport: {summary["run"]}/report.html')
  return {'json': summary, 'text': text}


def _go_on(out: pathlib.Path, user: dict[str, Any]) -> dict[str, Any]:
  """Goes on with a run for the words that started it; another value than the run has must be one that may change."""
  from jaxmed import config
  from jaxmed.parallel import process
  from jaxmed.train import loop
  from jaxmed.train.build import setup
  process.start()
  before, spec = setup.load(out)
  if (out / 'corpus').exists():  # made from the folder that the words name
    user = user | {'data': before.data}
  wanted, have = config.flat(setup.resolve(user, spec)), config.flat(before)
  said = config.flat(config.from_dict(user))
  return loop.resume(out, config.nested({key: wanted[key] for key in said if wanted[key] != have.get(key)}))


def curate(args: argparse.Namespace) -> dict[str, Any]:
  """Selects records of a corpus, looks for those that an evaluation set holds too."""
  from jaxmed import config
  from jaxmed.data.curate import curate as run
  from jaxmed.data.curate.features import stored
  against = _names(args.against) or ()
  methods = _names(args.methods) or (('hash',) if args.out and not args.drop_leaks else ())
  paths = _names(args.features) or ()
  if len(paths) not in (0, 1, 1 + len(against)):
    raise UserError(f'--features takes one file for the corpus, or {1 + len(against)}: one for each --against too')
  request = run.Request(args.corpus, args.out or '', methods, config.parse_overrides(args.words), args.scope,
                        args.split, against=against, drop_leaks=args.drop_leaks, seed=args.seed,
                        overwrite=args.overwrite)
  run.check(request)
  given = _embedded(args.encoder, (args.corpus, *against)) if args.encoder else [stored(path) for path in paths]
  request = dataclasses.replace(request, features=given[0] if given else None, against_features=tuple(given[1:]))
  found = run.curate(request, progress=sys.stderr.isatty())
  leaking = any(leaks['leaks'] for leaks in found['leaks'])
  return {'json': found, 'text': run.text(found, args.out), 'code': EXIT_USER if args.strict and leaking else 0}


def _embedded(encoder: str, corpora: Iterable[str]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Features and ids of each corpus, by a run or an exported file."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.train.build.rundir import load
  loaded = load(encoder)
  return [(loaded.embed_source(source, 64)[loaded.feature], np.asarray(source.table.column('id').to_pylist()))
          for source in map(open_source, corpora)]


def launch(args: argparse.Namespace) -> dict[str, Any]:
  """Starts the training command on another system, or as several processes here."""
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.selection import split_uri
  from jaxmed.launch import control as run
  from jaxmed.launch import options
  chosen = options.of(args.launcher, args)
  data = split_uri(args.data)[0]
  if args.launcher in ('local', 'slurm') and data.exists() and not is_corpus(data):
    raise UserError(f'--data {data} is not a corpus: jaxmed prepare {data} --out CORPUS makes one, before many '
                    'processes read it')
  out = run.launch(args.launcher, args.words, args.data, args.out, chosen, args.dry_run)
  if args.dry_run:
    text = out['script'].rstrip('\n')
  elif 'code' in out:
    text = f'run: {args.out}\nlogs: {out["place"]}' + (f'\nended with exit code {out["code"]}' if out['code'] else '')
  else:
    text = (f'{args.launcher} job {out["job"]}: jaxmed status {args.out}, jaxmed stop {args.out}\n'
            f'script: {out["script"]}\nlog: {out["log"]}')
  return {'json': out, 'text': text, 'code': out.get('code', 0)}


def status(args: argparse.Namespace) -> dict[str, Any]:
  """What the system says of what was launched, and how far the run is."""
  from jaxmed.launch import control as run
  out = run.status(args.path)
  return {'json': out, 'text': f'{out["state"]}\n{out["progress"]}\nlog: {out["log"]}'}


def stop(args: argparse.Namespace) -> dict[str, Any]:
  """Lets what was launched save and end."""
  from jaxmed.launch import control as run
  out = run.stop(args.path)
  return {'json': out, 'text': out['stopped']}


def compare(args: argparse.Namespace) -> dict[str, Any]:
  """Trains several methods alike."""
  from jaxmed import config
  from jaxmed.study.compare import Plan, markdown
  from jaxmed.study.compare import compare as run
  own: dict[str, list[str]] = {}
  shared = []
  for word in args.words:
    method, colon, _ = word.partition('=')[0].partition(':')
    if colon:
      own.setdefault(method, []).append(word[len(method) + 1 :])
    else:
      shared.append(word)
  plan = Plan(args.data, _names(args.methods) or (), args.model, args.label, args.samples, args.seeds,
              config.parse_overrides(shared), {k: config.parse_overrides(v) for k, v in own.items()})
  whole = run(plan, args.out)
  return {'json': whole, 'text': f'{markdown(whole)}\nfigure: {args.out}/compare.png'}


@contextlib.contextmanager
def _corpus(data: str, run: pathlib.Path) -> Iterator[str]:
  """The corpus itself, or one prepared in the run directory from a folder of images.

  That one is removed when the run does not begin, so that the corrected command finds the place free.
  """
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.open import elsewhere
  from jaxmed.data.corpus.selection import split_uri
  if not data:
    raise UserError('nothing to train on: give --data with a corpus or a folder of images')
  if elsewhere(data):
    yield data
    return
  place, target = split_uri(data)[0], run / 'corpus'
  if not place.exists():
    raise UserError(f'{data} does not exist: expected a corpus or a folder of images')
  if is_corpus(place):
    yield data
    return
  if target.exists():
    raise UserError(f'{target} exists: give --data {target} to train on it, or remove it')
  from jaxmed.data.prepare.prepare import check_small
  from jaxmed.data.prepare.prepare import prepare as prepare_
  from jaxmed.parallel.devices import cores
  check_small(place)
  new = not run.exists()
  try:
    summary = prepare_([data], target, progress=sys.stderr.isatty(), workers=cores())
    print(f'prepared {summary["records"]} records of {data} in {target}', file=sys.stderr)
    yield str(target)
  finally:
    if not (run / 'config.json').exists():
      shutil.rmtree(run if new else target, ignore_errors=True)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
  """Judges frozen features."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed.sampling import parse_values
  from jaxmed.evaluate.protocols.classify import evaluate as run
  from jaxmed.evaluate.report import tables
  from jaxmed.evaluate.report.page import write_report
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  source = open_source(args.data).where(parse_values(args.where, '--where'))
  choose(f'column of {args.data}', args.label, source.table.column_names)
  encoder = _for_channels(load(args.path, args.checkpoint), args, source)
  if args.out:
    files.check_place(args.out)
  if args.channels:
    return _by_channels(args, encoder, source)
  result = run(encoder, source, args.label, untrained=encoder.untrained(args.seed),
               feature=args.feature or encoder.feature, batch_size=args.batch_size, seed=args.seed)
  if args.out:
    files.write_json(args.out, result)
  text = tables.text_table(result)
  if pathlib.Path(args.path).is_dir():
    files.write_json(pathlib.Path(args.path) / 'evaluation.json', result)
    text += f'\nreport: {write_report(args.path)}'
  return {'json': result, 'text': text}


def _for_channels(encoder: Any, args: argparse.Namespace, source: Any) -> Any:
  """The encoder for the channels of a source, also those that it was not trained on if --unseen=allow."""
  if args.unseen == 'error':
    return encoder
  fresh = [name for name in source.channels if name not in encoder.ids]
  if fresh:
    print(f'jaxmed: {args.path} was not trained on {", ".join(fresh)}', file=sys.stderr)
  return encoder.extended({name: source.stats[name] for name in fresh})


def _by_channels(args: argparse.Namespace, encoder: Any, source: Any) -> dict[str, Any]:
  """Judges frozen features of test images that show subsets of their channels, maybe of two encoders side by side."""
  from jaxmed.evaluate.protocols import channels
  from jaxmed.evaluate.report import figures
  from jaxmed.train.build.rundir import load
  choose('--channels', args.channels, ('all',))
  both = {args.path: encoder} | ({args.beside: _for_channels(load(args.beside), args, source)} if args.beside else {})
  results = {}
  for name, one in both.items():
    results[name] = channels.evaluate_channels(
        one, source, args.label, subsets=args.subsets, feature=args.feature or one.feature, batch_size=args.batch_size,
        seed=args.seed)
  text = channels.text_table(results)
  run = pathlib.Path(args.path)
  stem = pathlib.Path(args.out).with_suffix('') if args.out else run / 'channels' if run.is_dir() else None
  if stem is not None:
    files.write_json(stem.with_suffix('.json'), results)
    files.write_csv(stem.with_suffix('.csv'), channels.csv_rows(results))
    figures.channel_curves(results, stem.with_suffix('.png'))
    text += f'\ntable and plot: {stem}.json, .csv, .png'
  return {'json': results, 'text': text}


def embed(args: argparse.Namespace) -> dict[str, Any]:
  """Writes features of a corpus or a folder."""
  from jaxmed.data.corpus.corpus_format import is_corpus
  from jaxmed.data.corpus.open import open_source
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  encoder = load(args.path, args.checkpoint)
  files.check_place(args.out)
  feature = args.feature or encoder.feature
  with tempfile.TemporaryDirectory() as scratch:
    data = args.data
    if pathlib.Path(data).exists() and not is_corpus(data):
      from jaxmed.data.prepare.prepare import prepare as run
      data = str(pathlib.Path(scratch) / 'corpus')
      run([args.data], data, channels=_names(args.channels), splits=(1.0, 0.0, 0.0), progress=False)
    source = open_source(data)
    source = source.select(split=args.split) if args.split else source
    found = _for_channels(encoder, args, source).embed_source(source, args.batch_size, feature == 'map')
    if feature not in found:
      raise UserError(f'the encoder has no feature {feature!r}: choose one of {", ".join(found)}')
    ids = np.asarray(source.table.column('id').to_pylist())
    with files.writing(args.out) as part, open(part, 'wb') as f:
      np.savez(f, features=found[feature], id=ids)
  shape = list(found[feature].shape)
  return {'json': {'out': args.out, 'shape': shape, 'feature': feature},
          'text': f'features {shape} ({feature}) in {args.out}'}


def export(args: argparse.Namespace) -> dict[str, Any]:
  """Writes the encoder for PyTorch, reads it back, compares, and writes the card."""
  import jax

  from jaxmed.interop import verify
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.parallel import compilation
  from jaxmed.train.build.rundir import load
  compilation.keep()
  choose('format', args.format, layouts.FORMATS)
  encoder = load(args.path, args.checkpoint)
  model = encoder.model
  info = encoder.described
  layouts.export_file(args.out, args.format, model, encoder.params, info)
  image = jax.random.normal(jax.random.key(0), (2, *model.image_size, model.in_channels))
  difference = verify.verify_export(args.out, model, encoder.params, image)
  if not difference <= EXPORT_TOLERANCE:
    pathlib.Path(args.out).unlink()
    raise RuntimeError(f'{args.out} did not give the features of the model back: largest difference {difference}')
  run = pathlib.Path(args.path)
  read = lambda name: files.read_json(run / name) if run.is_dir() and (run / name).exists() else None
  result = read('evaluation.json')
  card = pathlib.Path(args.out).with_suffix('.md')
  files.write_text(card, verify.model_card(
      args.format, model, info, file=pathlib.Path(args.out).name, title=f'{info.get("model", "encoder")} by jaxmed',
      config=read('config.json'), data=(read('data.json') or {}).get('summary'),
      metrics=result['rows'] if result else (), difference=difference))
  return {'json': {'out': args.out, 'card': str(card), 'format': args.format, 'difference': difference},
          'text': f'{args.out} ({args.format}), read back with a largest difference of {difference:.2g}\ncard: {card}'}


def shrink(args: argparse.Namespace) -> dict[str, Any]:
  """Searches how few numbers the features of hashed channels need, and writes that encoder."""
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.models.layers import channel_embed
  from jaxmed.study import shrink as search
  files.check_place(args.out)
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  found = search.shrink(args.path, args.data, rounds=args.rounds, rows=args.rows, seed=args.seed, tell=tell)
  encoder = found.encoder
  layouts.export_file(args.out, 'jaxmed', encoder.model, encoder.params, encoder.described)
  result = {'out': args.out, 'widths': list(found.widths), 'numbers': found.numbers[0], 'of': found.numbers[1],
            'loss': found.loss[1], 'loss_before': found.loss[0], 'features': found.census}
  told = channel_embed.told(found.census, encoder.model.hash_width)
  return {'json': result, 'text': f'{args.out}: {told}\nheld-out loss {found.loss[1]:.6g}, '
          f'with all numbers {found.loss[0]:.6g}; to train with these widths: '
          f"'encoder.hash_widths={found.widths}' encoder.hash_draw=False"}


def import_(args: argparse.Namespace) -> dict[str, Any]:
  """Rewrites a PyTorch encoder as a file that `jaxmed.load` takes."""
  from jaxmed.interop import verify
  from jaxmed.interop import weight_formats as layouts
  from jaxmed.models import registry
  size = tuple(args.image_size) if args.image_size else None
  if size and len(size) == 1:
    size = size * 2
  model = layouts.import_file(args.path, args.format, args.out, args.num_heads, size, _names(args.channels),
                              args.inflate, args.to)
  about = registry.describe(model)
  return {'json': {'out': args.out, 'model': about},
          'text': f'{verify.architecture(model)}, {model.in_channels} channels in {args.out}'}


def report(args: argparse.Namespace) -> dict[str, Any]:
  """Writes the report of a run again."""
  from jaxmed.evaluate.report.page import write_report
  from jaxmed.train.build import setup
  setup.load(args.path)
  path = write_report(args.path)
  return {'json': {'report': str(path)}, 'text': str(path)}


def demo_data(args: argparse.Namespace) -> dict[str, Any]:
  """Writes sample files."""
  from jaxmed.data.prepare.demo import demo_files
  names = [str(p) for p in demo_files(args.path)]
  return {'json': {'files': names}, 'text': '\n'.join(names)}


def list_(args: argparse.Namespace) -> dict[str, Any]:
  """Methods, models, formats, recipes."""
  del args
  from jaxmed import config, objectives
  from jaxmed.interop.weight_formats import FORMATS
  from jaxmed.models import list_models
  first = lambda text: (text or '').strip().split('\n')[0]
  recipes = {}
  for p in sorted(pathlib.Path('experiments').rglob('*.py')):
    variants = config.variants(str(p))
    recipes[str(p)] = first(_docstring(p)) + (f' [:{" :".join(variants)}]' if variants else '')
  out: dict[str, Any] = {
      'methods': {name: first(sys.modules[cls.__module__].__doc__) for name, cls in objectives.METHODS.items()},
      'models': list_models(), 'formats': {name: f.about for name, f in FORMATS.items()}, 'recipes': recipes}
  lines = []
  for title, entries in out.items():
    lines.append(f'{title}:')
    lines += [f'  {k:22} {v}' for k, v in entries.items()] if isinstance(entries, Mapping) else [
        '  ' + ', '.join(entries)]
  return {'json': out, 'text': '\n'.join(lines)}


def _docstring(path: pathlib.Path) -> str:
  import ast
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''


def plan(args: argparse.Namespace) -> dict[str, Any]:
  """What a run takes on a cluster."""
  os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX starts: with libtpu installed it would look for a TPU
  from jaxmed import config
  from jaxmed.parallel import chips
  from jaxmed.plan import plan, search, tables
  words = list(args.words)
  user = config.load_file(words.pop(0)) if words and '=' not in words[0] else {}
  user = config.merge(user, config.parse_overrides(words))
  request = plan.Request(user, chips.parse(args.topology, args.slices), args.channels, args.rows)
  if args.search:
    found = search.search(request, args.compile)
    return {'json': found, 'text': tables.render_search(found)}
  made = plan.plan(request, args.hlo or '')
  return {'json': made, 'text': tables.render(made)}


def doctor(args: argparse.Namespace) -> dict[str, Any]:
  """Versions, devices, memory, disk, extras, advice; of a corpus, how fast it is read."""
  if args.data:
    return _rates(args)
  import jax
  import psutil

  from jaxmed.parallel import mesh as mesh_lib
  packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets', 'numpy')
  versions = {name: importlib.metadata.version(name) for name in packages}
  devices = jax.devices()
  memory, disk = psutil.virtual_memory(), shutil.disk_usage('.')
  missing = {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()}
  advice = [f"pip install 'jaxmed[{extra}]' adds {', '.join(m)}" for extra, m in missing.items() if m]
  if devices[0].platform == 'cpu':
    advice.append('no accelerator: models train with small defaults; pip install jax[cuda13] or jax[tpu] adds one')
  if disk.free < 5e9:
    advice.append(f'only {disk.free / 1e9:.1f} GB of disk are free here: checkpoints may not fit')
  out = {
      'jaxmed': __version__, 'python': platform.python_version(), 'versions': versions,
      'devices': [f'{d.platform}:{d.id} {d.device_kind}' for d in devices], 'processes': jax.process_count(),
      'mesh': dict(mesh_lib.make_mesh({'data': 0}).shape), 'memory_free_gb': round(memory.available / 1e9, 1),
      'memory_gb': round(memory.total / 1e9, 1), 'disk_free_gb': round(disk.free / 1e9, 1), 'advice': advice}
  stats = devices[0].memory_stats() if devices[0].platform != 'cpu' else None
  if stats:
    out['device_memory_gb'] = round(stats.get('bytes_limit', 0) / 1e9, 1)
  lines = [f'{k:16} ' + (', '.join(f'{a} {b}' for a, b in v.items()) if isinstance(v, Mapping)
                         else '; '.join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in out.items()]
  return {'json': out, 'text': '\n'.join(lines)}


def _rates(args: argparse.Namespace) -> dict[str, Any]:
  """How fast batches of a corpus can be had, as a run with these values would read them."""
  from jaxmed.data.corpus.open import open_source
  from jaxmed.data.feed import rates
  from jaxmed.train.build import setup
  if not args.seconds > 0:
    raise UserError(f'--seconds is {args.seconds}: expected a positive number')
  source = open_source(args.data)
  source = trained if len(trained := source.select('train')) else source
  spec = setup.data_spec(source, '')
  user = {'image_size': tuple(args.size or ()), 'loader': {'fit': args.fit}}
  config = setup.resolve(user, spec)
  found = rates.measure(source, size=tuple(config.loader.load_size), batch_size=args.batch, fit=args.fit,
                        threads=config.loader.threads, seconds=args.seconds)
  return {'json': found, 'text': rates.text(found)}


def _names(text: str | None) -> tuple[str, ...] | None:
  return tuple(n.strip() for n in text.split(',')) if text else None
