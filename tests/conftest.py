"""What holds for every test: how hypothesis draws its examples, and what the garbage collector leaves alone."""

from __future__ import annotations

import gc
import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "random",
    # Neither a slow example nor slow drawing is a failure: both depend on the machine and on what else runs there.
    # Fixtures that examples share are factories, models that are not changed, and folders.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
# CI draws the same examples every time, so that a change fails for what it changes; local runs find new ones.
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True, print_blob=True)
settings.load_profile("fixed" if os.environ.get("CI") == "true" else "random")


def pytest_collection_finish() -> None:
    """Libraries' objects live as long as the process. A full collection, of which every measurement begins with one,
    would look through all of them: workers freeze theirs too."""
    gc.collect()
    gc.freeze()
