"""The parts of a micro-batch that are packed one by one."""

from halos.data.batches.parts import divide
from halos.data.rows.token_rows import Row


def test_rows_are_divided_where_their_tokens_would_be_too_many() -> None:
    a, b = (1,) * 10, (2,) * 10
    rows = [
        Row("0", 0, a, ((3,) * 5,)),
        Row("1", 0, a, ((4,) * 5,)),
        Row("2", 1, b, ((5,) * 5,)),
        Row("3", 0, a, ((6,),)),
    ]
    # Together 20 tokens for the prompt that the first two share, then 15, then 11.
    assert divide(rows, 1000) == [slice(0, 4)]
    assert divide(rows, 35) == [slice(0, 3), slice(3, 4)]
    assert divide(rows, 34) == [slice(0, 2), slice(2, 4)]
    assert divide(rows, 19) == [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)]
    assert divide(rows, 1) == [slice(n, n + 1) for n in range(4)]
    assert divide(rows, 30, share_prompts=False) == [slice(0, 2), slice(2, 4)]
    longer = Row("4", 3, (*a, *(3,) * 5, 7), ((8,) * 4,))
    assert divide([rows[0], longer, rows[2]], 20) == [slice(0, 2), slice(2, 3)]  # 15, 1 + 4 more, 15
    assert divide([rows[0], longer], 19) == [slice(0, 1), slice(1, 2)]
    assert divide(rows, 29, share_prompts=False) == [slice(0, 1), slice(1, 2), slice(2, 4)]
