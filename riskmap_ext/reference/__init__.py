"""The public functions in plain PyTorch: readable, differentiable by autograd, on any device.

They are what the tests compare the compiled operators with and what the benchmarks measure
against. Computations run in float32 (float64 for float64 input), so pass float64 tensors for
the truth. Each function takes a private ``_check_values=False`` to skip the checks that read
voxels; inside ``torch.compile`` these are always skipped.
"""

from riskmap_ext.reference.leep import conditional, leep_statistics, transferability_map
from riskmap_ext.reference.linear_weighted_loss import linear_weighted_loss
from riskmap_ext.reference.risk_map import risk_map
from riskmap_ext.reference.weighted_loss import weighted_loss

__all__ = [
    "conditional",
    "leep_statistics",
    "linear_weighted_loss",
    "risk_map",
    "transferability_map",
    "weighted_loss",
]
