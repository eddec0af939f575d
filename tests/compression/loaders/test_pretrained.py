"""Models of transformers: from the folder alone, and weights by the names of another release or class."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.convert import convert
from modelpress_compression.errors import InvalidInputsError, UnsupportedFormatError
from modelpress_compression.loaders.architecture import Architecture
from modelpress_compression.loaders.pretrained import build_auto
from modelpress_compression.loaders.torch_run import tensors_of
from modelpress_compression.loaders.weight_loading import load_checkpoint
from oracles.plain_run import run_onnx
from safetensors.torch import save_file


def test_caches_are_read_by_their_structure() -> None:
    """Keys and values of each layer, in order; of an encoder-decoder both caches. No import of the library."""
    one, two, three, four = (torch.full((1,), float(number)) for number in range(4))
    layers = [SimpleNamespace(keys=one, values=two), SimpleNamespace(keys=three, values=None)]
    cache = SimpleNamespace(layers=layers)
    both = SimpleNamespace(self_attention_cache=cache, cross_attention_cache=SimpleNamespace(layers=[]))
    assert tensors_of({"logits": four, "cache": cache, "none": None}) == [four, one, two, three]
    assert tensors_of((both, 1.5))[:3] == [one, two, three]


@pytest.fixture
def transformers() -> Any:
    """The library, which is no dependency of the engine."""
    return pytest.importorskip("transformers")


SMALL = {"vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}


def randomized(model: Any) -> Any:
    """With weights that are not those of the constructor."""
    torch.manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3)
    return model.eval()


@pytest.mark.slow
def test_a_folder_alone(transformers: Any, tmp_path: Path) -> None:
    """Shards, tied weights and a cache in the outputs; rtol 1e-3 against the original at another size."""
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
    original = randomized(transformers.LlamaForCausalLM(config))
    original.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = convert(tmp_path, ["input_ids:int64[batch,tokens]"], architecture="transformers:auto")
    ids = np.random.default_rng(0).integers(0, 32, (3, 7))
    with torch.no_grad():
        wanted = tensors_of(original(torch.from_numpy(ids)))
    got = list(run_onnx(model, [{"input_ids": ids}])[0].values())
    assert len(got) == len(wanted) == 3
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_mixtures_of_experts(transformers: Any, tmp_path: Path) -> None:
    """Weights that the library keeps one by one and computes with together; rtol 1e-3 at another size. Without inputs
    the first argument is suggested by the name that the library gives it."""
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, use_cache=False)
    original = randomized(transformers.MixtralForCausalLM(config))
    original.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 32, (3, 7))
    with torch.no_grad():
        wanted = original(torch.from_numpy(ids)).logits
    with pytest.raises(InvalidInputsError, match=r"--input 'input_ids:int64\[batch,seq\]'"):
        convert(tmp_path, architecture="transformers:auto")
    model = convert(tmp_path, ["input_ids:int64[batch,tokens]"], architecture="transformers:auto")
    (got,) = run_onnx(model, [{"input_ids": ids}])[0].values()
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_weights_by_other_names(transformers: Any) -> None:
    """A masked-language model's file into the base model; old names of normalization; a missing head is refused."""
    config = transformers.BertConfig(**SMALL)
    trained = randomized(transformers.BertForMaskedLM(config)).state_dict()
    base, notes = load_checkpoint(transformers.BertModel(config, add_pooling_layer=False), trained)
    assert torch.equal(
        base.state_dict()["embeddings.word_embeddings.weight"], trained["bert.embeddings.word_embeddings.weight"]
    )
    assert "cls.predictions" in notes[0]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in trained.items()
        if "decoder" not in name
    }
    whole, _ = load_checkpoint(transformers.BertForMaskedLM(config), old)
    assert all(torch.equal(value, trained[name]) for name, value in whole.state_dict().items())
    with pytest.raises(InvalidInputsError, match=r"missing in the file: .*classifier\.weight"):
        load_checkpoint(transformers.BertForSequenceClassification(config), base.state_dict())


@pytest.mark.slow
def test_classes_that_the_library_does_not_have(transformers: Any, tmp_path: Path) -> None:
    """Code that comes with a model is not run, and that is said."""
    config = {"architectures": ["Strange"], "auto_map": {"AutoModel": "strange.Strange"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "strange.py").write_text("raise AssertionError('code of the folder ran')")
    with pytest.raises(
        UnsupportedFormatError, match=r"'Strange'.*code of its own \(auto_map in config\.json\), which is not run"
    ):
        convert(tmp_path, ["x:float32[2]"], architecture="transformers:auto")


def test_classes_that_do_not_import(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library imports them as they are asked for, with whatever they need; what is missing is said."""
    found = type(transformers).__getattr__

    def broken(library: Any, name: str) -> Any:
        if name == "NoSuchModel":
            raise ModuleNotFoundError("operator torchvision::nms does not exist")
        return found(library, name)

    monkeypatch.setattr(type(transformers), "__getattr__", broken)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["NoSuchModel"]}))
    with pytest.raises(InvalidInputsError, match=r"cannot import NoSuchModel here .*torchvision::nms does not exist"):
        build_auto(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"_class_name": "UNet2DModel"}, r"diffusers, 'UNet2DModel'.*diffusers:UNet2DModel\.from_pretrained\('.*'\)"),
        (
            {"architecture": "resnet18", "num_classes": 5},
            r"timm, 'resnet18'.*timm:create_model\('resnet18', num_c",
        ),
    ],
)
def test_configs_of_other_libraries(transformers: Any, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    """What builds the network is said, in the form that --architecture takes."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedFormatError, match=said) as caught:
        build_auto(tmp_path / "config.json")
    assert Architecture.parse(caught.value.message.partition('--architecture "')[2].partition('"')[0]).args


def test_weights_without_their_config() -> None:
    """What is needed is said."""
    with pytest.raises(InvalidInputsError, match=r"needs the config\.json"):
        build_auto(None)
