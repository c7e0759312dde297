"""Products in groups, and the least time of each cause."""

import pytest

from benchmarks import roofline
from benchmarks.roofline import Product, fastest, group


def test_products_that_differ_in_tokens_alone_are_one_group_with_their_mean() -> None:
    products = {Product(100, 8, 16): 3.0, Product(200, 8, 16): 1.0, Product(8, 100, 16): 5.0}
    # (3 · 100 + 1 · 200) / 4 tokens
    assert group(products, {8, 16}) == {Product(125, 8, 16): 4.0, Product(8, 100, 16): 5.0}


def test_the_least_is_by_operations_where_there_are_any_and_else_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {Product(10, 8, 8): 2.0, Product(10, 8, 16): 4.0}
    monkeypatch.setattr(roofline, "rate", lambda product, *_: rates[product])
    monkeypatch.setattr(roofline, "bandwidth", lambda _: 5.0)
    causes = {
        "products": {"operations": 24.0, "moved": 1.0},
        "attention": {"operations": 6.0, "moved": 1.0},
        "conversions": {"operations": 0.0, "moved": 20.0},
    }
    products = {Product(10, 8, 8): 8.0, Product(10, 8, 16): 16.0}
    found = roofline.roofline("32-true", products, {8, 16}, causes, lambda: 0)
    # 8 / 2 + 16 / 4 = 8 s for 24 operations: 3 a second.
    assert found["least"] == {"products": pytest.approx(8), "attention": pytest.approx(2), "conversions": 4}


def test_the_fastest_try_counts_by_the_clock_that_is_passed() -> None:
    # Each try: the start, and a look after each call until 0.15 s are over. A call takes 0.1, 0.05 or 0.2 s.
    looks = iter(round(1e9 * t) for t in (0, 0.1, 0.2, 1, 1.05, 1.1, 1.15, 2, 2.2))
    assert fastest(lambda: None, lambda: next(looks)) == pytest.approx(0.05)
