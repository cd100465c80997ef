"""Former name of ``wavprune.sweep``; its modules can be imported from here too."""

import sys

from ..sweep import data, models, runner, settings, sources, store, worker

for _module in (data, models, runner, settings, sources, store, worker):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
