"""Sizes, times and shares as people write them."""

from __future__ import annotations

import pytest
from modelpress_client.quantities import parse_duration_s, parse_share, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("5MB", 5_000_000),
        ("800kB", 800_000),
        ("800 kb", 800_000),
        ("1.5GiB", 1_610_612_736),
        ("64KiB", 65_536),
        ("1234", 1_234),
        ("2GB", 2_000_000_000),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    """Powers of ten for kB, MB, GB, of two for KiB, MiB, GiB; bytes without a unit; case does not matter."""
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("10ms", 0.01), ("250us", 2.5e-4), ("90s", 90), ("10m", 600), ("1h", 3600)]
)
def test_durations(text: str, seconds: float) -> None:
    """From microseconds to hours."""
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.01", 0.01), ("0", 0.0), ("1.0", 1.0)])
def test_shares(text: str, share: float) -> None:
    """Percent or a fraction."""
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("parse", "text", "hint"),
    [
        (parse_share, "1", "1%"),
        (parse_share, "5", "5%"),
        (parse_share, "-1", "form"),
        (parse_share, "150%", "at most 100%"),
        (parse_share, "1MB", "no share"),
        (parse_share, "nan", "form"),
        (parse_size_bytes, "5 apples", "no unit of size"),
        (parse_size_bytes, "", "form"),
        (parse_size_bytes, "0", "no size"),
        (parse_size_bytes, "5%", "no unit of size"),
        (parse_duration_s, "10", "10ms"),
        (parse_duration_s, "0s", "no time"),
        (parse_duration_s, "10 weeks", "no unit of time"),
    ],
)
def test_what_is_unclear_is_asked_back(parse: object, text: str, hint: str) -> None:
    """The message names what was written, and what to write instead."""
    with pytest.raises(ValueError, match=hint):
        parse(text)  # type: ignore[operator]
