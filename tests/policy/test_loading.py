"""Loading: every kind of path gives the model that it names, or an error that says what is wrong with it."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halos.policy.construction import add_control_tokens, grow_vocabulary, set_dropout
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.lora import LoRA
from tests import tiny

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A whole model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pytest.importorskip("gguf")
    model = tiny.model("llama", vocab_size=300)
    return model, tiny.save_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", model)


def spec(path: Any, **options: Any) -> ModelSpec:
    # Their products are rounded otherwise than those of the models that were saved, on some processors.
    made = ModelSpec(path=str(path), **{"cpu_kernels": False, **options})
    made.check()
    return made


# Directories


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "gemma2"])
def test_a_directory_gives_the_model_that_was_saved(architecture: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, architecture)
    loaded = spec(tmp_path).load()
    assert loaded.training
    assert torch.equal(loaded(input_ids=IDS).logits, tiny.model(architecture, vocab_size=20)(input_ids=IDS).logits)


def test_an_architecture_without_sdpa_loads_by_default(tmp_path: Path) -> None:
    tiny.save(tmp_path, "gemma2")
    loaded = spec(tmp_path).load()
    assert torch.equal(loaded(input_ids=IDS).logits, tiny.model("gemma2", vocab_size=20)(input_ids=IDS).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(saved: Path, attention: str) -> None:
    assert spec(saved, attention=attention).load().config._attn_implementation == attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("random", [False, True])
def test_the_precision_asked_for_is_used(saved: Path, dtype: torch.dtype, random: bool) -> None:
    assert {p.dtype for p in spec(saved, random_weights=random).load(LoadOptions(dtype=dtype)).parameters()} == {dtype}


def test_a_tokenizer_comes_with_its_template(saved: Path) -> None:
    tokenizer = spec(saved).tokenizer()
    assert tokenizer.chat_template == tiny.CHATML
    assert tokenizer("hello world")["input_ids"] == tiny.word_tokenizer()("hello world")["input_ids"]


def templated(folder: Path, template: Any) -> Path:
    tiny.word_tokenizer(template).save_pretrained(folder)
    tiny.config("llama").save_pretrained(folder)
    return folder


def test_values_of_the_templates_variables_become_its_defaults(tmp_path: Path) -> None:
    folder = templated(tmp_path, "{{ mood }}")
    tokenizer = spec(folder, random_weights=True, chat_template_kwargs={"mood": "calm"}).tokenizer()
    turns = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "calm"
    assert tokenizer.apply_chat_template(turns, tokenize=False, mood="wild") == "wild"
    with pytest.raises(ValueError, match=r"^model\.chat_template_kwargs\.moody: expected a variable"):
        spec(folder, random_weights=True, chat_template_kwargs={"moody": 1}).tokenizer()


def test_of_several_templates_the_log_says_which_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = templated(tmp_path, {"default": "{{ x }}1", "rag": "2"})
    with caplog.at_level(logging.INFO):
        made = spec(folder, random_weights=True, chat_template_kwargs={"x": 0}).tokenizer()
    assert "has the chat templates default, rag: default is used" in caplog.text
    assert sorted(made.chat_template) == ["default", "rag"]
    assert spec(folder, random_weights=True, chat_template="rag").tokenizer().chat_template == "2"
    with pytest.raises(ValueError, match=r"templates a, b and none named default"):
        spec(templated(tmp_path / "other", {"a": "1", "b": "2"}), random_weights=True).tokenizer()


def test_a_template_that_writes_the_date_is_named_once_and_has_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = templated(tmp_path, "{{ strftime_now('%Y-%m-%d') }}")
    made = spec(folder, random_weights=True, chat_template_date="2026-03-05").tokenizer()
    assert made.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "2026-03-05"
    assert caplog.text.count("writes today's date: training writes 2026-03-05 throughout") == 1
    with pytest.raises(
        ValueError, match=r"^model\.chat_template_date: expected a date as YYYY-MM-DD or null, found 'x'"
    ):
        spec(folder, random_weights=True, chat_template_date="x")


@pytest.mark.parametrize(
    ("options", "expected"), [({}, tiny.EOS), ({"pad": tiny.PAD}, tiny.PAD), ({"pad": None}, tiny.EOS)]
)
def test_a_missing_pad_token_becomes_eos(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    tiny.word_tokenizer(**options).save_pretrained(tmp_path)
    tiny.config("llama").save_pretrained(tmp_path)
    assert spec(tmp_path, random_weights=True).tokenizer().pad_token == expected


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_is_on_only_where_asked_for(saved: Path, checkpointing: bool) -> None:
    assert spec(saved, gradient_checkpointing=checkpointing).load().is_gradient_checkpointing == checkpointing


# Random weights


def test_random_weights_need_none_on_disk_and_follow_the_seed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        logits.append(spec(folder, random_weights=True).load()(input_ids=IDS).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_random_weights_ignore_those_on_disk(saved: Path) -> None:
    loaded, random = spec(saved).load(), spec(saved, random_weights=True).load()
    assert not torch.equal(loaded.lm_head.weight, random.lm_head.weight)
    assert random.lm_head.weight.shape == loaded.lm_head.weight.shape


# Dropout


def dropouts(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.25])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_every_dropout_is_set(tmp_path: Path, architecture: str, probability: float, random: bool) -> None:
    names = {
        "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "gpt_neox": ("attention_dropout", "hidden_dropout"),
    }[architecture]
    probabilities: dict[str, Any] = dict.fromkeys(names, 0.1)
    tiny.save(tmp_path, architecture, **probabilities)
    loaded = spec(tmp_path, dropout=probability, random_weights=random).load()
    assert dropouts(loaded) == {probability}
    assert [getattr(loaded.config, name) for name in names] == [probability] * len(names)
    same = torch.equal(loaded(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    assert same == (probability == 0)


def test_dropout_is_off_by_default(tmp_path: Path) -> None:
    tiny.save(tmp_path, "gpt2", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    assert dropouts(spec(tmp_path).load()) == {0.0}


def test_only_dropouts_are_set_and_one_left_open_stays_open() -> None:
    config = SimpleNamespace(resid_pdrop=0.1, attention_dropout=0, classifier_dropout=None, hidden_size=16)
    config.to_dict = lambda: {name: value for name, value in vars(config).items() if name != "to_dict"}
    set_dropout(config, 0.5)  # type: ignore[arg-type]
    assert config.to_dict() == {
        "resid_pdrop": 0.5,
        "attention_dropout": 0.5,
        "classifier_dropout": None,
        "hidden_size": 16,
    }


# Vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_as_the_mean_of_the_others(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    embeddings = (model.get_input_embeddings, model.get_output_embeddings)
    before = [get().weight.detach().clone() for get in embeddings]
    grow_vocabulary(model, 70, [67, 68, 69])
    for get, old in zip(embeddings, before, strict=True):
        weight = get().weight.detach()
        assert weight.shape == (70, 16)
        assert torch.equal(weight[:67], old)
        for token in (67, 68, 69):
            torch.testing.assert_close(weight[token], old.mean(0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 70
    assert model(input_ids=torch.tensor([[66, 69]])).logits.shape == (1, 2, 70)
    assert all(p.requires_grad for p in model.parameters())


def test_new_tokens_that_have_room_already_grow_nothing() -> None:
    model = tiny.model()
    old = model.get_input_embeddings().weight.detach().clone()
    grow_vocabulary(model, 64, [62, 63])  # rows 62 to 66 were spare
    weight = model.get_input_embeddings().weight.detach()
    assert weight.shape == (67, 16)
    assert torch.equal(weight[:62], old[:62])
    assert torch.equal(weight[64:], old[64:])
    torch.testing.assert_close(weight[62:64], old[:62].mean(0).expand(2, -1))


def test_without_new_tokens_nothing_changes(saved: Path) -> None:
    assert torch.equal(
        spec(saved).load(LoadOptions(vocabulary=20))(input_ids=IDS).logits, spec(saved).load()(input_ids=IDS).logits
    )


def test_loading_can_grow_the_vocabulary(saved: Path) -> None:
    loaded = spec(saved).load(LoadOptions(vocabulary=22, new_tokens=[20, 21]))
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == 22  # type: ignore[index]
    assert torch.equal(loaded.lm_head.weight[20], loaded.lm_head.weight[21])


@pytest.mark.parametrize("make", [tiny.bpe_tokenizer, tiny.word_tokenizer])
def test_control_tokens_become_one_id_each(make: Any) -> None:
    tokenizer = make(tiny.CHATML)
    size = len(tokenizer)
    assert add_control_tokens(tokenizer, ["<|liked|>", "", "<|disliked|>"]) == [size, size + 1]
    assert tokenizer("hello<|disliked|><|liked|>", add_special_tokens=False)["input_ids"][-2:] == [size + 1, size]
    assert tokenizer.chat_template == tiny.CHATML


@pytest.mark.parametrize("make", [tiny.bpe_tokenizer, tiny.word_tokenizer])
def test_control_tokens_that_exist_are_not_added_again(make: Any) -> None:
    tokenizer = make()
    size = len(tokenizer)
    assert add_control_tokens(tokenizer, [tiny.GOOD]) == []
    assert add_control_tokens(tokenizer, [tiny.GOOD, "<|new|>", "<|new|>"]) == [size]
    assert add_control_tokens(tokenizer, [tiny.GOOD, "<|new|>"]) == []
    assert len(tokenizer) == size + 1


# Packages and hub ids


def test_a_directory_inside_a_package(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lab_of_tests" / "models"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    shutil.copytree(saved, package / "small" / "one")
    monkeypatch.syspath_prepend(tmp_path)
    made = spec("pkg://lab_of_tests.models/small/one")
    assert torch.equal(made.load()(input_ids=IDS).logits, spec(saved).load()(input_ids=IDS).logits)
    assert made.tokenizer().chat_template == tiny.CHATML


def test_the_packaged_reference_is_whole() -> None:
    made = spec("pkg://halos.toy/reference")
    assert len(made.tokenizer()) <= made.load().config.vocab_size


@pytest.mark.parametrize(
    "path",
    [
        "pkg://halos.toy/nothing",
        "/no/such/model",
        "./no/model",
        "../no/model",
        "~/no/model",
        "some/folder/model",
        "/no/model.gguf",
        "pkg://no.such.package/model",
    ],
)
def test_a_path_to_nowhere_is_refused(path: str) -> None:
    if path.endswith(".gguf"):
        pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=r"^model\.path: no such"):
        ModelSpec(path=path).check()


def test_a_misspelt_name_in_a_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.path: no such directory or file: runs/kot; .* runs is a folder"):
        ModelSpec(path="runs/kot").check()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^model\.path: expected a model directory or a \.gguf file"):
        ModelSpec(path=str(tmp_path / "model.bin")).check()


def test_a_hub_id_is_not_contacted_by_the_check() -> None:
    ModelSpec(path="nobody/nothing").check()
    ModelSpec(path="nothing").check()


@pytest.mark.parametrize("method", ["load", "tokenizer"])
@pytest.mark.parametrize("path", ["nobody/nothing", "not a hub id!"])
def test_a_hub_id_that_cannot_be_had_is_a_value_error(path: str, method: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.path: {path} could not be loaded by transformers: "):
        getattr(ModelSpec(path=path), method)()


@pytest.mark.parametrize("path", ["", None, 3])
def test_a_path_is_needed(path: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: expected a hub id, a directory or a \.gguf file, found"):
        ModelSpec(path=path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"packed_attention": "flash"}, "expected one of auto, pieces, flex; found 'flash'"),
        ({"packed_attention": "flex", "compile": True}, "expected pieces with model.compile=true, found flex"),
    ],
)
def test_packed_attention_is_pieces_or_flex_and_flex_compiles_itself(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.packed_attention: {told}"):
        ModelSpec(path="x", **options)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_is_a_probability(dropout: float) -> None:
    with pytest.raises(ValueError, match=r"^model\.dropout: expected a probability"):
        ModelSpec(path="x", dropout=dropout)


# Damage


def test_random_weights_are_checked_for_config_and_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="expected tokenizer files"):
        ModelSpec(path=str(folder), random_weights=True).check()


def test_cut_off_weights_are_found_by_the_check(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut off"):
        ModelSpec(path=str(folder)).check()


@pytest.mark.parametrize("content", ["", "{ not json"])
def test_a_damaged_config_is_a_value_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^model\.path: .* could not be loaded by transformers"):
        ModelSpec(path=str(folder)).load()


def test_a_config_of_something_else_is_a_value_error(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ValueError, match="nonsense"):
        ModelSpec(path=str(folder)).load()


def test_a_damaged_tokenizer_is_a_value_error(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^model\.path: .* could not be loaded by transformers"):
        ModelSpec(path=str(folder)).tokenizer()


def test_weights_that_lack_a_tensor_are_a_value_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.path: .*up_proj"):
        spec(folder).load()


def test_weights_of_another_shape_are_a_value_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.path: "):
        spec(folder).load()


# GGUF


def test_a_gguf_gives_the_model_that_was_saved(llama_gguf: tuple[Any, Path]) -> None:
    model, file = llama_gguf
    loaded = spec(file).load()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_gguf_holds_its_tokenizer_and_template(llama_gguf: tuple[Any, Path]) -> None:
    tokenizer = spec(llama_gguf[1]).tokenizer()
    text = "hello world, naïve <|im_end|>"
    assert tokenizer.chat_template == tiny.CHATML
    assert tokenizer(text)["input_ids"] == tiny.bpe_tokenizer()(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == (tiny.EOS, tiny.BOS)


def test_a_model_from_a_gguf_can_be_exported_and_loaded_again(llama_gguf: tuple[Any, Path], tmp_path: Path) -> None:
    model, file = llama_gguf
    loaded, tokenizer = spec(file).load(), spec(file).tokenizer()
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(spec(tmp_path).load()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_gguf_that_is_cut_off_is_found_by_the_check(llama_gguf: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(llama_gguf[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut\.gguf is cut off or damaged"):
        ModelSpec(path=str(file)).check()


def test_a_gguf_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'halos\[gguf\]'"):
        ModelSpec(path=str(tmp_path / "x.gguf")).check()


# The reference of a stream


@pytest.mark.parametrize(
    ("reference", "streaming", "lora", "expected"),
    [
        ("auto", False, False, "cached"),
        ("auto", False, True, "cached"),
        ("auto", True, False, "live"),
        ("auto", True, True, "adapter"),
        ("live", True, True, "live"),
        ("cached", False, False, "cached"),
    ],
)
def test_what_auto_is(reference: str, streaming: bool, lora: bool, expected: str) -> None:
    made = ModelSpec(path="x", reference=reference, lora=LoRA(enabled=lora))
    assert made.resolved(streaming=streaming).reference == expected


@pytest.mark.parametrize("options", [{"reference": "cached"}, {"reference_path": "y"}])
def test_a_streams_reference_is_not_cached(options: dict[str, str]) -> None:
    made = ModelSpec(path="x", **options)  # type: ignore[arg-type]
    assert made.resolved(streaming=False).reference == "cached"
    with pytest.raises(ValueError, match=r"model\.reference(_path)?: expected .* with data.streaming=true"):
        made.resolved(streaming=True)
