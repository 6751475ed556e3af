"""What the Hugging Face hub accepts as the name of a repository or a revision, and as a license. Whole texts are
compared; nothing here uses the network."""

from __future__ import annotations

import difflib
import re

from retrofit.escape import shown, visible

LICENSE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
OTHER = "other"
"""The license of a model whose own has no id: its name and a link to its text stand beside it."""

_IDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research intel-research isc lgpl
lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by
ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unlicense wtfpl zlib
"""
LICENSES = frozenset(_IDS.split())
"""The ids of LICENSE_PAGE, without `unknown`, which grants nothing."""

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}")
_LINK = re.compile(r"(https?://[^\s<>\"'`|\\{}^]+|[A-Za-z0-9][A-Za-z0-9._/-]*)")


def is_repo_id(text: str) -> bool:
    """Whether the text is OWNER/NAME as the hub allows it."""
    if not _REPO_ID.fullmatch(text) or len(text) > 200:
        return False
    return ".." not in text and "--" not in text and not text.endswith((".", "-", ".git")) and "./" not in text


def is_name(text: str) -> bool:
    """One part of an id: a model or a dataset without its owner, or a dataset's configuration."""
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def is_model_or_dataset(text: str) -> bool:
    """OWNER/NAME, or the NAME alone of those that the hub has had from its beginning."""
    return is_name(text) or is_repo_id(text)


def is_revision(text: str) -> bool:
    """A branch, a tag or a commit, or a pull request (`refs/pr/1`)."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def is_link(text: str) -> bool:
    """Whether the text is an address or the name of a file in the repository, on one line."""
    return len(text) <= 2000 and ".." not in text and visible(text) == text and _LINK.fullmatch(text) is not None


def license_problem(license: str | None, name: str | None = None, link: str | None = None) -> str | None:
    """What keeps the hub from accepting this license, and the fix; None where nothing does.

    name, link: beside the license `other`, which says nothing without them.
    """
    if not license:
        return "the license is not known; give it with --set publish.license=ID (for example apache-2.0)"
    if license not in LICENSES:
        near = difflib.get_close_matches(license.lower(), LICENSES, n=1, cutoff=0.6)
        meant = f"; did you mean `{near[0]}`?" if near else "."
        return (
            f"`{shown(license, 60)}` is not a license id of the hub{meant} Give one with --set publish.license=ID, "
            f"from {LICENSE_PAGE}; or `{OTHER}` with license_name and license_link"
        )
    if license == OTHER and not (name and link):
        return (
            "the license `other` needs a name and a link to its text; give them with --set publish.license_name=NAME "
            "--set publish.license_link=https://..."
        )
    return None
