"""`retrofit certify --repair`: what saving with transformers 5 drops from config.json is written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from retrofit.checkpoint.provenance import digest
from retrofit.model.load import load_config
from tests.tiny import save_tiny
from tests.workflow.conftest import retrofit

ROPES = {
    "llama": {"rope_type": "default", "rope_theta": 50_000.0},
    "qwen3_moe": {"rope_type": "default", "rope_theta": 50_000.0},
}


def fields(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module", params=list(ROPES))
def extended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with a YaRN window."""
    import retrofit as program

    place = tmp_path_factory.mktemp("extended")
    source = save_tiny(place / "tiny", request.param, rope_parameters=ROPES[request.param])
    program.extend(source, out=place / "long", length=1024, method="yarn", progress=False)
    return place / "long"


@pytest.fixture
def tuned(extended: Path, tmp_path: Path) -> Path:
    """What somebody's fine-tune saves: new weights, transformers' own config.json, and no record."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(extended)
    model.lm_head.weight.data += 0.01
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(extended).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_fine_tune_gets_the_names_back(extended: Path, tuned: Path) -> None:
    dropped = fields(extended).keys() - fields(tuned).keys()
    assert {"rope_theta", "rope_scaling"} <= dropped
    said = retrofit("inspect", tuned)
    assert "retrofit certify FOLDER --repair" in " ".join(said.output.split())
    before = digest(tuned, everything=True)
    meant = load_config(tuned).to_dict()

    found = retrofit("certify", tuned, "--repair")
    assert found.exit_code == 0, found.output + repr(found.exception)
    assert "rope_scaling" in found.output
    assert f"next: retrofit inspect {tuned}" in found.output
    now = fields(tuned)
    assert {name: now[name] for name in dropped} == {name: fields(extended)[name] for name in dropped}
    assert "--repair" not in retrofit("inspect", tuned).output
    assert load_config(tuned).to_dict()["rope_parameters"] == meant["rope_parameters"]
    changed = {name for name, value in digest(tuned, everything=True).items() if before[name] != value}
    assert changed <= {"config.json", "tokenizer_config.json"}
    assert not [path for path in tuned.iterdir() if path.name.endswith(".partial")]

    again = retrofit("certify", tuned, "--repair")
    assert "nothing to repair" in again.output
    assert digest(tuned, everything=True)["model.safetensors"] == before["model.safetensors"]


def test_a_record_of_this_folder_holds_the_new_digest(extended: Path, tmp_path: Path) -> None:
    """Only config.json was saved again: the record is of these weights, and the folder can be certified after it."""
    folder = Path(shutil.copytree(extended, tmp_path / "long"))
    load_config(folder).save_pretrained(folder)
    refused = retrofit("certify", folder)
    assert "changed, added or removed" in refused.output
    found = retrofit("certify", folder, "--repair")
    assert found.exit_code == 0, found.output + repr(found.exception)
    assert f"next: retrofit certify {folder}" in found.output
    record = json.loads((folder / "retrofit.json").read_text())
    assert record["files"] == digest(folder, everything=True)
    assert record["steps"] == json.loads((extended / "retrofit.json").read_text())["steps"]


def test_a_record_of_other_weights_stays_as_it_is(extended: Path, tuned: Path) -> None:
    shutil.copyfile(extended / "retrofit.json", tuned / "retrofit.json")
    before = (tuned / "retrofit.json").read_bytes()
    assert retrofit("certify", tuned, "--repair").exit_code == 0
    assert (tuned / "retrofit.json").read_bytes() == before


def test_what_a_repair_refuses(extended: Path, tuned: Path, tmp_path: Path) -> None:
    assert "a repair does not read --original" in retrofit("certify", tuned, "--repair", "--original", tuned).output
    assert "no such folder" in retrofit("certify", tmp_path / "none", "--repair").output
    broken = {**fields(tuned), "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    (tuned / "config.json").write_text(json.dumps(broken))
    before = digest(tuned, everything=True)
    found = retrofit("certify", tuned, "--repair")
    assert found.exit_code == 2
    assert "position encoding" in found.output
    assert digest(tuned, everything=True) == before
