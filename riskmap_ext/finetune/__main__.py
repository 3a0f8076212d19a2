"""`python -m riskmap_ext.finetune`: the same as the `riskmap` command."""

from riskmap_ext.finetune.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
