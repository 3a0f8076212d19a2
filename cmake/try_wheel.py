"""``python try_wheel.py`` tests an installed riskmap_ext: its ops against plain PyTorch, `riskmap`.

Needs only torch.
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

import riskmap_ext
from riskmap_ext import _library, info, reference

print(info.report())
assert _library.build_facts() is not None, "the module of build facts cannot be imported"
device = "cpu" if _library.no_cuda_reason() or not torch.cuda.is_available() else "cuda"
torch.manual_seed(0)
source, logits = (torch.randn(2, 5, 9, 8, 7, device=device) for _ in range(2))
label = torch.randint(-1, 5, (2, 9, 8, 7), device=device)
features, kernel = torch.randn(2, 6, 9, 8, 7, device=device), torch.randn(5, 6, device=device)
results = []
for package in (riskmap_ext, reference):
    joint = package.leep_statistics(source, label, 5, ignore_index=-1)
    table = package.conditional(joint)
    maps = (source, label, table.float())
    risk = package.risk_map(*maps, ignore_index=-1)
    student, inputs = logits.clone().requires_grad_(), features.clone().requires_grad_()
    loss = package.weighted_loss(student, label, risk, dice_weight=1.0, ignore_index=-1)
    fused = package.linear_weighted_loss(inputs, kernel, None, label, risk, ignore_index=-1)
    (loss + fused).backward()
    transferability = package.transferability_map(*maps, ignore_index=-1)
    results.append((joint, table, transferability, risk, loss, fused, student.grad, inputs.grad))
for mine, theirs in zip(*results, strict=True):
    assert_close(mine, theirs, rtol=1e-4, atol=1e-5, check_dtype=False)
command = Path(sys.executable).parent / "riskmap"
for argument in ("--help", "info"):
    done = subprocess.run([command, argument], capture_output=True, text=True, check=False)
    whole = done.returncode == 0 or 'pip install "riskmap_ext[finetune]"' in done.stderr
    assert whole, (argument, done.stdout, done.stderr)
print(f"riskmap_ext {riskmap_ext.__version__} on {device}: every op agrees with plain PyTorch")
