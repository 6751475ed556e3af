"""A folder that can be published, as its record says, and its upload to a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import close_session
from safetensors.torch import save_file

from retrofit.checkpoint.provenance import digest, write_provenance
from retrofit.publishing.card import render_card
from retrofit.publishing.hub import Retry, publish
from tests.publishing.cards import card_input
from tests.publishing.hub_server import HubServer

GATE = {"metric": "ppl_ratio@1024", "bound": "<= 1.5", "value": 1.4, "passed": True, "reason": "is 1.4, as <= 1.5"}
RECORD = {"recipe": {"require": {"ppl_ratio@1024": "<= 1.5"}}, "gate": [GATE], "reload": {"passed": True}}


def record(folder: Path, **over: object) -> None:
    write_provenance(folder, {**RECORD, "files": digest(folder, everything=True), **over})


def push(hub: HubServer, folder: Path, repo: str = "ann/tiny", **over):
    waits: list[float] = []
    retry = Retry(attempts=4, sleep=waits.append)
    published = publish(folder, repo, **{"token": "hf_write", "endpoint": hub.endpoint, "retry": retry, **over})
    return published, waits


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished checkpoint in two shards, as the publish step leaves it."""
    folder = tmp_path / "final"
    (folder / "assets").mkdir(parents=True)
    shards = {}
    for i in range(2):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({f"t{i}": torch.randn(64, 64)}, folder / shard, metadata={"format": "pt"})
        shards[f"t{i}"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "assets" / "perplexity.svg").write_text("<svg/>")
    (folder / "README.md").write_text(render_card(card_input()))
    record(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    close_session()
    with HubServer() as server:
        yield server
    close_session()
