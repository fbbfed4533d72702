"""What ``dpo bench`` times: models of real shapes with random weights, on pairs of random tokens.

A scenario is a model, a length profile, numerics and a batch. Speed does not depend on what weights
and tokens say, so nothing is downloaded and any shape can be timed. To add a shape, a profile or a
scenario, add an entry to its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from dpo.train_config import Dtype, Recompute

_LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}


def _llama(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> dict[str, Any]:
    return _LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


SHAPES: Final[dict[str, dict[str, Any]]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 512),
    "5m": _llama(256, 688, 4, 8, 4, 8192),
    "135m": _llama(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "1b": _llama(2048, 8192, 16, 32, 8, 128256),  # Llama-3.2-1B
    "8b": _llama(4096, 14336, 32, 32, 8, 128256) | {"tie_word_embeddings": False},  # Llama-3.1-8B
    "32b": _llama(5120, 27648, 64, 40, 8, 152064) | {"tie_word_embeddings": False},
    "70b": _llama(8192, 28672, 80, 64, 8, 128256) | {"tie_word_embeddings": False},
}


@dataclass(frozen=True, slots=True)
class Profile:
    """Lengths of the pairs in tokens, drawn evenly between two bounds, both included."""

    prompt: tuple[int, int]
    answer: tuple[int, int]


LENGTHS: Final = (512, 1024, 2048, 4096)  # useful tokens of a pair, in profiles named by them
PAIRS: Final = (8, 16, 32, 64)

PROFILES: Final = {
    "chat": Profile((20, 240), (10, 130)),  # like HH-RLHF: short turns
    "agent": Profile((320, 380), (15, 25)),  # a feedback log: long state, short action
    "long": Profile((500, 900), (300, 700)),  # like UltraFeedback and LLaMA-Factory's
    "8k": Profile((6000, 6000), (1096, 1096)),
    **{f"{n}-tokens": Profile((n // 2, n // 2), (n // 4, n // 4)) for n in LENGTHS},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One line of the table.

    Attributes:
        shape: of the model, a name in ``SHAPES``.
        profile: lengths of the pairs, a name in ``PROFILES``.
        dtype: as for ``dpo train --dtype``.
        batch_size: pairs in an optimizer step.
        recompute: as for ``dpo train``.
        shares_prefix: whether a prompt is computed once for both of its answers.
        loss: as for ``dpo train --loss``.
    """

    shape: str
    profile: str
    dtype: Dtype = "bf16-mixed"
    batch_size: int = 8
    recompute: Recompute | None = None
    shares_prefix: bool = True
    loss: str = "sigmoid"


def _longer(shape: str, dtype: Dtype) -> dict[str, Scenario]:
    """Return scenarios of four pairs each, from one to the next twice as long."""
    return {
        f"{shape}-{n}-tokens": Scenario(
            shape=shape, profile=f"{n}-tokens", dtype=dtype, batch_size=4
        )
        for n in LENGTHS
    }


def _more(shape: str, dtype: Dtype) -> dict[str, Scenario]:
    """Return scenarios of short pairs, from one to the next twice as many in a step."""
    return {
        f"{shape}-{n}-pairs": Scenario(shape=shape, profile="chat", dtype=dtype, batch_size=n)
        for n in PAIRS
    }


FAMILIES: Final = {  # scenarios whose work grows from one to the next by length, or by pairs
    "5m-length": _longer("5m", "float32"),
    "5m-pairs": _more("5m", "float32"),
    "135m-length": _longer("135m", "bf16-mixed"),
    "135m-pairs": _more("135m", "bf16-mixed"),
}

SCENARIOS: Final = {
    "tiny-chat": Scenario(shape="tiny", profile="chat", dtype="float32"),
    "5m-chat": Scenario(shape="5m", profile="chat", dtype="float32"),
    "5m-agent": Scenario(shape="5m", profile="agent", dtype="float32"),
    "5m-chat-simpo": Scenario(shape="5m", profile="chat", dtype="float32", loss="simpo"),
    "5m-chat-wpo": Scenario(shape="5m", profile="chat", dtype="float32", loss="wpo"),
    "5m-chat-tdpo2": Scenario(shape="5m", profile="chat", dtype="float32", loss="tdpo2"),
    "135m-chat": Scenario(shape="135m", profile="chat"),
    "135m-chat-float32": Scenario(shape="135m", profile="chat", dtype="float32"),
    "135m-chat-not-shared": Scenario(shape="135m", profile="chat", shares_prefix=False),
    "135m-agent": Scenario(shape="135m", profile="agent"),
    "135m-agent-not-shared": Scenario(shape="135m", profile="agent", shares_prefix=False),
    "135m-long": Scenario(shape="135m", profile="long", batch_size=4, recompute="layer"),
    "135m-8k": Scenario(shape="135m", profile="8k", batch_size=1, recompute="layer"),
    "1b-chat": Scenario(shape="1b", profile="chat", batch_size=64),
    "1b-agent": Scenario(shape="1b", profile="agent", batch_size=64),
    "1b-agent-not-shared": Scenario(
        shape="1b", profile="agent", batch_size=64, shares_prefix=False
    ),
    "1b-long": Scenario(shape="1b", profile="long", batch_size=32, recompute="layer"),
    "8b-chat": Scenario(
        shape="8b", profile="chat", dtype="bfloat16", batch_size=32, recompute="layer"
    ),
    **{name: scenario for family in FAMILIES.values() for name, scenario in family.items()},
}

SUITES: Final = {
    "quick": ("tiny-chat", "5m-chat", "5m-agent"),
    "cpu": ("135m-chat", "135m-chat-float32", "135m-agent", "135m-agent-not-shared", "135m-long"),
    "gpu": (
        "135m-chat", "135m-agent", "135m-8k", "1b-chat", "1b-agent", "1b-agent-not-shared",
        "1b-long", "8b-chat", *FAMILIES["135m-length"], *FAMILIES["135m-pairs"],
    ),
    "losses": ("5m-chat", "5m-chat-simpo", "5m-chat-wpo", "5m-chat-tdpo2"),
    "scaling": (*FAMILIES["5m-length"], *FAMILIES["5m-pairs"]),
    "scaling-gpu": (*FAMILIES["135m-length"], *FAMILIES["135m-pairs"]),
}  # fmt: skip
MINUTES: Final = {"gpu": 7.5}  # of a suite, begun to end, unless another limit is given
