from dataclasses import replace

import pytest

from app.main import choose_max_batch, warm
from app.settings import Settings
from model.session import DeviceUnavailable, open_classifier


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_takes_one_tile_a_call_whatever_is_set(tiny_artifact, device, caplog):
    classifier = replace(open_classifier(tiny_artifact, device="cpu", precision="int8"), device=device)
    assert choose_max_batch(Settings(max_batch=8), classifier) == 1
    assert "one tile a call" in caplog.text


def test_a_batch_that_the_device_cannot_take_is_no_traceback(tiny_artifact):
    classifier = open_classifier(tiny_artifact, device="cpu")
    warm(classifier, 2)
    lost = replace(classifier, device="cuda")  # asks for memory on a GPU that isn't there
    with pytest.raises(DeviceUnavailable, match=r"(?s)a batch of 1 fails on cuda: .*\. Set TISSUE_MAX_BATCH lower"):
        warm(lost, 4)
