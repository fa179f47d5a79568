"""Units: what people write, read back exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.spec.units import (
    MAX_RATE_BPS,
    MIN_RATE_BPS,
    format_rate,
    format_size,
    format_time,
    parse_rate,
    parse_share,
    parse_size,
    parse_time,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_rate, "50mbit", 50_000_000),
        (parse_rate, "1.5 Gbit/s", 1_500_000_000),
        (parse_rate, "800KBIT", 800_000),
        (parse_time, "10ms", 0.01),
        (parse_time, "250 us", 250e-6),
        (parse_time, "250µs", 250e-6),
        (parse_time, "2min", 120.0),
        (parse_time, 0, 0.0),
        (parse_size, "64KiB", 65536),
        (parse_size, "1.5MB", 1_500_000),
        (parse_share, "1%", 0.01),
        (parse_share, 0.25, 0.25),
        (parse_share, 1.0, 1.0),
    ],
)
def test_values(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "text", "part"),
    [
        (parse_rate, 50, "has no unit"),
        (parse_rate, "50", "has no unit"),
        (parse_rate, "50mb", "valid units are bit, kbit, mbit, gbit"),
        (parse_rate, "50mbps", "unknown unit 'mbps'"),  # bytes/s for tc, bits/s for most people
        (parse_rate, "-5mbit", "is negative"),
        (parse_rate, "1bit", "out of range"),
        (parse_rate, "1e9gbit", "out of range"),
        (parse_rate, "nanmbit", "is not a rate"),
        (parse_rate, True, "is not a rate"),
        (parse_rate, ["50mbit"], "is not a rate"),
        (parse_time, "5", "has no unit"),
        (parse_time, "5 parsecs", "unknown unit"),
        (parse_time, "-1s", "is negative"),
        (parse_size, "0B", "out of range"),
        (parse_share, "101%", "out of range"),
        (parse_share, "1pct", "unknown unit"),
        (parse_share, 1, "1% or as 100%"),
    ],
)
def test_faults_name_the_mend(parse, text, part):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert part in str(caught.value)


@given(st.integers(MIN_RATE_BPS, MAX_RATE_BPS))
def test_rates_survive_a_round_trip(rate_bps):
    assert parse_rate(format_rate(rate_bps)) == rate_bps


@given(st.integers(0, 10**9).map(lambda us: us / 1e6))
def test_times_survive_a_round_trip(time_s):
    assert parse_time(format_time(time_s)) == pytest.approx(time_s, rel=1e-12)


@given(st.integers(1, 2**32 - 1))
def test_sizes_survive_a_round_trip(size_bytes):
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.text())
def test_any_text_is_a_value_or_a_value_error(text):
    for parse in (parse_rate, parse_time, parse_size, parse_share):
        try:
            assert parse(text) >= 0
        except ValueError:
            pass
