from dataclasses import replace

import pytest

from app.main import choose_max_batch
from app.settings import Settings
from model.session import open_classifier


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_int8_takes_one_tile_a_call_whatever_is_set(tiny_artifact, device, caplog):
    classifier = replace(open_classifier(tiny_artifact, device="cpu", precision="int8"), device=device)
    assert choose_max_batch(Settings(max_batch=8), classifier) == 1
    assert "one tile a call" in caplog.text
