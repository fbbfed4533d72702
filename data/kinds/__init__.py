"""Policy kinds: what a decision of each policy looks like, says and is worth.

A new kind is one file and one entry in ``KINDS``; see ``README.md`` beside this file.
"""

from dpo.data.kinds.base import BaselineDecision, PolicyKind, Reward, TypedKind
from dpo.data.kinds.consolidation import CONSOLIDATION
from dpo.data.kinds.extraction import EXTRACTION
from dpo.data.kinds.retrieval import RETRIEVAL

__all__ = ["KINDS", "BaselineDecision", "PolicyKind", "Reward", "TypedKind"]

KINDS: dict[str, PolicyKind] = {kind.name: kind for kind in (EXTRACTION, RETRIEVAL, CONSOLIDATION)}
