"""The one place that states the version, and those of what the results depend on."""

from functools import cache
from importlib import metadata

__version__ = "0.1.0"


@cache
def versions() -> dict[str, str]:
    """The versions behind a result: name of the distribution -> version."""
    # What is installed, not what a module says of itself: PyWavelets 1.9 says 1.8.
    others = {name: metadata.version(name) for name in ("torch", "numpy", "pywavelets")}
    return {"wavprune": __version__, **others}
