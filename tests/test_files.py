"""What a file system or a JSON text can hold that no program could go on with is refused with a message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retrofit.errors import UserError
from retrofit.files import MAX_DEPTH, local_path, output_path, parse_json, read_json, read_text, require_regular


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("~nosuchuser/x", "nobody's home folder"),
        ("a\0b", "no NUL"),
        ("x" * 300, "too long"),
        ("d/" * 3000, "too long"),
        ("\udcff.txt", "not valid UTF-8"),
    ],
)
def test_names_that_are_no_path(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        local_path(name)


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x") == tmp_path / "x"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, says in {
        "pipe": "is a pipe",
        "loop": "loop of symbolic links",
        "dangling": "links to nowhere",
        ".": "is a folder",
        "absent": "no such file",
        "/dev/zero": "is a device",
    }.items():
        with pytest.raises(UserError, match=says):
            require_regular(tmp_path / name)


def test_a_loop_is_refused_as_a_path_too(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        local_path(tmp_path / "loop" / "x")


@pytest.mark.parametrize("target", ["nowhere/x", "link"])
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_link_that_leads_nowhere_is_no_output(target: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match="link"):
        output_path(tmp_path / "link" / below, where="--out")


@pytest.mark.parametrize("name", ["/", "/..", "//", "/tmp/.."])
def test_the_root_of_the_file_system_is_no_output(name: str) -> None:
    with pytest.raises(UserError, match="root of the file system"):
        output_path(name, where="--out")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a":' * 60000 + "1" + "}" * 60000, "nested too deeply"),
        ('{"a":' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "nested too deeply"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_json_that_cannot_be_gone_on_with(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_json(text, "config.json")


def test_json_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


def test_a_text_of_another_encoding_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(UserError, match=r"a\.txt:2"):
        read_text(tmp_path / "a.txt")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    with pytest.raises(UserError, match="more than 4"):
        read_text(tmp_path / "a.txt", limit=4)
