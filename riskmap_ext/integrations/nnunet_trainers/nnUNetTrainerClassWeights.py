"""nnU-Net finds trainers by the files of a folder: this one holds nothing else."""

from riskmap_ext.integrations.nnunet import nnUNetTrainerClassWeights

__all__ = ["nnUNetTrainerClassWeights"]
