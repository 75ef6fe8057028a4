"""Writes the generated pages of docs/reference: commands, configuration, methods, models.

  python tools/reference.py           writes the pages
  python tools/reference.py --check   ends with 1 and names the pages that are stale

Needs `make install` alone.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jaxmed import cli, config, objectives  # noqa: E402
from jaxmed.cli import list_  # noqa: E402
from jaxmed.models import registry  # noqa: E402
from jaxmed.models.text import registry as texts  # noqa: E402
from tools.needs import run_script  # noqa: E402

PLACE = ROOT / 'docs' / 'reference'
NOTE = '<!-- Written by tools/reference.py: change the code, then run it again. -->'


def text(words: str) -> str:
  """Text of a docstring or a help as Markdown, outside of `code`."""
  parts = ' '.join(words.split()).split('`')
  for i in range(0, len(parts), 2):
    parts[i] = re.sub(r'([*\[\]|]|(?<!\w)_|_(?!\w))', r'\\\1', parts[i]).replace('<', '&lt;')
  return '`'.join(parts)


def code(words: str) -> str:
  """`words`, also in a cell of a table."""
  return '`' + words.replace('|', '\\|') + '`'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """A Markdown table and an empty line after it; nothing without rows."""
  lines = [f'| {" | ".join(row)} |' for row in rows]
  return [f'| {" | ".join(head)} |', '|' + '---|' * len(head), *lines, ''] if lines else []


def paragraphs(words: str) -> list[str]:
  """The paragraphs of a docstring."""
  return [line for block in words.split('\n\n') for line in (text(block), '')]


def page(title: str, *lines: str) -> str:
  return '\n'.join([f'# {title}', '', NOTE, '', *lines]).rstrip('\n') + '\n'


def commands() -> str:
  """Every verb with its options, and the exit codes."""
  parser = cli.parser()
  verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
  lines = ['`jaxmed VERB ...`, or `python -m jaxmed VERB ...`. `jaxmed VERB --help` shows the same.', '']
  link = lambda name: f'[`{name}`](#{name.replace(" ", "-")})'
  lines += table(('verb', 'what it does'), ((link(name), text(cli.VERBS[name].DOES)) for name in verbs))
  for name, verb in verbs.items():
    lines += [f'## {name}', '', text(verb.description), '', '```', cli.VERBS[name].EXAMPLE, '```', '']
    for title, actions in grouped(verb).items():
      lines += [f'Options of {text(title)}:', ''] if title else []
      lines += table(('option', 'meaning'), ((code(option(a)), text(a.help % vars(a))) for a in actions))
    if name == 'train':
      lines += ['The keys of a config are in the [configuration reference](config.md).', '']
  codes = ((str(number), text(meaning)) for number, meaning in sorted(cli.EXIT_CODES.items()))
  return page('Commands', *lines, '## Exit codes', '', *table(('code', 'meaning'), codes))


def grouped(verb: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
  """{title: options} of a verb; '' holds the words and the options of no group."""
  out: dict[str, list[argparse.Action]] = {}
  for group in verb._action_groups:
    title = '' if group.title in ('positional arguments', 'options') else str(group.title)
    out.setdefault(title, []).extend(a for a in group._group_actions if not isinstance(a, argparse._HelpAction))
  return out


def option(action: argparse.Action) -> str:
  """'--out RUN', 'CORPUS': an option as it is written."""
  value = action.metavar or ('|'.join(action.choices) if action.choices else action.dest.upper())
  if not action.option_strings:
    return str(value)
  return action.option_strings[-1] + ('' if action.nargs == 0 else f' {value}')


def configuration() -> str:
  """Every key by its section."""
  lines = ['A run is a config file and overrides `key=value`: `jaxmed train FILE.py key=value ...`. '
           '`jaxmed train --help` shows the same.', '']
  for section, keys in config.SECTIONS.items():
    lines += [f'## {section or "run"}', '']
    lines += table(('key', 'type', 'default', 'meaning'), (
        (code(f'{section}.{name}' if section else name), config.kind(key), code(config.default_of(key)),
         meaning(key.meaning, key.choices)) for name, key in keys.items()))
    marks = [f'\\[{mark}\\] {note}' for mark, note in config.NOTES.items()
             if any(f'[{mark}]' in key.meaning for key in keys.values())]
    lines += [line for mark in marks for line in (mark, '')]
  lines += ['## encoder', '', 'The options of the model: [models](models.md), or `jaxmed list models NAME`.', '',
            '## objective', '', 'The options of the method: [methods](methods.md), or `jaxmed list methods NAME`.']
  return page('Configuration', *lines)


def meaning(words: str, choices: Sequence[str]) -> str:
  named = ', '.join(code(c or "''") for c in choices)
  return text(words) + (f' ({named})' if named else '')


def options(section: str, entries: dict[str, Any]) -> list[str]:
  """The table of the options of a method or a model."""
  return table(('option', 'default', 'meaning'), (
      (code(f'{section}.{name}'), code(config.shown(o['default'])), meaning(o['meaning'], o['choices']))
      for name, o in entries.items()))


def methods() -> str:
  """Every method: what it is, its options, what it sets elsewhere, its recipes."""
  first, recipes = list_.methods(), recipes_by_method()
  lines = ['`method=NAME` chooses one; `jaxmed list methods NAME` shows the same.', '']
  lines += table(('method', 'what it is'), ((f'[`{name}`](#{name})', text(first[name])) for name in objectives.METHODS))
  for name in objectives.METHODS:
    known = list_.method(name)
    rate, batch = objectives.get(name).LEARNING_RATE
    lines += [f'## {name}', '', *paragraphs(known['about'])]
    lines += [f'Feature: `{known["feature"]}`. Peak learning rate: {rate:g} at a batch of {batch}, scaled by the '
              'square root of the batch.', '']
    lines += options('objective', known['options'])
    if known['defaults']:
      lines += ['It sets, where you do not:', '']
      lines += table(('key', 'value'), ((code(k), code(config.shown(v))) for k, v in known['defaults'].items()))
    named = ', '.join(f'[`{n}`](../../{n})' for n in recipes.get(name, ()))
    lines += [f'Recipes: {named}.', ''] if named else []
  return page('Methods', *lines)


def recipes_by_method() -> dict[str, list[str]]:
  """The recipes whose first variant trains a method."""
  out: dict[str, list[str]] = {}
  for path in sorted(p for p in (ROOT / config.RECIPES).rglob('*.py') if p.parent.name not in ('studies', 'transfer')):
    first = next(iter(config.variants(str(path))), '')
    values = config.load_file(f'{path}:{first}' if first else str(path))
    out.setdefault(values.get('method', 'mae'), []).append(path.relative_to(ROOT).as_posix())
  return out


def models() -> str:
  """Every family: what it is, its sizes, its options."""
  lines = ['`model=NAME/PATCH` chooses a transformer, `model=NAME` a convolutional or mixed encoder, '
           '`towers.text.model=NAME` a model of texts; `jaxmed list models NAME` shows the same.', '']
  for family, of in [*((f, registry) for f in registry.FAMILIES), *((f, texts) for f in texts.FAMILIES)]:
    known, cls = list_.model(family), of.FAMILIES[family]
    sizes = {name: fields for name, (kind, fields) in of.MODELS.items() if kind == family}
    shared = {f.name for f in dataclasses.fields(cls)}
    columns = [c for c in dict.fromkeys(key for fields in sizes.values() for key in fields) if c in shared]
    defaults = of.family_options(family)
    lines += [f'## {family}', '', *paragraphs(known['about'])]
    lines += table(('model', *map(code, columns)), (
        (code(name), *(config.shown(fields.get(c, defaults[c])) for c in columns)) for name, fields in sizes.items()))
    lines += options(known['section'], known['options'])
  return page('Models', *lines)


def constants() -> str:
  """Every constant of the published variants: the official value, where it stands, and ours."""
  with open(ROOT / config.RECIPES / 'official.toml', 'rb') as f:
    known = tomllib.load(f)
  plain = lambda value: ','.join(map(str, value)) or '()' if isinstance(value, list) else str(value) or "''"
  lines = ['What the published variants of the recipes set, and what stands in the official code, read there by hand '
           '(`experiments/official.toml`); `tests/test_official.py` holds the recipes against it. Values are in the '
           'unit of the key: see the [configuration](config.md) and the [methods](methods.md).', '']
  for name, section in known.items():
    rows = section['constants']
    other = sum(len(row) > 3 for row in rows)
    count = f'{len(rows)} constants, {len(rows) - other} equal, {other} differ'
    lines += [f'## {name}', '', f'{section["source"]}: {count}.', '']
    mine = lambda ours: f'{code(plain(ours[0]))}, because {text(ours[1])}' if ours else 'equal'
    lines += table(('key', 'official', 'where', 'ours'), (
        (code(key), code(plain(value)), text(where), mine(ours)) for key, value, where, *ours in rows))
    lines += ['Not read in official code:', '', *(f'- {text(entry)}' for entry in section['not_read']), ''] if (
        'not_read' in section) else []
  return page('Official constants', *lines)


PAGES = {'cli.md': commands, 'config.md': configuration, 'methods.md': methods, 'models.md': models,
         'constants.md': constants}


def stale() -> dict[str, str]:
  """{page: what it should be} of those that differ."""
  wanted = {name: make() for name, make in PAGES.items()}
  read = lambda path: path.read_text(encoding='utf-8') if path.exists() else ''
  return {name: whole for name, whole in wanted.items() if read(PLACE / name) != whole}


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--check', action='store_true', help='write nothing, end with 1 if a page is stale')
  args = parser.parse_args(argv)
  pages = stale()
  for name, whole in pages.items():
    if not args.check:
      (PLACE / name).write_text(whole, encoding='utf-8')
    print(f'{"stale" if args.check else "written"}: docs/reference/{name}')
  return 1 if args.check and pages else 0


if __name__ == '__main__':
  run_script(main)
