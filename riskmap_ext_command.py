"""Entry point of `riskmap`: `riskmap --help` answers without importing torch.

Importing riskmap_ext loads its libraries, and torch with them. Until a command runs, riskmap_ext is
an empty package that only leads to its submodules.
"""

import importlib.util
import sys


def main() -> None:
    spec = importlib.util.find_spec("riskmap_ext")
    assert spec is not None
    sys.modules["riskmap_ext"] = importlib.util.module_from_spec(spec)
    from riskmap_ext.finetune import cli

    cli.main()
