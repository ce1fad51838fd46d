"""Which arithmetic `precision: auto` takes on a CPU."""
import platform

import pytest
import torch

from model import device
from model.device import autocast_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("avx512, amx, expected", [
    (False, False, None), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_bf16_is_taken_where_the_processor_multiplies_in_it(monkeypatch, avx512, amx, expected):
    """AVX512 alone emulates it, five times slower than fp32."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    device.cpu_has_bf16.cache_clear()
    try:
        assert autocast_dtype("auto", CPU) == expected
        assert autocast_dtype("fp32", CPU) is None and autocast_dtype("bf16", CPU) == torch.bfloat16
    finally:
        device.cpu_has_bf16.cache_clear()


def test_another_kind_of_processor_is_asked_of_onednn(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    device.cpu_has_bf16.cache_clear()
    try:
        assert device.cpu_has_bf16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    finally:
        device.cpu_has_bf16.cache_clear()
