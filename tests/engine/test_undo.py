from __future__ import annotations

import pytest
import torch

from wavprune.engine.undo import undone_on_error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_values_come_back_after_any_error(error: type[BaseException]) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    with torch.inference_mode():
        inference = torch.arange(4.0)
    identity = parameter.data_ptr()

    def change() -> None:
        with undone_on_error([parameter, inference]):
            parameter.data.fill_(7)
            with torch.inference_mode():
                inference.fill_(7)
            raise error

    with pytest.raises(error):
        change()
    assert parameter.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert inference.tolist() == [0, 1, 2, 3]
    assert parameter.data_ptr() == identity
    with undone_on_error([parameter]):
        parameter.data.fill_(7)
    assert parameter.eq(7).all()
