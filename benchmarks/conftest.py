from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Checks alone unless --benchmark-enable. In pyproject.toml that would demand the plugin."""
    if config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = True
