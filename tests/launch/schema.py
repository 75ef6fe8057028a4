"""Checks plain data against the structural schema of a Kubernetes resource, as the API server does."""

import re

_TYPES = {'object': dict, 'array': list, 'string': str, 'integer': int, 'boolean': bool}


def errors(value, schema, path=''):
  """What is wrong with `value`, a line each; a field that the schema does not have is wrong too."""
  if schema.get('x-kubernetes-int-or-string'):
    kinds, kind = (int, str), 'integer or string'
  else:
    kind = schema.get('type', '')
    kinds = _TYPES.get(kind, object)
  if not isinstance(value, kinds) or (isinstance(value, bool) and kind != 'boolean'):
    return [f'{path}: {value!r} is no {kind}']
  out = [f'{path}: {value!r} is none of {schema["enum"]}'] if value not in schema.get('enum', [value]) else []
  if isinstance(value, str) and 'pattern' in schema and not re.search(schema['pattern'], value):
    out.append(f'{path}: {value!r} does not match {schema["pattern"]}')
  if isinstance(value, int) and value < schema.get('minimum', value):
    out.append(f'{path}: {value} is less than {schema["minimum"]}')
  if isinstance(value, list):
    out += [e for i, item in enumerate(value) for e in errors(item, schema.get('items', {}), f'{path}[{i}]')]
  if isinstance(value, dict):
    out += _fields(value, schema, path)
  return out


def _fields(value, schema, path):
  known, rest = schema.get('properties'), schema.get('additionalProperties')
  out = [f'{path}: {name} is missing' for name in schema.get('required', []) if name not in value]
  for name, item in value.items():
    if known and name in known:
      out += errors(item, known[name], f'{path}.{name}')
    elif isinstance(rest, dict):
      out += errors(item, rest, f'{path}.{name}')
    elif known:
      out.append(f'{path}: {name} is unknown')
  return out
