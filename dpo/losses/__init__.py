"""Preference losses: from the log-probs of P pairs to one value per pair.

Notation of the formulas: ``lw, ll`` are the sequence log-probs of the chosen and the rejected
answer, ``rw, rl`` the same under the reference, ``n_w, n_l`` the answers' token counts,
``u = lw - rw`` and ``v = ll - rl`` the log-ratios, ``D = u - v`` their gap, ``m`` the row's margin,
``p`` its label probability, ``ls`` the log-sigmoid and ``s`` the sigmoid.

Three columns of the data enter here. ``weight`` is the row's weight in the step's mean, in every
loss. ``margin`` is the gap in reward that the pair should have: it is subtracted from the logit of
every loss that is a function of one logit. ``label_prob`` is the probability that the label is
right: the soft label of every loss that is a Bradley-Terry likelihood. A loss names the columns
that it reads, and ``Loss.check`` refuses a column that it would ignore.

To add a loss: a frozen dataclass whose fields are its options, a line in ``LOSSES``, and its golden
values in ``tests/test_losses.py``, whose other tests then cover it by name.

Example:
    >>> from dpo import losses
    >>> losses.make_loss("ipo", beta=0.2)
    Ipo(beta=0.2)
    >>> "simpo" in losses.LOSSES
    True
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial

from torch import Tensor

from dpo.errors import InputError
from dpo.losses.base import (
    MARGIN_AND_LABEL_PROB,
    Loss,
    PairLogProbs,
    ReferenceFreeLoss,
    ReferenceLoss,
    bradley_terry,
    negative_log_likelihood,
)
from dpo.losses.mixture import Mixture
from dpo.losses.reference_free import AlphaPo, Cpo, Orpo, ReferenceFree, Sft, Simper, SimPo, SlicHf
from dpo.losses.token_level import Humanline, LdDpo, SamPo, Tdpo1, Tdpo2, TokenLoss, Wpo
from dpo.losses.whole_step import (
    AlphaDpo,
    Aot,
    AotUnpaired,
    Bco,
    BetaDpo,
    DrDpo,
    Kto,
    KtoPair,
    PlackettLuce,
)
from dpo.losses.with_reference import (
    ApoDown,
    ApoZero,
    CalDpo,
    ChiPo,
    DiscoPop,
    Dpop,
    DpoShift,
    ExoPair,
    FDpo,
    Hinge,
    Ipo,
    IpoSum,
    NcaPair,
    Odpo,
    RDpo,
    Robust,
    Rpo,
    Sigmoid,
    SigmoidNorm,
    SppoHard,
)

__all__ = [
    "LOSSES",
    "CustomLoss",
    "Loss",
    "Mixture",
    "PairLogProbs",
    "ReferenceFreeLoss",
    "ReferenceLoss",
    "TokenLoss",
    "bradley_terry",
    "make_loss",
    "negative_log_likelihood",
    "term_names",
]

Option = float | str


@dataclass(frozen=True)
class CustomLoss(ReferenceLoss):
    """A caller's own function from ``PairLogProbs`` to (P,).

    It is taken to need the reference and to read every column; ``beta`` scales the rewards that are
    reported. A loss with other needs is a subclass of ``Loss``.
    """

    reads = MARGIN_AND_LABEL_PROB
    # Not shown: an address would make the loss another one in a resumed run.
    function: Callable[[PairLogProbs], Tensor] = field(default=negative_log_likelihood, repr=False)
    name: str = "custom"
    options: tuple[tuple[str, Option], ...] = ()

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """Return the function's value.

        Raises:
            InputError: it is not one value per pair.
        """
        values: object = self.function(pairs)
        if not isinstance(values, Tensor) or values.shape != pairs.chosen.shape:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"the loss {self.name} must return one value per pair, a tensor of shape "
                f"{tuple(pairs.chosen.shape)}, got {found}"
            )
        return values


LOSSES: dict[str, type[Loss]] = {
    "sigmoid": Sigmoid,
    "robust": Robust,
    "hinge": Hinge,
    "ipo": Ipo,
    "ipo_sum": IpoSum,
    "sigmoid_norm": SigmoidNorm,
    "rpo": Rpo,
    "exo_pair": ExoPair,
    "nca_pair": NcaPair,
    "sppo_hard": SppoHard,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "discopop": DiscoPop,
    "chi_po": ChiPo,
    "r_dpo": RDpo,
    "dpop": Dpop,
    "odpo": Odpo,
    "cal_dpo": CalDpo,
    "dpo_shift": DpoShift,
    "f_dpo": FDpo,
    "ld_dpo": LdDpo,
    "sampo": SamPo,
    "humanline": Humanline,
    "wpo": Wpo,
    "tdpo1": Tdpo1,
    "tdpo2": Tdpo2,
    "aot": Aot,
    "aot_unpaired": AotUnpaired,
    "dr_dpo": DrDpo,
    "beta_dpo": BetaDpo,
    "alpha_dpo": AlphaDpo,
    "kto": Kto,
    "kto_pair": KtoPair,
    "bco": Bco,
    "plackett_luce": PlackettLuce,
    "sft": Sft,
    "reference_free": ReferenceFree,
    "cpo": Cpo,
    "simpo": SimPo,
    "alpha_po": AlphaPo,
    "orpo": Orpo,
    "slic_hf": SlicHf,
    "simper": Simper,
}


def make_loss(loss: str | Loss | type[Loss] | Callable[..., Tensor], /, **options: Option) -> Loss:
    """Build a loss from its name in ``LOSSES``, from ``"package.module:function"`` or an object.

    ``"sigmoid:0.8,sft:0.2"`` is a `Mixture`; an option goes to every term that has it.

    The object, given or imported, is a ``Loss``, a subclass of it, or a function of
    ``PairLogProbs``, whose further parameters are its options.

    Raises:
        InputError: there is no such loss, it has no such option, or an option is out of range.
    """
    if not isinstance(loss, str):
        return _wrap(loss, getattr(loss, "__name__", type(loss).__name__), options)
    if _MIXTURE.fullmatch(loss):
        return _mixed(loss, options)
    if is_imported(loss):
        return _wrap(_imported(loss), loss, options)
    return _build(_entry(loss), loss, options)


def term_names(loss: Loss) -> list[str]:
    """Name the terms of a mixture as ``LOSSES`` does, one's second use ``name_2``; [] of others."""
    if not isinstance(loss, Mixture):
        return []
    known = {entry: name for name, entry in LOSSES.items()}
    names = [
        term.name if isinstance(term, CustomLoss) else known.get(type(term), type(term).__name__)
        for term, _ in loss.terms
    ]
    uses = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if use == 1 else f"{name}_{use}" for name, use in zip(names, uses, strict=True)]


def is_imported(loss: str) -> bool:
    """Tell whether a name is that of code of the user's own, which runs when it is imported."""
    return ":" in loss and not _MIXTURE.fullmatch(loss)


_TERM = r"\w+:[-+.\d][-+.\de]*"
_MIXTURE = re.compile(rf"{_TERM}(?:,{_TERM})*")  # a name and a number, not a module


def _mixed(text: str, options: Mapping[str, Option]) -> Mixture:
    """Build a mixture from ``name:coefficient,...``."""
    terms: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition(":")
        if name in terms:
            raise InputError(f"the mixture {text!r} names the loss {name} twice")
        try:
            terms[name] = float(number)
        except ValueError as error:
            raise InputError(f"the coefficient of {name} is no number: {number!r}") from error
    known = {name: {item.name for item in fields(_entry(name))} for name in terms}
    _refuse_unknown(text, options, sorted(set().union(*known.values())))
    return Mixture(
        tuple(
            (make_loss(name, **{key: options[key] for key in options if key in known[name]}), share)
            for name, share in terms.items()
        )
    )


def _entry(name: str) -> type[Loss]:
    if name not in LOSSES:
        nearest = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"unknown loss {name!r}; {hint}There are: {', '.join(LOSSES)}")
    return LOSSES[name]


def _build(entry: type[Loss], name: str, options: Mapping[str, Option]) -> Loss:
    _refuse_unknown(name, options, [field.name for field in fields(entry)])
    constructor: Callable[..., Loss] = entry
    return constructor(**options)


def _wrap(found: object, name: str, options: Mapping[str, Option]) -> Loss:
    """Turn a loss, a class of losses or a function into a loss with these options."""
    if isinstance(found, type) and issubclass(found, Loss):
        return _build(found, name, options)
    if isinstance(found, Loss):
        _refuse_unknown(name, options, [])
        return found
    if not callable(found):
        raise InputError(
            f"the loss {name} must be a function of PairLogProbs, got {type(found).__name__}"
        )
    signature = inspect.signature(found)
    try:
        arguments = signature.bind(None, **options)
    except TypeError as error:
        known = list(signature.parameters)[1:]
        raise InputError(
            f"cannot call the loss {name}: {error}; its options are: {', '.join(known) or 'none'}"
        ) from error
    arguments.apply_defaults()
    return CustomLoss(
        beta=arguments.arguments.get("beta", ReferenceLoss.beta),
        function=partial(found, **options),
        name=name,
        options=tuple(sorted(options.items())),
    )


def _imported(path: str) -> object:
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot import the loss {path!r}: {error}; is its folder on PYTHONPATH?"
        ) from error
    except AttributeError as error:
        raise InputError(
            f"the module {module_name!r} has no {attribute!r}, named by the loss {path!r}"
        ) from error


def _refuse_unknown(name: str, options: Mapping[str, Option], known: list[str]) -> None:
    for option in options:
        if option not in known:
            raise InputError(
                f"the loss {name} has no option {option!r}; it has: {', '.join(known) or 'none'}"
            )
