"""The zoo: published sizes, every way to name a model, clear words for what is no model."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dynlrp import zoo
from dynlrp.report import PAPER_ROWS, towers
from dynlrp.zoo import ZooError, examine, families, find
from dynlrp.zoo.families import model_types

PARAMETERS = {
    "vgg16": 138_357_544,
    "resnet50": 25_557_032,
    "vit-b16": 86_567_656,
    "efficientnetv2-m": 54_139_356,
    "siglip2-so400m": 1_136_008_498,
    "wav2vec2-xls-r-300m": 315_471_520,
    "whisper-small": 241_734_912,
    "gpt2": 124_439_808,
    "roberta-large": 355_361_794,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-3-270m": 268_098_176,
    "qwen3-0.6b": 596_049_920,
    "flan-t5-large": 783_150_080,
    "deplot": 282_285_696,
    "mamba-130m": 129_135_360,
}
ROUNDED = {"wav2vec2-xls-r-300m", "whisper-small", "roberta-large", "deplot"}
"""Published in millions."""


def test_the_papers_fifteen_have_their_published_sizes() -> None:
    entries = {name: entry for name, entry in zoo.entries().items() if name.startswith("paper/")}
    assert [name.removeprefix("paper/") for name in entries] == list(PARAMETERS)
    assert set(entries) == set(PAPER_ROWS)
    for name, size in PARAMETERS.items():
        entry = entries[f"paper/{name}"]
        model = entry.build().model
        assert sum(p.numel() for p in model.parameters()) == size, name
        real = sum(p.numel() for p in model.parameters() if not p.is_meta)
        assert real <= 2_000_000, name  # Whisper computes its positions
        assert not model.training
        if name in ROUNDED:
            assert round(size / 1e6) == round(entry.published / 1e6) or abs(size / entry.published - 1) < 2e-3, name
        else:
            assert size == entry.published, name


@pytest.mark.parametrize("name", ["resnet50", "vit-b16", "gpt2", "llama-3.2-1b", "whisper-small", "deplot"])
def test_every_node_of_a_large_model_is_covered_and_verified_on_a_small_one(name: str) -> None:
    report = examine(find(name)[0], verify=True)
    assert report.verification is not None
    assert report.verification.passed, report.verification
    assert report.nodes == report.covered
    assert report.reached == report.verified > 100
    assert report.parameters == PARAMETERS[name]
    assert report.fake


def test_a_hundred_and_fifty_families() -> None:
    assert len(model_types()) >= 150
    assert set(model_types()) >= {"bert", "llama", "mamba", "mixtral", "wav2vec2", "clip", "autoformer", "detr"}


def test_names() -> None:
    assert [e.name for e in find("gpt2")] == ["paper/gpt2"]  # the paper's first
    assert [e.name for e in find("family/gpt2")] == ["family/gpt2"]
    assert [e.name for e in find("bert")] == ["family/bert"]
    assert [e.name for e in find("paper/*2*00m")] == ["paper/siglip2-so400m", "paper/wav2vec2-xls-r-300m"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bertt", "did you mean family/bert"),
        ("resnet-50", "paper/resnet50"),
        ("vit-b16x", "paper/vit-b16"),
        ("nothing*", "`dynlrp zoo` lists them"),
        ("zzzzzz", "no model is called 'zzzzzz': A model is"),
        ("./no/folder", "no model is called './no/folder': A model is"),
        ("model.onnx", "there is no file model.onnx"),
        (":x", "is not package.module:attribute"),
        ("a b:x", "is not package.module:attribute"),
        ("torch.nn:", "is not package.module:attribute"),
        ("torch..nn:x", "is not package.module:attribute"),
        ("timm/resnet18", "timm, which is not installed"),
    ],
)
def test_words_for_what_is_no_model(name: str, words: str) -> None:
    if name.startswith("timm/") and zoo.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises(ZooError) as error:
        find(name)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.nn:Linaer", "torch.nn has no 'Linaer'; it has Linear"),
        ("no_such_module:x", "there is no module 'no_such_module' here"),
        ("torch.no_such:x", "there is no module 'torch.no_such' here"),
    ],
)
def test_words_for_what_cannot_be_imported(name: str, words: str) -> None:
    """Nothing is imported before the model is built."""
    (entry,) = find(name)
    with pytest.raises(ZooError) as error:
        entry.build()
    assert words in str(error.value)


def test_a_missing_dependency_of_the_users_module_is_not_hidden(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "needy_model.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        find("needy_model:build")[0].build()


MODULE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.ReLU())

def with_inputs():
    return Net(), torch.zeros(2, 4)

model = Net()
number = 3

def bert():
    from transformers import BertConfig, BertModel
    return BertModel(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=8))
"""


def test_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(zoo, "entries", lambda: 1 / 0)  # the zoo may need packages that are not there
    for attribute, shape in (("with_inputs", None), ("Net", (2, 4)), ("model", (3, 4))):
        (entry,) = find(f"users_model:{attribute}", shape)
        report = examine(entry, verify=True)
        assert (report.nodes, report.covered, report.reached, report.verified) == (3, 3, 2, 2)
        assert report.status == "verified"
        assert not entry.keeps
    assert examine(find("users_model:bert")[0]).modality == "text"
    with pytest.raises(ZooError, match=r"as in --shape 1,3,224,224 for an image"):
        find("users_model:Net")[0].build()
    with pytest.raises(ZooError, match="gives int, not an"):
        find("users_model:number")[0].build()


def test_a_folder_with_a_configuration(tmp_path: Path) -> None:
    """Its true size without weights; a small one is explained."""
    config = transformers.MixtralConfig(architectures=["MixtralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    (entry,) = find(str(tmp_path))
    report = examine(entry, verify=True)
    assert report.parameters == 46_702_792_704
    assert report.title == "MixtralForCausalLM"
    assert report.fake
    assert report.verification is not None
    assert report.verification.passed
    assert report.nodes == report.covered > 2000
    assert report.verified > 0.9 * report.reached  # in bfloat16 there are casts that the small model has not
    digest = entry.digest
    transformers.MixtralConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    assert find(str(tmp_path))[0].digest != digest


def test_experts_of_any_type_need_no_numbers(tmp_path: Path) -> None:
    """PyTorch knows the shape of grouped products in bfloat16 alone. But for casts, the graph is the same."""
    found = []
    for dtype in ("float32", "bfloat16"):
        config = transformers.MixtralConfig(architectures=["MixtralForCausalLM"], dtype=dtype, num_hidden_layers=1)
        config.save_pretrained(tmp_path)
        report = examine(find(str(tmp_path))[0])
        assert report.fake
        assert report.nodes == report.covered
        found.append({o.name: o.nodes for o in report.operations if o.name != "ToCopyBackward0"})
    assert found[0] == found[1]
    assert found[0]["GroupedMmBackward0"] == 2


def test_a_shape_is_that_of_the_main_input(tmp_path: Path) -> None:
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "text")
    transformers.ViTConfig(num_hidden_layers=1, image_size=224).save_pretrained(tmp_path / "image")
    (text,), (image,) = (
        find(str(tmp_path / kind), shape) for kind, shape in (("text", (3, 7)), ("image", (1, 3, 224, 224)))
    )
    assert text.build().inputs["input_ids"].shape == (3, 7)
    assert image.build().inputs["pixel_values"].shape == (1, 3, 224, 224)
    (wrong,) = find(str(tmp_path / "image"), (1, 3, 96, 96))
    with pytest.raises(ZooError, match=r"\(96\*96\) doesn't match"):
        wrong.build()


SEEING = ["llava", "qwen2_vl", "gemma3", "blip-2", "llava_next", "voxtral", "t5gemma2", "mllama"]


@pytest.mark.parametrize("name", SEEING)
def test_towers_for_images_and_sound_take_part(name: str) -> None:
    """But for the last layer, where a model reads the one before, and a tower's own head."""
    report = examine(find(f"family/{name}")[0])
    assert report.modality == "multimodal"
    assert [path for _, path, *_ in towers([report]) if ".layers." not in path and not path.endswith(".head")] == []


PARTLY = {"encodec": "encoder", "llama4": "language_model", "sam2_video": "vision_encoder"}


@pytest.mark.parametrize("name", PARTLY)
def test_a_part_stands_for_what_cannot_be_explained_as_a_whole(name: str) -> None:
    report = examine(find(f"family/{name}")[0], verify=True)
    assert report.title == f"family/{name} ({PARTLY[name]})"
    assert report.status == "verified"


def test_a_head_that_is_asked_for_is_no_part() -> None:
    config = families.small_config("mimi")
    assert families.small(config).title == "family/mimi (encoder)"
    assert families.small(config, transformers.MimiModel).title == ""


def test_places_are_held_for_features() -> None:
    """Eight patches of a picture, with the tokens around them, behind the first two of the text."""
    example = find("family/qwen2_vl")[0].build()
    config = example.model.model.config
    image, start, end = config.image_token_id, config.vision_start_token_id, config.vision_end_token_id
    ids, kinds = example.inputs["input_ids"], example.inputs["mm_token_type_ids"]
    assert ids[0, 2:8].tolist() == [start, *[image] * 4, end]
    assert kinds[0].tolist() == [*[0] * 3, *[1] * 4, *[0] * 2, *[2] * 4, *[0] * 11]
    assert (ids == image).sum() == 2 * 4
    assert example.inputs["pixel_values"].shape[0] == 2 * 16  # four patches are one feature


def test_a_folder_of_a_model_that_sees(tmp_path: Path) -> None:
    """Without weights too, where nobody can count the tokens that hold a place."""
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**small, vocab_size=128, num_key_value_heads=2),
        image_token_index=90, architectures=["LlavaForConditionalGeneration"],
    ).save_pretrained(tmp_path)  # fmt: skip
    (entry,) = find(str(tmp_path))
    inputs = entry.build().inputs
    assert (inputs["input_ids"] == 90).sum() == 2 * 4
    report = examine(entry, verify=True)
    assert (report.fake, report.modality, report.status) == (True, "multimodal", "verified")
    assert [path for _, path, *_ in towers([report])] == ["model.model.vision_tower.encoder.layers.2"]


@pytest.mark.parametrize("name", ["gpt2", "family/bert", "paper/gpt*"])
def test_a_shape_for_a_model_that_has_inputs_is_refused(name: str) -> None:
    with pytest.raises(ZooError, match="comes with its inputs"):
        find(name, (1, 7))


def test_a_configuration_of_a_class_that_is_not_there(tmp_path: Path) -> None:
    transformers.BertConfig(architectures=["BertForEverything"]).save_pretrained(tmp_path)
    with pytest.raises(ZooError, match="no class 'BertForEverything'"):
        find(str(tmp_path))[0].build()


def test_the_graph_is_reported_where_no_small_model_can_be_made() -> None:
    """The shrinker knows no such model: what is known of the large one stays."""

    def unmade() -> Any:
        raise ValueError("nothing fits")

    report = examine(replace(find("family/bert")[0], small=unmade), verify=True)
    assert report.nodes == report.covered > 0
    assert report.status == "not verified"
    assert report.verification is not None
    assert report.verification.error.startswith("no small model to explain: ValueError: nothing fits (test_zoo.py:")


@pytest.mark.parametrize(
    ("name", "kind", "modality"),
    [
        ("family/bert", "BertModel", "text"),
        ("family/vit", "ViTModel", "vision"),
        ("family/wav2vec2", "Wav2Vec2Model", "audio"),
        ("family/clip", "CLIPModel", "multimodal"),
        ("family/patchtst", "PatchTSTModel", "time series"),
        ("family/decision_transformer", "DecisionTransformerModel", "actions"),
        ("paper/whisper-small", "WhisperForConditionalGeneration", "audio"),
        ("paper/vgg16", "dynlrp.zoo.nets.vgg16", "vision"),
    ],
)
def test_what_is_known_of_a_model_that_is_not_built(name: str, kind: str, modality: str) -> None:
    entry = zoo.entries()[name]
    assert (entry.kind, entry.modality()) == (kind, modality)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "has no config.json"), ("{}", "transformers cannot read"), ('{"model_type": "nope"}', "cannot read")],
)
def test_folders_that_are_no_models(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ZooError, match=words):
        find(str(tmp_path))[0].build()


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is used of timm, with two families of three models."""
    widths = {"tiny_net": 4, "large_net": 64, "other_net": 8}
    families = {"nets": ["large_net", "tiny_net"], "others": ["other_net"], "layers": []}

    def create_model(name: str, pretrained: bool) -> nn.Module:
        assert not pretrained
        model = nn.Sequential(nn.Conv2d(3, widths[name], 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
        model[3] = nn.Linear(widths[name] * 36, 3)
        if name == "other_net":  # for images of any size
            model[1], model[3] = nn.AdaptiveAvgPool2d(1), nn.Linear(widths[name], 3)
        model.default_cfg = {"input_size": (3, 8, 8)}  # type: ignore[assignment]
        return model

    module: Any = types.ModuleType("timm")
    module.__spec__ = types.SimpleNamespace(name="timm")
    module.list_modules = lambda: list(families)
    module.list_models = lambda module="": families[module] if module else list(widths)
    module.is_model = lambda name: name in widths
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.delitem(sys.modules, "dynlrp.zoo.image_models", raising=False)
    monkeypatch.delattr(zoo, "image_models", raising=False)
    caches = zoo.entries, zoo.without_timm
    for cache in caches:
        cache.cache_clear()
    yield module
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("dynlrp.zoo.image_models", None)


@pytest.mark.usefixtures("timm")
def test_models_of_timm() -> None:
    assert [name for name in zoo.entries() if name.startswith("timm/")] == ["timm/nets", "timm/others"]
    (family,) = find("timm/nets")
    assert sum(p.numel() for p in family.build().model.parameters()) == 4 * 28 + 4 * 36 * 3 + 3  # the smallest
    assert examine(family).title == "nets: tiny_net"
    for name in ("large_net", "timm/large_net"):
        (entry,) = find(name)
        report = examine(entry, verify=True)
        assert report.model == "timm/large_net"
        assert report.fake
        assert report.nodes == report.covered == 5
        assert report.reached == report.verified == 4
    with pytest.raises(ZooError, match="no model is called 'huge_net'"):
        find("huge_net")


@pytest.mark.usefixtures("timm")
def test_large_images_are_explained_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model takes them; its graph is that of its own size."""
    (fixed,), (free,) = find("timm/nets"), find("timm/others")
    assert fixed.small is not None
    assert free.small is not None
    from dynlrp.zoo import image_models

    monkeypatch.setattr(image_models, "SIDE", 7)
    assert [entry.build().inputs.shape[-1] for entry in (fixed, free)] == [8, 8]
    assert (fixed.small().inputs.shape[-1], free.small().inputs.shape[-1]) == (8, 7)
    assert examine(free, verify=True).status == "verified"


def test_a_timm_that_cannot_be_imported_is_told_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError(f"no operator for {name}")

    monkeypatch.setattr(zoo, "find_spec", lambda name: name)
    monkeypatch.setattr(zoo, "import_module", broken)
    caches = zoo.entries, zoo.without_timm
    for cache in caches:
        cache.cache_clear()
    try:
        assert find("gpt2")[0].name == "paper/gpt2"
        with pytest.raises(ZooError, match=r"timm, which cannot be imported: RuntimeError: no operator for timm"):
            find("timm/resnet18")
    finally:
        for cache in caches:
            cache.cache_clear()


def test_real_timm() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    assert examine(find("timm/resnet18")[0], verify=True).status == "verified"


def test_a_model_that_takes_none_of_the_inputs_says_why() -> None:
    from dynlrp.zoo.families import fitting

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"I do not like {len(x)}")

    with pytest.raises(ZooError) as error:
        fitting(Picky(), [{"x": torch.zeros(n)} for n in (1, 2, 2)])
    assert str(error.value).count("\n") == 2  # the same complaint once
    assert "ValueError: I do not like 1 (test_zoo.py" in str(error.value)
    assert "given {'x': (2,)}" in str(error.value)
