"""The compiled operators: one file per op with its wrapper, fake, autograd and docstring."""
