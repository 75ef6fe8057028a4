"""Models of texts by name. `jaxmed list models` shows them beside the encoders of images."""

import dataclasses
from typing import Any

import flax.linen as nn

from jaxmed.errors import UserError, choose
from jaxmed.models.layers.adapters import Adapter
from jaxmed.models.layers.transformer import ACTIVATIONS, REMAT_POLICIES
from jaxmed.models.text import bert, transformer
from jaxmed.models.text.bert import Bert
from jaxmed.models.text.pooling import POOLS
from jaxmed.models.text.transformer import BYTES as BYTES
from jaxmed.models.text.transformer import TextTransformer

FAMILIES: dict[str, type[nn.Module]] = {'text': TextTransformer, 'bert': Bert}
CLASSES = tuple(FAMILIES.values())
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ('text', sizes) for name, sizes in transformer.MODELS.items()},
    **{name: ('bert', sizes) for name, sizes in bert.MODELS.items()}}
FILLED = ('parent', 'name', 'context', 'out_dim', 'out_bias', 'adapter')  # no options
CHOICES = {'pool': POOLS, 'mlp': tuple(ACTIVATIONS), 'remat': REMAT_POLICIES, 'dtype': ('float32', 'bfloat16')}
TEXT_KINDS = ('lora',)  # adapters that both families take
HEADS = ('head', 'pool')  # parts that are trained beside an adapter: the projection, and the query of pool='attention'


def family_options(family: str) -> dict[str, Any]:
  """The options of a family with their defaults."""
  return {f.name: f.default for f in dataclasses.fields(FAMILIES[family])  # type: ignore[arg-type]
          if f.name not in FILLED}


def default_options(name: str) -> dict[str, Any]:
  """The fields of the named model that a config may set, with their defaults for that size."""
  family, sizes = MODELS[choose('model of texts', name, MODELS)]
  return family_options(family) | sizes


def create_text(name: str, context: int, **options: Any) -> Any:
  """Makes a model for texts of at most `context` ids, e.g. `create_text('text_clip_base', 77, vocab_size=49408)`.

  Raises:
    UserError: unknown name or option, or sizes that do not fit together.
  """
  fields = default_options(name)
  for key, value in options.items():
    choose('option of a model of texts', key, fields)
    if key in CHOICES:
      choose(key, value, CHOICES[key])
    fields[key] = value
  if fields['embed_dim'] % fields['num_heads']:
    raise UserError(f'num_heads {fields["num_heads"]} does not divide embed_dim {fields["embed_dim"]}')
  if not 1 <= fields.get('layers', 1) <= fields['depth']:
    raise UserError(f'layers {fields["layers"]} must lie in 1 to the depth {fields["depth"]}')
  if not 0 <= fields.get('dropout', 0) < 1:
    raise UserError(f'dropout must be between 0 and 1, not {fields["dropout"]}')
  return FAMILIES[MODELS[name][0]](context=context, **fields)


def describe(model: Any) -> dict[str, Any]:
  """A model of texts as plain data, which `rebuild` turns back into it."""
  family = next(name for name, cls in FAMILIES.items() if type(model) is cls)
  fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ('parent', 'name')}
  adapter = fields.pop('adapter')
  return {'family': family} | fields | ({} if adapter is None else {'adapter': dataclasses.asdict(adapter)})


def rebuild(description: dict[str, Any]) -> Any:
  """The model that `describe` described."""
  fields = {k: v for k, v in description.items() if k not in ('family', 'adapter')}
  given = description.get('adapter')
  plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in (given or {}).items()}
  adapter = None if given is None else Adapter(**plain)
  return FAMILIES[description['family']](**fields, adapter=adapter)
