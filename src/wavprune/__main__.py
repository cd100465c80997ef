"""``python -m wavprune``: the command line."""

from .cli import main

raise SystemExit(main())
