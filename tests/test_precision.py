"""Which number format "auto" stands for on a processor."""

import pytest

from src.precision import cpu_multiplies_bf16_fast


@pytest.mark.parametrize(
    ("cpu", "fast"),
    [
        ({"vendor_id": "GenuineIntel", "flags": "avx512f avx512_bf16 amx_bf16 amx_tile"}, True),
        ({"vendor_id": "GenuineIntel", "flags": "avx512f avx512_bf16 avx512_fp16"}, False),  # as fast as float32 at best
        ({"vendor_id": "AuthenticAMD", "flags": "avx512f avx512_bf16"}, True),
        ({"vendor_id": "AuthenticAMD", "flags": "avx2"}, False),
        ({"CPU implementer": "0x41", "Features": "fp asimd bf16"}, False),
        ({}, False),  # not Linux
    ],
)
def test_bf16_is_chosen_where_its_products_are_fast(cpu, fast):
    """A processor that has the instructions and no multipliers for them trains slower in bf16 than in float32."""
    assert cpu_multiplies_bf16_fast(cpu) == fast
