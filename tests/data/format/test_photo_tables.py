"""Photos in tables: names of rows, columns, row groups; equal to a folder of the same files."""

from hypothesis import given
from hypothesis import strategies as st

from vlal_dist.data.format.photo_tables import row_names


def test_rows_are_named_by_their_path_where_it_is_one() -> None:
    paths = [
        "a.jpg",
        None,
        "b/c.png",
        "a.png",
        "a.png",
        "../x.jpg",
        "/etc/passwd",
        "",
        "t-00000001",
    ]
    assert row_names(paths, count=9, stem="t") == [
        "a.jpg",
        "t-00000001",
        "b/c.png",
        *(f"t-0000000{row}" for row in range(3, 9)),
    ]
    assert row_names(None, count=2, stem="t") == ["t-00000000", "t-00000001"]


@given(st.lists(st.none() | st.text(max_size=3) | st.sampled_from(["t-00000000", "a/b", "a"])))
def test_names_are_unique_in_a_file(paths: list[str | None]) -> None:
    names = row_names(paths, count=len(paths), stem="t")
    assert len(set(names)) == len(paths) == len(names)
    assert all(".." not in name.split("/") and not name.startswith("/") for name in names)
