"""`jaxmed prepare`: from folders to a corpus."""

import argparse
import os
import sys
from typing import Any

from jaxmed.cli.common import names, positive
from jaxmed.data.corpus import operations
from jaxmed.errors import Stopped, UserError

DOES = 'turn folders of images into a corpus'
EXAMPLE = 'jaxmed prepare scans/ --out corpus'
GENERATED = ('subjects', 'size', 'modality', 'videos', 'frames', 'looks', 'masks', 'images', 'mixing', 'variants')


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('inputs', nargs='+', metavar='FOLDER', help='folders or files, or a word: demo, synthetic, phantoms, '
                 'surgery, one_image, tissue, regions, nuclei, nuclei3d')
  p.add_argument('--out', required=True, metavar='CORPUS', help='corpus to write')
  p.add_argument('--overwrite', action='store_true', help='replace an existing corpus')
  p.add_argument('--dry-run', action='store_true', help='read headers only, show the plan, write nothing')
  p.add_argument('--max-bad', type=float, default=0.0, help='fraction of unreadable files to tolerate; default 0')
  p.add_argument('--workers', type=positive, help='processes that read; default: all cores')
  _add_records(p.add_argument_group('records'))
  _add_pixels(p.add_argument_group('pixels'))
  _add_generators(p.add_argument_group('generators'))
  _add_jobs(p.add_argument_group('cluster'))


def _add_records(p: Any) -> None:
  p.add_argument('--table', metavar='FILE', help='CSV or Parquet file with a column path, and subject, split, source, '
                 'labels')
  p.add_argument('--labels-from-folders', action='store_true', help="use the name of each file's folder as its label")
  p.add_argument('--layout', default='auto', help='layout of a published data set, with its channels, labels and '
                 'splits: jumpcp, chammi, so2sat, brats, nnunet, totalsegmentator, bids, mimic, openi, roco, quilt, '
                 'ptbxl, mmeb, webdataset, and of videos cholec80, cholecseg8k, cholect45, endoscapes, autolaparo, '
                 'm2cai16, heichole, pitvis, ophnet, surgtoolloc, endovis17, endovis18, hsdb, or4d; default auto, none '
                 'ignores it')
  p.add_argument('--labels', metavar='NAMES', help='JSON file with the names of the values of masks')
  p.add_argument('--subject-pattern', metavar='REGEX', help='regular expression whose first group in the path is the '
                 'subject')
  p.add_argument('--channels', metavar='NAMES', help='names of the channels, comma-separated')
  p.add_argument('--splits', default='0.8,0.1,0.1', help='fractions of train, val, test by subject; default '
                 '0.8,0.1,0.1')
  p.add_argument('--seed', type=int, default=0, help='seed of the splits; default 0')
  p.add_argument('--salt', default=os.environ.get('JAXMED_SALT', ''), help="secret for the hashes of patients' "
                 'identifiers in DICOM; default: the variable JAXMED_SALT')


def _add_pixels(p: Any) -> None:
  p.add_argument('--volumes', choices=('slices', 'whole'), default='slices', help='form of a volume in the corpus; '
                 'default slices')
  p.add_argument('--plane', choices=('axial', 'acquired'), default='axial', help='plane of the slices; acquired is '
                 'across the coarsest spacing; default axial')
  p.add_argument('--spacing', metavar='MM', help='spacing to resample to: 1, or 3,1,1 along z, y, x')
  p.add_argument('--crop', choices=('none', 'foreground'), default='none', help='crop to the box around the '
                 'foreground; default none')
  p.add_argument('--margin', type=int, default=4, help='margin of the crop in pixels; default 4')
  p.add_argument('--min-content', type=float, default=0.0, help='smallest fraction of foreground of an image or slice '
                 'to keep; default 0')
  p.add_argument('--nan', choices=('refuse', '0', 'mean'), default='refuse', help='pixels that are NaN or infinite: '
                 'refuse the file, or fill them with 0 or the mean of the channel; default refuse')
  p.add_argument('--signals', default='', metavar='STEPS', help='what is done to signals: resample:HZ, baseline, '
                 'band:LOW:HIGH, notch:HZ, zscore, range, comma-separated in their order')
  p.add_argument('--slides', choices=('auto', 'tiles'), default='auto', help='TIFF files to cut into tiles: all, or '
                 '(auto, the default) large ones with a pyramid')
  p.add_argument('--mpp', type=float, default=0.5, help="microns per pixel of a slide's tiles; default 0.5")
  p.add_argument('--tile', type=positive, default=256, help='side of a tile in pixels; default 256')
  p.add_argument('--every', type=float, default=1.0, help='seconds between two frames of a video; default 1')


def _add_generators(p: Any) -> None:
  p.add_argument('--subjects', type=positive, metavar='N', help='number of phantoms; default 20')
  p.add_argument('--size', type=positive, metavar='N', help='pixels of a side; default 64')
  p.add_argument('--modality', metavar='NAME', help='of phantoms: ct or mr, of the same anatomies; default ct')
  p.add_argument('--videos', type=positive, metavar='N', help='of surgery: number of videos; default 12')
  p.add_argument('--frames', type=positive, metavar='T', help='of surgery: frames of a video, one a second; default 64')
  p.add_argument('--looks', type=positive, metavar='K', help='of surgery: procedures that differ in workflow and '
                 'appearance; default 1')
  p.add_argument('--masks', metavar='NAME', help='of surgery: classes, or instrument against everything else; default '
                 'classes')
  p.add_argument('--images', type=positive, metavar='N', help='of one_image: number of images; default 1000')
  p.add_argument('--mixing', metavar='SET', help='of one_image: operations of the chains, none, I, II, III or IV; '
                 'default II')
  p.add_argument('--variants', type=positive, metavar='N', help='of one_image: variants of the background; default 50')


def _add_jobs(p: Any) -> None:
  p.add_argument('--scheduler', metavar='ADDRESS', help='Dask scheduler whose workers read')
  p.add_argument('--slurm', metavar='JOBS', type=positive, help='number of SLURM jobs that read')
  p.add_argument('--cores', type=positive, default=4, help='cores and processes of a SLURM job; default 4')
  p.add_argument('--memory', default='16GB', help='memory of a SLURM job; default 16GB')
  p.add_argument('--time', default='12:00:00', help='time limit of a SLURM job; default 12:00:00')
  p.add_argument('--partition', default='', help='SLURM partition')
  p.add_argument('--account', default='', help='SLURM account')
  p.add_argument('--sbatch', action='append', default=[], metavar='OPTION', help='another option of sbatch; may be '
                 'repeated')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Turns folders into a corpus, or says what would come out."""
  from jaxmed.data.prepare.prepare import prepare
  from jaxmed.data.prepare.survey import survey
  from jaxmed.parallel.devices import cores
  try:
    splits = tuple(float(s) for s in args.splits.split(','))
  except ValueError as e:
    raise UserError(f'--splits {args.splits} must be three numbers, for example 0.8,0.1,0.1') from e
  options = dict(table=args.table, labels_from_folders=args.labels_from_folders, subject_pattern=args.subject_pattern,
                 channels=names(args.channels), volumes=args.volumes, splits=splits, seed=args.seed, salt=args.salt,
                 slides=args.slides, mpp=args.mpp, tile=args.tile, every=args.every, plane=args.plane,
                 spacing=_spacing(args.spacing), crop=args.crop, margin=args.margin, min_content=args.min_content,
                 layout=args.layout, nan=args.nan, labels=args.labels, signals=args.signals)
  options |= {k: v for k in GENERATED if (v := getattr(args, k)) is not None}
  if args.dry_run:
    return _surveyed(survey(args.inputs, args.out, **options), args.min_content)
  try:
    summary = prepare(
        args.inputs, args.out, max_bad=args.max_bad, overwrite=args.overwrite, progress=sys.stderr.isatty(),
        workers=args.workers or cores(), scheduler=_scheduler(args), **options)
  except (KeyboardInterrupt, Stopped) as e:
    by = 'SIGTERM' if isinstance(e, Stopped) else 'Ctrl-C'
    raise Stopped(f'{by}; what is done is kept in {args.out}.part: the same command goes on there') from e
  return {'json': summary, 'text': _told(summary, args.out, bool(args.salt))}


def _told(summary: dict[str, Any], out: str, salted: bool) -> str:
  """The text of a corpus that was written."""
  shares = ', '.join(f'{k} {v["records"]}' for k, v in summary['splits'].items())
  text = (f'{summary["records"]} records of {summary["subjects"]} subjects ({shares}) in {out}\n'
          f'channels: {", ".join(summary["channels"])}; {summary["rejected"]} files rejected, '
          f'{summary["ignored"] + summary["empty"]} ignored\ncard: {out}/card.md')
  if summary['filled']:
    text += f"\n{summary['filled']:,} pixels were NaN or infinite and were filled (column nan_filled)"
  text += ''.join(f'\n{line}' for line in operations.told(summary['operations']))
  if summary['groups'] and not salted:
    text += "\npatients are hashed without a salt, so who knows an identifier can look for it: --salt SECRET"
  return text


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
