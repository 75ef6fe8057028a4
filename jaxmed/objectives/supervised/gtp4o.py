"""GTP-4o: nodes of a missing modality are made from prompts and the nodes that there are (arXiv 2407.05540)."""

import dataclasses
from typing import ClassVar

from jaxmed.errors import UserError
from jaxmed.models.decoders import fusion
from jaxmed.objectives.supervised.fusion import Fusion


@dataclasses.dataclass(frozen=True)
class GTP4o(Fusion):
  """Classes from a graph of all modalities, where learned prompts stand for what a record lacks.

  After the paper's account: typed projections to nodes, prompt nodes that are linked to existing ones by similarity
  above a threshold, then attention with weights of each type of edge. No code of the authors is known, so the sizes are
  not theirs; the modalities are those of jaxmed (there genes, slides, graphs of cells and texts). Differs: no selection
  of neighbours along meta-paths of more than one edge, and `depth` rounds of one edge each reach as far.

  Attributes:
    prompts: nodes that stand for a missing modality.
    threshold: cosine from which a node is linked to them.
  """

  kind: str = 'graph'
  prompts: int = 4
  threshold: float = 0.0

  KIND: ClassVar[str] = 'graph'

  def __post_init__(self):
    super().__post_init__()
    if self.kind != self.KIND:
      raise UserError(f'objective.kind={self.kind}: gtp4o is a graph, objective.kind={self.KIND}; for others take '
                      'method=fusion')
    if self.prompts < 1 or not -1 <= self.threshold < 1:
      raise UserError(f'objective.prompts {self.prompts} must be positive and threshold {self.threshold} a cosine')

  @property
  def head(self) -> fusion.Fusion:
    """The graph, completed."""
    return super().head.clone(prompts=self.prompts, threshold=self.threshold)
