"""Calls functions of the user's own modules, given as ``package.module:function``.

Modules in the sweep file's folder are imported by path: they take precedence over any module of
the same name elsewhere, and are imported again once one of their files has changed. Afterwards
``sys.path`` and ``sys.modules`` are what they were before.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..errors import WavpruneError
from .sources import Factory

# These never come from the sweep file's folder, whatever is in it.
RESERVED = frozenset({*sys.stdlib_module_names, "__main__", __name__.partition(".")[0]})


def call_factory(source: Factory) -> Any:
    """What the function of a source returns.

    Raises:
        WavpruneError: it cannot be imported, raises, or ends the process.
        TypeError: it is not a function.
    """
    with _imported(source) as (function, _):
        try:
            return function(**source.arguments)
        except (Exception, SystemExit) as error:
            raise WavpruneError(f"factory {source.factory!r} {_failure(error)}") from error


def bound_factory(source: Factory) -> Any:
    """An object of the class that a source names, or its function with the arguments bound.

    Raises:
        WavpruneError: it cannot be imported, or the class raises.
        TypeError: it is neither.
    """
    with _imported(source) as (target, _):
        if not inspect.isclass(target):
            return partial(target, **source.arguments) if source.arguments else target
        try:
            return target(**source.arguments)
        except (Exception, SystemExit) as error:
            raise WavpruneError(f"{source.factory!r} {_failure(error)}") from error


def factory_digest(source: Factory) -> str:
    """A hash of the files in the sweep file's folder that the function's module consists of.

    Raises:
        WavpruneError: it cannot be imported.
        TypeError: it is not a function.
    """
    with _imported(source) as (_, digest):
        return digest


@dataclass(frozen=True, slots=True)
class _Import:
    """An imported module of a folder, with every other module of the folder that it imported.

    Attributes:
        modules: by name.
        hashes: of the files of these modules.
        digest: of the files that importing it took.
    """

    modules: dict[str, ModuleType]
    hashes: dict[Path, str]
    digest: str

    def is_current(self) -> bool:
        return all(_file_hash(path) == known for path, known in self.hashes.items())


_imports: dict[tuple[Path, str], _Import] = {}
_lock = threading.RLock()


@contextmanager
def _imported(source: Factory) -> Iterator[tuple[Callable[..., Any], str]]:
    """The function, with the modules of its folder importable within the block."""
    module, _, qualified_name = source.factory.partition(":")
    key = (source.root, module)
    finder = _FolderFinder(source.root)
    with _lock, _modules_of(finder):
        known = _imports.get(key)
        if known is not None and known.is_current():
            finder.modules.update(known.modules)
            sys.modules.update(known.modules)
        else:
            known = None
        try:
            function: Any = importlib.import_module(module)
            for part in qualified_name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError) as error:
            raise WavpruneError(
                f"factory {source.factory!r} cannot be imported: {error}"
            ) from error
        except (Exception, SystemExit) as error:
            raise WavpruneError(
                f"factory {source.factory!r} cannot be imported: its module {_failure(error)}"
            ) from error
        if not callable(function):
            raise TypeError(
                f"factory {source.factory!r} is a {type(function).__name__}, not a function"
            )
        digest = known.digest if known else _digest(finder.loaded(), source.root)
        try:
            yield function, digest
        finally:
            modules = finder.loaded()
            _imports[key] = _Import(modules, _file_hashes(modules), digest)


class _FolderFinder(MetaPathFinder):
    """Finds modules in a folder, and remembers which.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, ModuleType | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of this name, if the folder has it."""
        spec = self.search(fullname, path)
        if spec is not None:
            self.modules[fullname] = None
        return spec

    def search(self, name: str, path: Sequence[str] | None) -> ModuleSpec | None:
        """As ``find_spec``, without remembering it."""
        if path is None and name in RESERVED:
            return None
        folders = [str(self.root)] if path is None else list(path)
        for folder in folders:
            if not Path(folder).is_relative_to(self.root):
                continue
            finder = FileFinder(
                folder, (_SourceLoader, SOURCE_SUFFIXES), (ExtensionFileLoader, EXTENSION_SUFFIXES)
            )
            spec = finder.find_spec(name)
            if spec is None:
                continue
            # A folder without __init__.py is a package only if no other finder has a real one.
            if spec.loader is not None or PathFinder.find_spec(name, path) is None:
                return spec
        return None

    def loaded(self) -> dict[str, ModuleType]:
        """The modules of this folder that are imported now."""
        return {name: sys.modules[name] for name in self.modules if name in sys.modules}


class _SourceLoader(SourceFileLoader):
    """Compiles the source each time: cached bytecode goes by size and a time in whole seconds.

    Attributes:
        hash: of the source that was compiled.
    """

    hash = ""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the module."""
        path = self.get_filename(fullname)
        source = self.get_data(path)
        self.hash = hashlib.sha256(source).hexdigest()
        code: CodeType = self.source_to_code(source, path)
        return code


@contextmanager
def _modules_of(finder: _FolderFinder) -> Iterator[None]:
    """Within the block imports see the finder's folder first; afterwards nothing of it is left."""
    path = list(sys.path)
    hidden = _hidden_modules(finder)
    for name in hidden:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.loaded():
            del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:] = path


def _hidden_modules(finder: _FolderFinder) -> dict[str, ModuleType]:
    """Imported modules from elsewhere that have the name of one in the finder's folder."""
    try:
        names = {entry.name.partition(".")[0] for entry in finder.root.iterdir()}
    except OSError:
        return {}
    names = {name for name in names if name in sys.modules and finder.search(name, None)}
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}


def _file_hashes(modules: Mapping[str, ModuleType]) -> dict[Path, str]:
    """The files of modules, each with the hash of what was loaded from it."""
    hashes = {}
    for module in modules.values():
        if module.__file__ is not None:
            path = Path(module.__file__)
            loader = module.__spec__.loader if module.__spec__ else None
            hashes[path] = loader.hash if isinstance(loader, _SourceLoader) else _file_hash(path)
    return hashes


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _digest(modules: Mapping[str, ModuleType], root: Path) -> str:
    hashes = {
        path.relative_to(root).as_posix(): known for path, known in _file_hashes(modules).items()
    }
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()


def _failure(error: BaseException) -> str:
    """What an exception did, and where: ``failed at nets.py:3: KeyError: 'x'``."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen ")
    ]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r}){where}"
    return f"failed{where}: {type(error).__name__}: {error}"
