"""`jaxmed list`: names that a config or a command can take, and the options behind them."""

import argparse
import ast
import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

from jaxmed.errors import UserError, choose

DOES = 'show methods, models, adapters, protocols, evaluators, formats, recipes, studies and transfers'
EXAMPLE = 'jaxmed list methods mae'
KINDS = ('methods', 'models', 'adapters', 'protocols', 'evaluators', 'formats', 'recipes', 'studies',
         'transfers')
_WIDTH, _COLUMN = 100, 27


def options(p: argparse.ArgumentParser) -> None:
  """Adds the options of the verb."""
  p.add_argument('kind', nargs='?', metavar='KIND', help=f'{", ".join(KINDS)}; default: all')
  p.add_argument('name', nargs='?', metavar='NAME', help='method, model, protocol, recipe, study or transfer to '
                 'explain: options with defaults, or its text')


def run(args: argparse.Namespace) -> dict[str, Any]:
  """Lists names, or explains one."""
  if args.kind is not None:
    choose('kind', args.kind, KINDS)
  if args.name is not None:
    explain = {'methods': method, 'models': model, 'protocols': protocol, 'recipes': recipe,
               'studies': recipe, 'transfers': recipe}.get(args.kind)
    if explain is None:
      raise UserError(f'{args.kind} have no options: leave {args.name!r} out')
    out = explain(args.name)
    return {'json': out, 'text': explained(out)}
  listing = {'methods': methods, 'models': models, 'adapters': adapters, 'protocols': protocols,
             'evaluators': evaluators, 'formats': formats, 'recipes': recipes, 'studies': studies,
             'transfers': transfers}
  out = {kind: listing[kind]() for kind in KINDS if args.kind in (None, kind)}
  return {'json': out, 'text': '\n'.join(_titled(*item) for item in out.items())}


def _titled(title: str, entries: Any) -> str:
  if isinstance(entries, Mapping):
    wide = max(22, *map(len, entries))
    rows = [f'  {name:{wide}} {text}'.rstrip() for name, text in entries.items()]
  else:
    rows = textwrap.wrap(', '.join(entries), _WIDTH, initial_indent='  ', subsequent_indent='  ')
  return '\n'.join([f'{title}:', *rows])


def methods() -> dict[str, str]:
  """The first line about each method."""
  import sys

  from jaxmed import objectives
  return {name: _first(sys.modules[cls.__module__].__doc__) for name, cls in objectives.METHODS.items()}


def models() -> list[str]:
  """Names of models, without a patch; those of texts and tables last."""
  from jaxmed.models import list_models
  from jaxmed.models.signals import registry as signals
  from jaxmed.models.text import registry as texts
  return [*list_models(), *texts.MODELS, *signals.TABLES]


def adapters() -> dict[str, str]:
  """What each kind of adapters is, and the keys of `adapter` that it takes."""
  from jaxmed.models.layers import adapters
  return {name: f'{adapters.ABOUT[name]} ({", ".join(keys)})' for name, keys in adapters.KINDS.items()}


def protocols() -> dict[str, str]:
  """What each protocol asks of an encoder."""
  from jaxmed.evaluate.protocols import PROTOCOLS
  return {name: p.task for name, p in PROTOCOLS.items()}


def evaluators() -> dict[str, str]:
  """The first line about each evaluator."""
  from jaxmed.train.evaluators import EVALUATORS
  return {name: _first(cls.__doc__) for name, cls in EVALUATORS.items()}


def formats() -> dict[str, str]:
  """Weight formats of export and import."""
  from jaxmed.interop.weight_formats import FORMATS
  return {name: f.about for name, f in FORMATS.items()}


def recipes() -> dict[str, str]:
  """The first line and the variants of each recipe."""
  from jaxmed import config
  return _files(config.recipes())


def studies() -> dict[str, str]:
  """The same of each study."""
  from jaxmed import config
  return _files(config.studies())


def transfers() -> dict[str, str]:
  """The same of each transfer benchmark."""
  from jaxmed import config
  return _files(config.transfers())


def _files(known: Mapping[str, pathlib.Path]) -> dict[str, str]:
  from jaxmed import config
  out = {}
  for name, path in known.items():
    variants = config.variants(str(path))
    out[name] = _first(_docstring(path)) + (f' [:{" :".join(variants)}]' if variants else '')
  return out


def method(name: str) -> dict[str, Any]:
  """A method: its text, its options and what it sets in other sections."""
  from jaxmed import config, docstrings, objectives
  cls = objectives.get(name)
  return {'name': name, 'section': 'objective', 'about': docstrings.summary(cls), 'feature': cls.FEATURE,
          'options': _options(cls, objectives.default_options(name)),
          'defaults': config.flat(config.from_dict(cls.DEFAULTS))}


def model(name: str) -> dict[str, Any]:
  """A model by a family, a size of it, or its full name: its text and its options."""
  from jaxmed import docstrings
  from jaxmed.models import registry
  from jaxmed.models.signals import registry as signals
  from jaxmed.models.signals import table
  from jaxmed.models.text import registry as texts
  if name in signals.TABLES:
    return {'name': name, 'section': 'towers.table.options', 'about': docstrings.summary(table.TableEncoder),
            'options': _options(table.TableEncoder, signals.table_options(name))}
  base = name.partition('/')[0]
  of = texts if base in {*texts.MODELS, *texts.FAMILIES} else registry
  full = next((m for m, (family, _) in of.MODELS.items() if family == base), base)
  every = [*registry.MODELS, *registry.FAMILIES, *texts.MODELS, *signals.TABLES]
  family, sizes = of.MODELS[choose('model', full, every)]
  cls = of.FAMILIES[family]
  fields = of.family_options(family) | (sizes if full == base else {})
  section = 'towers.text.options' if of is texts else 'encoder'
  return {'name': name, 'section': section, 'about': docstrings.summary(cls),
          'options': _options(cls, fields, of.CHOICES)}


def protocol(name: str) -> dict[str, Any]:
  """A protocol: its text and its options."""
  from jaxmed import docstrings
  from jaxmed.evaluate import protocols
  chosen = protocols.PROTOCOLS[choose('protocol', name, protocols.PROTOCOLS)]
  return {'name': name, 'section': name, 'about': docstrings.summary(type(chosen)),
          'options': _options(type(chosen), {f.name: getattr(chosen, f.name) for f in protocols.fields(name)})}


def recipe(name: str) -> dict[str, Any]:
  """A recipe or a study: its text and its variants."""
  from jaxmed import config
  path = config.find(name)
  return {'name': name, 'about': _docstring(path), 'variants': list(config.variants(str(path)))}


def _options(cls: Any, defaults: Mapping[str, Any], choices: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """{name: {'default', 'meaning', 'choices'}} of a class."""
  from jaxmed import docstrings
  meanings = docstrings.meanings(cls)
  return {name: {'default': value, 'meaning': meanings[name], 'choices': list((choices or {}).get(name, ()))}
          for name, value in defaults.items()}


def explained(out: Mapping[str, Any]) -> str:
  """The text of one method, model or recipe."""
  from jaxmed import config
  lines = [f'{out["name"]}:', textwrap.indent(out['about'], '  ')]
  if out.get('options'):
    lines += ['', f'{out["section"]}.*:']
  for name, option in out.get('options', {}).items():
    choices = f' ({" | ".join(option["choices"])})' if option['choices'] else ''
    lines += config.entry(f'  {name}={config.shown(option["default"])}', option['meaning'] + choices, _WIDTH, _COLUMN)
  if out.get('defaults'):
    lines += ['', 'sets where you do not:',
              *(f'  {key}={config.shown(value)}' for key, value in out['defaults'].items())]
  if out.get('feature'):
    lines += ['', f'feature: {out["feature"]}']
  if out.get('variants'):
    lines += ['', 'variants: ' + ', '.join(f':{v}' for v in out['variants'])]
  return '\n'.join(lines)


def _first(text: str | None) -> str:
  return (text or '').strip().split('\n')[0]


def _docstring(path: pathlib.Path) -> str:
  return ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
