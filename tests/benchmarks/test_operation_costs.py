"""Operations by their cause, and what lies between them."""

import torch
from torch import Tensor

from benchmarks.operation_costs import Watch, cause, fault_seconds, overhead, page_faults
from benchmarks.profiles import total
from benchmarks.roofline import Product


class Clock:
    """Nanoseconds, one second more at each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 10**9
        return self.now


def of(name: str, stage: str, *tensors: Tensor) -> str:
    return cause(name, stage, list(tensors[:1]), list(tensors[1:]))


def test_causes() -> None:
    wide, narrow = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    assert of("mm", "head", wide, wide) == "products"
    assert of("_foreach_norm", "rest", wide, wide) == "optimizer and clipping"
    assert of("mul", "optimizer", wide, wide) == "optimizer and clipping"
    assert of("_scaled_dot_product_flash_attention_for_cpu_backward", "backward", wide, wide) == "attention"
    assert of("_to_copy", "head", wide, narrow) == "reductions of the head"
    assert of("_to_copy", "backward", wide, narrow) == "conversions"
    assert of("copy_", "backward", wide, wide) == "elementwise operations and copies"
    assert of("cat", "attention", wide, wide) == of("cat", "backward", wide, wide) == "pieces of attention"
    assert of("cat", "forward", wide, wide) == "elementwise operations and copies"  # of rotary embeddings


def test_an_operation_counts_its_time_operations_and_bytes_and_a_view_nothing() -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Watch(Clock(), ["forward"]) as watch:
        a.t()
        a @ b
    costs = watch.take()
    (found,) = costs.causes.values()
    assert (found.calls, found.operations, found.moved) == (1, 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert costs.products == {Product(3, 4, 5): 120}
    # The clock is looked at when the mode begins, before and after the operation, and when it is written down.
    assert found.seconds == 1
    assert costs.between == {"forward": 1}
    assert costs.views == 1
    assert not watch.take().causes


def test_costs_add_up() -> None:
    with Watch(Clock(), ["forward"]) as one:
        torch.ones(3, 4) @ torch.ones(4, 5)
    with Watch(Clock(), ["backward"]) as other:
        torch.ones(3, 4) @ torch.ones(4, 5)
        torch.ones(2).t()
    found = total([one.take(), other.take()])
    assert found.causes["products"].calls == 2
    assert found.products == {Product(3, 4, 5): 240}
    assert found.between == {"forward": 3, "backward": 4}  # operations that fill memory count, too
    assert found.views == 1


def test_what_is_expanded_moves_what_it_has_and_a_lookup_the_rows_that_it_reads() -> None:
    table, ids = torch.ones(100, 2), torch.tensor([1, 2, 3])
    with Watch(Clock(), ["forward"]) as watch:
        torch.ones(1).expand(50) * torch.ones(50)
        torch.nn.functional.embedding(ids, table)
    (found,) = watch.take().causes.values()
    # Ones are written three times; 1 and 50 numbers are read and 50 written; three rows are read and written.
    assert found.moved == 4 * (1 + 50 + 1 + 50 + 50) + 2 * 4 * (3 * 2)


def test_measuring_has_a_price_and_so_has_new_memory() -> None:
    from benchmarks.roofline import clock_for

    added = overhead(clock_for(1), calls=500)
    assert 0 < added["view"] < added["operation"] < 1e-3
    before = page_faults()
    seconds = fault_seconds(clock_for(1))
    assert page_faults() - before > 10
    assert 0 < seconds < 1e-3
