"""The compiled operators: one file per op with its wrapper, fake, autograd and docstring."""

from riskmap_ext.ops.in_forward import gradient_in_forward
from riskmap_ext.ops.leep_statistics import conditional, leep_statistics
from riskmap_ext.ops.linear_weighted_loss import linear_weighted_loss
from riskmap_ext.ops.risk_map import risk_map
from riskmap_ext.ops.transferability_map import transferability_map
from riskmap_ext.ops.weighted_loss import weighted_loss

__all__ = [
    "conditional",
    "gradient_in_forward",
    "leep_statistics",
    "linear_weighted_loss",
    "risk_map",
    "transferability_map",
    "weighted_loss",
]
