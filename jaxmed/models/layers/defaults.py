"""What every encoder says of itself, with the values of one that has no such option."""

from jaxmed.contracts import Supports


class EncoderDefaults:
  """Constants of the `contracts.Encoder`, which a family overrides by fields or constants.

  They have no annotation: a field of a Flax module would be an option, and a part of what an exported file says.
  """

  supports = Supports()
  per_channel = False
  class_token = False
  num_registers = 0
  pos = 'none'
  mask_token = False
  masking = 'token'
  local_norm = False
  pooling = 'mean'
  channel_attention = 'joint'
  drop_path = 0.0
  rope_shift = 0.0
  rope_jitter = 0.0
  rope_rescale = 0.0
  hash_draw = False
  packing = 0.0
  remat = 'none'
  adapter = None

  @property
  def num_levels(self) -> int:
    """Intermediate maps; none."""
    return 0

  @property
  def num_prefix_tokens(self) -> int:
    """Class token and registers, which come before the patches."""
    return int(self.class_token) + self.num_registers
