"""retrofit.json: stable order, digests that notice a changed byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from retrofit.checkpoint.extensions import first_original, held_scale
from retrofit.checkpoint.provenance import digest, read_provenance, versions, write_provenance
from retrofit.errors import UserError


def test_key_order_is_stable_whatever_the_order_given(tmp_path: Path) -> None:
    record = {"zeta": 1, "files": {"b": "2", "a": "1"}, "alpha": 2, "source": {"revision": "r", "digests": {}}}
    first = write_provenance(tmp_path, record).read_bytes()
    second = write_provenance(tmp_path, dict(reversed(record.items()))).read_bytes()
    assert first == second
    assert list(json.loads(first)) == ["schema_version", "source", "files", "alpha", "zeta"]
    assert list(json.loads(first)["files"]) == ["a", "b"]
    assert read_provenance(tmp_path) == {**record, "schema_version": 1}


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_provenance(tmp_path, {"metrics": {"ppl": float("nan")}})
    assert list(tmp_path.iterdir()) == []


def test_reading_refuses_none_and_newer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no retrofit\.json"):
        read_provenance(tmp_path)
    (tmp_path / "retrofit.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="version 99"):
        read_provenance(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        *({"steps": 5}, {"steps": [5]}, {"steps": [{}]}, {"source": 5}, {"gate": [1]}, {"files": {"a": 1}}),
        *({"steps": [{"step": "convert", "config": [1]}]}, {"steps": [{"step": "extend", "result": "x"}]}),
        *({"steps": [{"step": "x", "read": read}]} for read in (["a"], {"training": "a"}, {"training": [1]})),
        *({"metrics": {"ppl": float("nan")}}, {"steps": [{"step": "window", "result": {"rise": float("inf")}}]}),
    ],
)
def test_records_of_something_else_are_refused(tmp_path: Path, record: dict) -> None:
    (tmp_path / "retrofit.json").write_text(json.dumps({"schema_version": 1, **record}))
    with pytest.raises(UserError, match="no record of this program"):
        read_provenance(tmp_path)


@pytest.mark.parametrize("result", [{"query_scale": "x"}, {"query_scale": -1}, {"query_scale": True}])
def test_an_extension_without_numbers_is_refused(tmp_path: Path, result: dict) -> None:
    write_provenance(tmp_path, {"steps": [{"step": "extend", "result": result}]})
    with pytest.raises(UserError, match="query_scale"):
        held_scale(tmp_path)
    with pytest.raises(UserError, match="original"):
        first_original(tmp_path)


def test_digests(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "README.md", "tokenizer.json", "retrofit.json", ".lock"):
        (tmp_path / name).write_text(name)
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "chart.svg").write_text("x")
    assert digest(tmp_path) == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert set(digest(tmp_path, everything=True)) == {
        "assets/chart.svg",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_versions_name_the_packages_that_matter() -> None:
    assert {"python", "torch", "transformers", "safetensors", "peft"} <= versions().keys()
