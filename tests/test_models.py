"""Model folders that are damaged or hold code: one line that names the folder, and nothing of it is run."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

from ssd import models


@pytest.fixture
def copied(lab_model, tmp_path) -> Path:
    return Path(shutil.copytree(lab_model, tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def load_all(folder: Path) -> None:
    models.load_config(str(folder))
    models.load_tokenizer(str(folder))
    models.load_weights(str(folder), torch.float32)


@pytest.mark.parametrize("part", ["config", "tokenizer", "weights"])
def test_code_in_a_model_folder_is_not_run_whatever_standard_input_says(copied, tmp_path, monkeypatch, part):
    marker = tmp_path / "ran"
    (copied / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    if part == "config":
        change(copied / "config.json", model_type="own", auto_map={"AutoConfig": "code.Own"})
    elif part == "tokenizer":
        auto_map = {"AutoTokenizer": ["code.Own", "code.Own"]}
        change(copied / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)
    else:
        (copied / "custom_generate").mkdir()
        shutil.copy(copied / "code.py", copied / "custom_generate" / "generate.py")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    if part == "config":
        with pytest.raises(
            ValueError, match="the config of model '.*model' needs code that comes with it, .*never run"
        ):
            load_all(copied)
    else:  # transformers has classes of its own for these
        load_all(copied)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("config.json", b"[]", "config"),
        ("config.json", b"{", "config"),
        ("config.json", b"[" * 100_000, "config"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer"),
        ("tokenizer_config.json", b"[", "tokenizer"),
        ("model.safetensors", b"", "weights"),
        ("model.safetensors", b"\xff" * 64, "weights"),
    ],
    ids=str,
)
def test_a_damaged_file_of_a_model_is_refused_in_one_line_that_names_the_folder(copied, file, content, part):
    (copied / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^the {part} in model folder .*model cannot be read \(.*\); copy it again$"):
        load_all(copied)


def test_an_adapter_whose_base_is_damaged_names_the_base(copied, tmp_path):
    (copied / "config.json").write_bytes(b"[]")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, message in ((str(copied), "base of adapter .* folder .*model cannot be read"), (["x"], "names its base")):
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        save_file({}, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            models.load_config(str(adapter))
