"""The installed package, and the small model that set-up makes."""

import importlib
import json
from importlib.metadata import entry_points, version

import pytest

from express_vllm import smallmodel


@pytest.fixture(scope="module")
def folder():
    return smallmodel.ensure()


@pytest.mark.parametrize("name", ["express_vllm", "express_vllm.backend", "express_vllm.scheduler"])
def test_packages_are_installed(name):
    importlib.import_module(name)


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.platform_plugins"])
def test_vllm_finds_the_plugin(group):
    assert callable(entry_points(group=group)["express"].load())


def test_the_distribution_that_vllm_asks_for():
    assert version("vllm").startswith("0.32.")


def test_ensure_converts_once(folder):
    before = (folder / "config.json").stat().st_mtime_ns
    assert smallmodel.ensure() == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_config(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 30
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["max_position_embeddings"] == 8192
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_tokenizer_and_answer(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ["def f(x):\n\treturn  x  # naïve 漢字 🙂", "a  2024, don't", "<|im_start|>user\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2024") == list("2024")
    assert tokenizer.tokenize("a  2") == ["a", "ĠĠ", "2"]

    # Only a model whose query and key rows are in the right order answers this.
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
