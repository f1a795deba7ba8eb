"""What all tests share: multi-rank tests, and a time limit for ordinary ones."""

from __future__ import annotations

import hypothesis
import pytest

pytest_plugins = ["tests.ranks.plugin"]

_SECONDS = 120  # an ordinary test that takes longer hangs

hypothesis.settings.register_profile("hybridpar", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("hybridpar")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if not item.get_closest_marker("timeout") and not item.get_closest_marker("ranks"):
                item.add_marker(pytest.mark.timeout(_SECONDS))
