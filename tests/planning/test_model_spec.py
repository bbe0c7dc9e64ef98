"""``module:factory``: built without memory, or refused in a sentence."""

from __future__ import annotations

import pytest

from clantune_scale.planning.model_spec import load_model


def test_a_model_takes_no_memory(tmp_path, monkeypatch):
    (tmp_path / "models.py").write_text(
        "from torch import nn\n"
        "def huge(width): return nn.Linear(width, width)\n"
        "def grouped():\n"
        "    m = nn.Linear(2, 2)\n"
        "    return m, [{'params': [m.weight], 'name': 'weights'}, {'params': [m.bias], 'name': 'biases'}]\n"
        "def broken(): raise OSError('no data here')\n"
        "def number(): return 3\n"
    )
    huge = load_model(f"{tmp_path / 'models.py'}:huge", {"width": 100_000})
    assert sum(huge.trainable) == 100_000**2 + 100_000 and huge.module.weight.is_meta
    monkeypatch.chdir(tmp_path)
    assert [group["name"] for group in load_model("models:grouped").groups] == ["weights", "biases"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{path}:broken", "raised OSError on the meta device: no data here"),
        ("{path}:number", "gave a int. Return a torch.nn.Module"),
        ("{path}:absent", "cannot be imported: AttributeError"),
        ("no_such_module:model", "cannot be imported: ModuleNotFoundError"),
        ("model", "Write module:factory"),
    ],
)
def test_a_model_that_cannot_be_built_is_said(spec, message, tmp_path):
    path = tmp_path / "models.py"
    path.write_text("def broken(): raise OSError('no data here')\ndef number(): return 3\n")
    with pytest.raises(ValueError, match=message):
        load_model(spec.format(path=path))
