from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, ``in.safetensors``, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return checkpoints.save(tmp_path / "in.safetensors")
