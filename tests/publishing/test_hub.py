"""Publishing against a local hub: what arrives is byte-identical, faults are survived or named, bad folders refused."""

from __future__ import annotations

import errno
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import sha256
from retrofit.errors import UserError
from retrofit.publishing.card import render_card
from retrofit.publishing.snippet import shows_snippet
from tests.publishing.cards import card_input
from tests.publishing.hub_server import HubServer
from tests.publishing.pushing import files, folder, hub, push, record

__all__ = ["folder", "hub"]  # fixtures


def test_what_arrives_is_what_the_folder_holds(hub: HubServer, folder: Path) -> None:
    published, waits = push(hub, folder)
    assert hub.repos["ann/tiny"].files == files(folder)
    assert hub.repos["ann/tiny"].private
    assert published.private
    assert hub.repos["ann/tiny"].commits == [published.commit]
    assert published.url == f"{hub.endpoint}/ann/tiny"
    assert published.license == "apache-2.0"
    assert set(published.files) == files(folder).keys()
    assert published.nbytes == sum(map(len, files(folder).values()))
    assert waits == []
    url = f"{published.url}/resolve/main/model-00001-of-00002.safetensors"
    with pytest.raises(urllib.error.HTTPError, match="404"):  # private: nobody without a token
        urllib.request.urlopen(url)
    asked = urllib.request.Request(url, headers={"Authorization": "Bearer hf_write"})
    with urllib.request.urlopen(asked) as answer:
        assert answer.read() == (folder / "model-00001-of-00002.safetensors").read_bytes()


def test_the_card_names_its_repository(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    card = hub.repos["ann/tiny"].files["README.md"].decode()
    assert 'model_id = "ann/tiny"\n' in card
    assert shows_snippet(card)
    push(hub, folder, "acme/other", private=False)
    assert 'model_id = "acme/other"\n' in (folder / "README.md").read_text()
    assert not hub.repos["acme/other"].private


def test_short_name_goes_to_the_user(hub: HubServer, folder: Path) -> None:
    assert push(hub, folder, "tiny")[0].repo_id == "ann/tiny"


def test_publishing_again_sends_nothing_twice(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    before = dict(hub.puts)
    push(hub, folder)
    assert hub.puts == before
    assert set(before.values()) == {1}
    assert len(hub.repos["ann/tiny"].commits) == 1


def test_weights_of_an_earlier_version_go(hub: HubServer, folder: Path) -> None:
    push(hub, folder)
    hub.repos["ann/tiny"].files |= {"model.safetensors": b"old", "notes.md": b"mine", "other-Q8_0.gguf": b"mine"}
    hub.repos["ann/tiny"].files |= {"Tiny-Q8_0.gguf": b"old", "Tiny-F16.gguf": b"old"}
    (folder / "Tiny-F16.gguf").write_bytes(b"new")
    record(folder, name="Tiny")
    push(hub, folder)
    assert hub.repos["ann/tiny"].files == files(folder) | {"notes.md": b"mine", "other-Q8_0.gguf": b"mine"}


@pytest.mark.parametrize(
    ("route", "status"),
    [
        ("whoami", 429),
        ("create", 500),
        ("validate", 502),
        ("preupload", 503),
        ("batch", 504),
        ("put", 429),
        ("put", 500),
        ("commit", 429),
        ("commit", 500),
        ("tree", 503),
    ],
)
def test_passing_faults_are_survived(hub: HubServer, folder: Path, route: str, status: int) -> None:
    hub.fail(route, status, times=2)
    push(hub, folder)
    assert hub.requests[route] >= 3
    assert hub.repos["ann/tiny"].files == files(folder)
    assert len(hub.repos["ann/tiny"].commits) == 1


@pytest.mark.parametrize(
    ("route", "after"), [("whoami", True), ("create", True), ("preupload", False), ("put", False), ("put", True)]
)
def test_cut_connections_are_survived(hub: HubServer, folder: Path, route: str, after: bool) -> None:
    hub.cut(route, times=2, after=after)
    push(hub, folder)
    assert hub.repos["ann/tiny"].files == files(folder)
    assert len(hub.repos["ann/tiny"].commits) == 1


@pytest.mark.parametrize("after", [False, True])
def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, folder: Path, after: bool) -> None:
    hub.cut("commit", after=after)
    push(hub, folder)
    assert hub.requests["commit"] == (1 if after else 2)
    assert hub.repos["ann/tiny"].files == files(folder)
    assert len(hub.repos["ann/tiny"].commits) == 1


def test_the_hub_says_how_long_to_wait(hub: HubServer, folder: Path) -> None:
    hub.fail("commit", 429, Retry_After="17")
    hub.fail("commit", 503)
    _, waits = push(hub, folder)
    assert waits == [17.0, 2.0]


def test_a_hub_that_stays_down_is_given_up_and_resumed(hub: HubServer, folder: Path) -> None:
    second = sha256(folder / "model-00002-of-00002.safetensors")
    hub.fail("commit", 500, times=10**6)
    with pytest.raises(UserError, match="in 4 attempts") as caught:
        push(hub, folder)
    assert "500" in str(caught.value)
    assert "not sent again" in str(caught.value)
    assert hub.requests["commit"] == 4
    assert hub.repos["ann/tiny"].files == {}
    hub.faults.clear()
    push(hub, folder)
    assert hub.puts[second] == 1
    assert hub.repos["ann/tiny"].files == files(folder)


def test_cut_in_mid_upload_leaves_no_commit_and_is_resumed(hub: HubServer, folder: Path) -> None:
    hub.cut("put", times=10**6)
    with pytest.raises(UserError, match="in 4 attempts"):
        push(hub, folder)
    assert hub.repos["ann/tiny"].commits == []
    assert hub.blobs == {}
    hub.faults.clear()
    push(hub, folder)
    assert hub.repos["ann/tiny"].files == files(folder)


def test_a_failure_of_this_machine_is_neither_repeated_nor_the_hubs(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", full)
    with pytest.raises(UserError, match="disk is full"):
        push(hub, folder)


@pytest.mark.parametrize(("status", "said"), [(401, "does not accept this token"), (403, "may not write to ann/tiny")])
@pytest.mark.parametrize("route", ["create", "preupload", "put", "commit"])
def test_refusals_are_named_and_not_repeated(hub: HubServer, folder: Path, route: str, status: int, said: str) -> None:
    hub.fail(route, status, times=10**6)
    with pytest.raises(UserError, match=said) as caught:
        push(hub, folder)
    assert str(status) in str(caught.value)
    assert caught.value.fix
    assert hub.requests[route] <= 2  # two files go side by side
    assert not hub.repos.get("ann/tiny") or hub.repos["ann/tiny"].files == {}


def test_other_refusals_carry_the_hubs_words(hub: HubServer, folder: Path) -> None:
    hub.fail("commit", 413)
    with pytest.raises(UserError, match="413"):
        push(hub, folder)


@pytest.mark.parametrize("error", [PermissionError("no access to storage"), ValueError("metadata is wrong")])
def test_refusals_that_are_no_http_answer(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refuse)
    with pytest.raises(UserError, match=str(error)):
        push(hub, folder)


def nothing_was_asked(hub: HubServer) -> bool:
    return not hub.requests.keys() - {"whoami"} and not hub.repos


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_wrong", "ann/tiny", "does not accept this token"),
        ("hf_read", "ann/tiny", "may only read"),
        ("hf_fine_read", "ann/tiny", "may only read"),
        ("hf_write", "strangers/tiny", "does not belong to strangers"),
        ("hf_write", "readers/tiny", "may only read in readers"),
    ],
)
def test_tokens_are_checked_first(hub: HubServer, folder: Path, token: str, repo: str, said: str) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=said):
        push(hub, folder, repo, token=token)
    assert nothing_was_asked(hub)
    assert files(folder) == before


def test_tokens_that_may_write(hub: HubServer, folder: Path) -> None:
    push(hub, folder, token="hf_fine")
    with pytest.raises(UserError, match="no token"):
        push(hub, folder, token=None)


@pytest.mark.parametrize("repo", ["a/b/c", "ann/", "ann/ti ny", "ann/-x", "ann/x..y", "", "ann/" + "x" * 100])
def test_names_are_checked_first(hub: HubServer, folder: Path, repo: str) -> None:
    with pytest.raises(UserError, match="not a name the hub allows"):
        push(hub, folder, repo)
    assert not hub.requests


def test_all_that_is_missing_is_named_at_once_before_the_weights_are_read(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "README.md").write_text(render_card(card_input(base_model=None, license=None)))
    monkeypatch.setattr("retrofit.publishing.hub.require_finished", None)
    with pytest.raises(UserError) as caught:
        push(hub, folder, "ann/ti ny", token=None)
    for missing in ("not a name the hub allows", "no token", "no license and no base model"):
        assert missing in caught.value.what
    for fix in ("--repo YOUR-NAME/MODEL-NAME", "hf auth login", "--license apache-2.0 --base-model ORG/NAME"):
        assert fix in caught.value.fix
    assert not hub.requests


def test_offline_is_said(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="switched off") as caught:
        push(hub, folder)
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_private_is_not_uploaded_into_a_public_repository(hub: HubServer, folder: Path) -> None:
    push(hub, folder, private=False)
    hub.repos["ann/tiny"].files.clear()
    with pytest.raises(UserError, match="exists and is public"):
        push(hub, folder, private=True)
    assert hub.repos["ann/tiny"].files == {}


def test_public_is_not_uploaded_into_a_private_repository(hub: HubServer, folder: Path) -> None:
    push(hub, folder, private=True)
    hub.repos["ann/tiny"].files.clear()
    with pytest.raises(UserError, match="exists and is private") as caught:
        push(hub, folder, private=False)
    assert "leave out --public" in str(caught.value)
    assert hub.repos["ann/tiny"].files == {}
    published, _ = push(hub, folder, "ann/other", private=False)
    assert not published.private
    assert not hub.repos["ann/other"].private


def test_what_arrived_broken_is_noticed(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.publishing.hub.sha256", lambda path: "0" * 64)
    with pytest.raises(UserError, match="differs from the folder"):
        push(hub, folder)
