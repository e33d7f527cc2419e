"""`osp doctor` on the simulated card."""

import pytest
from simulated.device import Card

from opensoraplan.cli.doctor import Doctor, doctor
from opensoraplan.cli.options import Dtype


@pytest.mark.parametrize(
    ("gigabytes", "dtype", "said"),
    [
        (64, "bf16", "resident"),
        (22, "bf16", "in-turn"),
        (22, "fp32", "streamed"),
        (3, "bf16", "does not fit"),
    ],
)
def test_a_card_is_tried_and_told_which_placement_fits(
    card: Card,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gigabytes: int,
    dtype: Dtype,
    said: str,
) -> None:
    card.memory.capacity = gigabytes * 10**9
    monkeypatch.setattr("opensoraplan.runtime.trials._CARD_SIZES", (256, 256, 8, 16))
    doctor(Doctor(device="npu", dtype=dtype, seconds=0.03))
    page = capsys.readouterr().out
    assert f"npu:0: simulated, {gigabytes}.0 of {gigabytes}.0 GB free" in page
    assert "CANN of unknown version" in page
    assert "attention that works: native" in page
    assert said in page
    card.faults.clear()  # of backends that an NPU refuses
