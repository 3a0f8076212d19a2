"""The ways to train that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.transfer import location, losses, offsets

RANDOM, PRIOR = "random", "prior"  # where the fresh output layer starts
_CE = {"ce_weight": 1.0, "dice_weight": 0.0}
_CE_DICE = {"ce_weight": 1.0, "dice_weight": 1.0}


# Said to the driver, whose defaults may change, and no part of a run's definition.
BASE: dict[str, dict[str, Any]] = {
    "risk": {"scheme": "exponential", "range": "dataset"},
    "loss": {"class_weights": None, "normalization": "foreground"},
}


@dataclass(frozen=True)
class Arm:
    """`risk` and `loss` are sections of the driver's configuration; risk None is no risk map.

    What they leave out is as in BASE. own_loss and weights stand in the place of the loss section
    and of the risk maps; a class as own_loss is made for each run from its training cases, number
    of classes and steps. sources: how many source networks weights is given. prepare: called with
    plan and maps before the first step. constants: of own_loss and weights, for `definition`.
    """

    key: str
    name: str
    what: str
    loss: dict[str, Any] = field(default_factory=lambda: _CE_DICE)
    risk: dict[str, Any] | None = None
    from_source: bool = True
    own_loss: Callable[..., Any] | None = None
    weights: Callable[..., Any] | None = None
    sources: int = 1
    head: str = RANDOM
    prepare: Callable[..., None] | None = None
    constants: list[float] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The name of a factor beside the class weights."""
        return self.name.removeprefix("class and ").removesuffix(" + Dice")

    @property
    def definition(self) -> list[Any]:
        """What a run depends on, as plain values."""
        hooks = [f.__name__ if f else None for f in (self.own_loss, self.weights)]
        found = [self.loss, self.risk, self.from_source, *hooks, *self.constants]
        if self.head != RANDOM:
            prepare = str(getattr(self.prepare, "__name__", self.prepare))
            found += [self.head, prepare, *offsets.CONSTANTS]
        return found


REFERENCE = "ce_dice"
WEIGHTS = "class_dice"  # without a map
MAP = "linear_dice"  # the default scheme
PAPER, MEANS = "risk_dice", "class_mean_dice"  # the exponential map, and its means in each class
_LINEAR = {"scheme": "linear"}
_CLASS_DICE = {**_CE_DICE, "class_weights": "sqrt_inverse_frequency"}


def _power(alpha: float) -> dict[str, Any]:
    return {"scheme": "power", "alpha": alpha}


def _placed(key: str, name: str, what: str, **options: Any) -> Arm:
    """Class weights + Dice with a factor that differs within the classes alone."""
    constants = [*location.CONSTANTS, options.get("sources", 1)]
    return Arm(
        key,
        f"class and {name} + Dice",
        what,
        loss=_CLASS_DICE,
        risk={},
        constants=constants,
        **options,
    )


_EVERY = (
    Arm(
        "scratch",
        "CE + Dice from scratch",
        "random weights in the place of the source's",
        from_source=False,
    ),
    Arm("ce", "CE", "plain fine-tuning with cross-entropy", loss=_CE),
    Arm("ce_dice", "CE + Dice", "plain fine-tuning, the usual sum"),
    Arm(
        "risk_ce",
        "risk CE",
        "cross-entropy weighted by the exponential scheme, as in the paper",
        loss=_CE,
        risk={},
    ),
    Arm(
        "linear_dice",
        "linear risk + Dice",
        "scheme linear, 1 to 10: the default scheme",
        risk=_LINEAR,
    ),
    Arm("risk_dice", "exponential risk + Dice", "the paper's scheme, with Dice", risk={}),
    Arm("power_dice", "power risk + Dice", "scheme power, exponent 0.5", risk={"scheme": "power"}),
    Arm(
        "class_dice",
        "class weights + Dice",
        "√(1/f) as class weights; needs no source's map",
        loss=_CLASS_DICE,
    ),
    Arm(
        "class_mean_dice",
        "class means + Dice",
        "control: the exponential risk map averaged within each class",
        risk={},
        weights=location.class_means,
    ),
    Arm(
        "scratch_class",
        "class weights + Dice from scratch",
        "random weights in the place of the source's",
        loss=_CLASS_DICE,
        from_source=False,
    ),
    Arm("focal", "focal", "focal loss, exponent 2", own_loss=losses.focal),
    Arm("top_k", "top-k CE", "cross-entropy of the hardest tenth", own_loss=losses.top_k),
    Arm("focal_dice", "focal + Dice", "focal loss and Dice", own_loss=losses.focal_dice),
    Arm("top_k_dice", "top-k CE + Dice", "top-k CE and Dice", own_loss=losses.top_k_dice),
)
_SETTINGS = (
    Arm("power_third", "power ⅓ risk + Dice", "scheme power, exponent ⅓", risk=_power(1 / 3)),
    Arm("power_strong", "power ¾ risk + Dice", "scheme power, exponent ¾", risk=_power(0.75)),
    Arm(
        "anneal_dice",
        "fading risk + Dice",
        "scheme power, an exponent that falls from 0.5 to 0 over the steps",
        risk=_power(0.5),
        own_loss=losses.Fading,
    ),
    Arm(
        "image_dice",
        "risk of image + Dice",
        "exponential, its range from each image alone",
        risk={"range": "image"},
    ),
    Arm(
        "valid_dice",
        "risk over valid + Dice",
        "exponential; cross-entropy over the number of valid voxels, not of the image's foreground",
        loss={**_CE_DICE, "normalization": "valid"},
        risk={},
    ),
)
_SCALES = (
    Arm(
        "linear_labels",
        "linear risk over labels + Dice",
        "cross-entropy over the labelled foreground, without the image's mask; floor 0.05",
        risk=_LINEAR,
        own_loss=losses.labels_alone,
    ),
    Arm(
        "linear_floored",
        "linear risk over floored labels + Dice",
        "cross-entropy over the labelled foreground, without the image's mask; floor 0.4",
        risk=_LINEAR,
        own_loss=losses.labels_floored,
    ),
    Arm(
        "linear_valid",
        "linear risk over valid + Dice",
        "cross-entropy over the number of valid voxels",
        loss={**_CE_DICE, "normalization": "valid"},
        risk=_LINEAR,
    ),
)
_PLACED = (
    _placed(
        "place_output",
        "output",
        "1 / √p, p LEEP's likelihood of the label",
        weights=location.output,
    ),
    _placed(
        "place_several",
        "three sources",
        "1 / √p, p the mean likelihood of three sources of other seeds",
        weights=location.several,
        sources=3,
    ),
    _placed(
        "place_gaussian",
        "Gaussian head",
        "1 / √p, p of a Gaussian head on the source's features",
        weights=location.gaussian,
    ),
    _placed(
        "place_neighbours",
        "neighbours",
        "1 / √p, p of the 15 nearest neighbours among the source's features",
        weights=location.neighbours,
    ),
    _placed(
        "place_refreshed",
        "refreshed",
        "1 / √p, p LEEP's likelihood from the model being trained, at each step",
        own_loss=location.Refreshed,
    ),
    _placed(
        "place_hardness",
        "hardness",
        "1 / √p, p the label's probability by the model being trained",
        own_loss=location.Hardness,
    ),
    _placed(
        "place_disagreement",
        "disagreement",
        "√(q / p), q from the source (LEEP) and p from the model being trained",
        weights=location.source_likelihood,
        own_loss=location.Disagreement,
    ),
    _placed(
        "doubt_output",
        "doubt",
        "√p, p LEEP's likelihood: less weight where the label is doubtful",
        weights=location.doubt_output,
    ),
    _placed(
        "doubt_neighbours",
        "doubt of neighbours",
        "√p, p of the nearest neighbours",
        weights=location.doubt_neighbours,
    ),
    _placed(
        "doubt_refreshed",
        "refreshed doubt",
        "√p, p LEEP's likelihood from the model being trained",
        own_loss=location.DoubtRefreshed,
    ),
)


def _at_prior(arm: Arm) -> Arm:
    return replace(arm, key=f"prior_{arm.key}", name=f"prior, {arm.name}", head=PRIOR)


def _with_offset(tau: float, fades: bool, key: str, name: str, risk: dict[str, Any] | None) -> Arm:
    kind, what = (
        ("fade", "falling to 0 over 80 % of the steps") if fades else ("offset", "constant")
    )
    return Arm(
        f"{kind}{10 * tau:.0f}_{key}",
        f"{'fading' if fades else 'source'} offset {tau:g}, {name}",
        f"logits + {tau:g} log((q + 0.01) / (f + 0.01)), {what}; q the source's class likelihoods",
        risk=risk,
        head=PRIOR,
        prepare=offsets.TransferPrior(tau, fades),
    )


_BY_KEY = {arm.key: arm for arm in _EVERY}
_LINEAR_MEANS = Arm(
    "linear_mean_dice",
    "linear class means + Dice",
    "control: the linear risk map averaged within each class",
    risk=_LINEAR,
    weights=location.class_means,
)
_HEADS = (
    _LINEAR_MEANS,
    *(_at_prior(_BY_KEY[key]) for key in ("ce_dice", "class_dice", "linear_dice")),
    _at_prior(_LINEAR_MEANS),
    *(_at_prior(_BY_KEY[key]) for key in ("ce", "risk_ce")),
    Arm(
        "prior_shift",
        "prior, CE + Dice, shifted",
        "control: log of the linear map's class means added to the logits, in prediction alone",
        head=PRIOR,
        prepare=offsets.shifted,
    ),
)
_OFFSETS = tuple(
    _with_offset(tau, fades, *over)
    for tau in (0.5, 0.7)
    for fades in (False, True)
    for over in (("ce_dice", "CE + Dice", None), ("linear_dice", "linear risk + Dice", _LINEAR))
)
ARMS = {arm.key: arm for arm in (*_EVERY, *_SETTINGS, *_SCALES, *_PLACED, *_HEADS, *_OFFSETS)}
SETTINGS = tuple(arm.key for arm in (*_SETTINGS, *_SCALES))  # of the map, beside MAP
SCALES = tuple(arm.key for arm in _SCALES)  # of these, the scale of its cross-entropy alone
PLACED = tuple(arm.key for arm in _PLACED)  # held against WEIGHTS: location alone
# On request. Beside arms with Dice, the first two are fairer peers than without it.
EXTRA = ("focal_dice", "top_k_dice", "scratch_class")
DEFAULT = tuple(arm.key for arm in _EVERY if arm.key not in EXTRA)
# The second round: in all of its scenarios, and beside them in the real ones.
SECOND = (
    *(REFERENCE, "class_dice", MAP, "prior_ce_dice", "prior_class_dice", "prior_linear_dice"),
    *("offset5_ce_dice", "fade5_ce_dice"),
)
SECOND_MORE = (
    *("linear_mean_dice", "prior_linear_mean_dice", "prior_shift"),
    *("ce", "risk_ce", "prior_ce", "prior_risk_ce"),
    *(arm.key for arm in _OFFSETS if arm.key not in SECOND),
)
GROUPS = {
    "default": DEFAULT,
    "extra": EXTRA,
    "settings": SETTINGS,
    "scales": SCALES,
    "placed": PLACED,
    "second": SECOND,
    "second-more": SECOND_MORE,
    "prior": (REFERENCE, *(key for key in SECOND if key.startswith("prior")), "offset5_ce_dice"),
    "kept": ("ce", "risk_ce", REFERENCE, "class_dice", MAP, "offset5_ce_dice", "fade5_ce_dice"),
    "all": tuple(ARMS),
}
