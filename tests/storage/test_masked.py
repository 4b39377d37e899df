"""User information of URLs in texts that are printed or written."""

import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlal_dist.observability.logs import setup_logging
from vlal_dist.storage.checks import masked

WORDS = st.text(st.characters(categories=["L", "N"], max_codepoint=0x2FF), min_size=1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host:5000/x", "http://***@host:5000/x"),
        ("https://secret@host", "https://***@host"),
        ("http://:secret@h and ftp://a:secret@h2", "http://***@h and ftp://***@h2"),
        ("http://user:s@ecret@host/x", "http://***@host/x"),
        ("http://user:se/cr@et@host/x", "http://***@host/x"),
        ("host='h', url='http://u:secret@h', y", "host='h', url='http://***@h', y"),
        ("postgresql+psycopg2://u:secret@h/db", "postgresql+psycopg2://***@h/db"),
    ],
)
def test_user_information_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text", ["s3://bucket/a@b", "http://host:80/a@b", "https://h/p?mail=a@b", "a@b", "x:y@z", ""]
)
def test_other_texts_stay(text: str) -> None:
    assert masked(text) == text


@given(before=WORDS, user=WORDS, password=WORDS, host=WORDS, after=WORDS)
def test_no_password_is_left(before: str, user: str, password: str, host: str, after: str) -> None:
    text = masked(f"{before} http://{user}:{password}@{host}/{after}")
    assert text == f"{before} http://***@{host}/{after}"


def test_log_lines_of_any_library_are_masked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    url = "http://u:{}@h".format("secret")  # in no line of source that a traceback shows
    monkeypatch.setenv("RANK", "one")  # no number: refused where ranks are joined, not here
    try:
        setup_logging()
        logging.getLogger("some.client").warning("no answer from %s", f"{url}/x")
        try:
            raise ValueError(url)
        except ValueError:
            logging.getLogger().exception("failed")
    finally:
        for handler in root.handlers[:]:
            if handler not in before[0]:
                root.removeHandler(handler)
        root.handlers[:], root.level = before
    said = capsys.readouterr().err
    assert "secret" not in said and said.count("***@h") == 2, said
    assert sys.stderr is not None
