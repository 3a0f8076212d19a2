"""Transfer risk maps for fine-tuning segmentation models: fused kernels as torch ops.

A frozen source model's logits and the target labels become LEEP statistics, a per-voxel
transferability map, a transfer risk map and a foreground-normalised, risk-weighted loss with
autograd. The ops are ``torch.ops.riskmap_ext.*``; the functions here are the way to call them.
"""

from importlib.metadata import PackageNotFoundError, version

from riskmap_ext import _library

_library.load()

from riskmap_ext import nn, reference  # noqa: E402  (the ops must be registered first)
from riskmap_ext.ops.in_forward import gradient_in_forward  # noqa: E402
from riskmap_ext.ops.leep_statistics import conditional, leep_statistics  # noqa: E402
from riskmap_ext.ops.linear_weighted_loss import linear_weighted_loss  # noqa: E402
from riskmap_ext.ops.risk_map import risk_map  # noqa: E402
from riskmap_ext.ops.transferability_map import transferability_map  # noqa: E402
from riskmap_ext.ops.weighted_loss import weighted_loss  # noqa: E402
from riskmap_ext.statistics import TransferStatistics, sqrt_inverse_frequency  # noqa: E402

try:
    __version__ = version("riskmap-ext")
except PackageNotFoundError:  # run from a source folder that was built but not installed
    __version__ = (_library.build_facts() or {}).get("version", "unknown")

__all__ = [
    "TransferStatistics",
    "__version__",
    "conditional",
    "gradient_in_forward",
    "leep_statistics",
    "linear_weighted_loss",
    "nn",
    "reference",
    "risk_map",
    "sqrt_inverse_frequency",
    "transferability_map",
    "weighted_loss",
]
