"""An adapter against a base model, by paths and shapes, without weights."""

from pathlib import Path

import pytest
from loramem_cli.main import run

from loramem.errors import BaseModelNotFound, UnsupportedBaseModel
from loramem.serving.check import check_folders

from .peft_adapters import save_config, saved_adapter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            "wider",
            "layers.0.self_attn.q_proj.lora_A.weight has shape (4, 16), base model '{base}' takes (4, 32) (11 more",
        ),
        (
            "shallower",
            "layers.2.self_attn.q_proj.lora_A.weight, of shape (4, 16), fits no module of base model '{base}'",
        ),
        ("deeper", "layers.3.self_attn.q_proj.lora_A.weight, of shape (4, 16) on base model '{base}', is not there"),
        ("gpt2", "PEFT does not adapt base model '{base}' as the config says"),
        ("qwen2", None),  # its modules have the same names and shapes
    ],
)
def test_an_adapter_of_another_base_model_is_told_by_its_tensors(
    base: str,
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, other = saved_adapter("plain", tmp_path), save_config(base, tmp_path / "other")
    assert run(["check", str(one.folder), "--target", "peft"]) == 0
    assert run(["check", str(one.folder), "--target", "peft", "--model", str(one.base)]) == 0
    capsys.readouterr()
    assert run(["check", str(one.folder), "--target", "peft", "--model", str(other)]) == (7 if said else 0)
    shown = capsys.readouterr().err
    assert said is None or said.format(base=other) in shown
    assert said is None or len(shown.splitlines()) == 1


def test_the_embedded_base_model_is_one_too(tmp_path: Path) -> None:
    (finding, *_) = check_folders([saved_adapter("plain", tmp_path).folder], ["peft"], model="loramem-tiny").findings
    assert finding.rule == "fit" and "'loramem-tiny'" in finding.what


def test_what_is_no_base_model_is_one_typed_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = saved_adapter("plain", tmp_path)
    (tmp_path / "empty").mkdir()
    for name, content, error in (
        ("empty", None, BaseModelNotFound),
        ("no JSON", "{", BaseModelNotFound),
        ("unknown", '{"model_type": "nonsense"}', UnsupportedBaseModel),
        ("no language model", '{"model_type": "vit"}', UnsupportedBaseModel),
        ("odd", '{"model_type": "llama", "hidden_size": "x"}', UnsupportedBaseModel),
        ("code", '{"auto_map": {"AutoConfig": "run.Config"}, "model_type": "theirs"}', UnsupportedBaseModel),
        ("me/nowhere", None, BaseModelNotFound),
    ):
        folder = tmp_path / name
        if content is not None:
            folder.mkdir()
            (folder / "config.json").write_text(content)
            (folder / "run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        given = name if "/" in name else str(folder)
        with pytest.raises(error) as caught:
            check_folders([one.folder], ["peft"], model=given)
        assert "\n" not in str(caught.value), name
        assert run(["check", str(one.folder), "--model", given]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
