"""Models that the decoder does not know, through transformers' modules: the same answers as transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.checkpoint import write_manifest
from compressor.formats import make_format
from compressor.quantizers import rtn
from compressor.scheme import QuantizationConfig, Scheme
from serve.engine.config import EngineConfig
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams
from tests.serve.conftest import VOCAB, write_tokenizer
from tests.serve.test_models import PROMPT, reference

Folder = Callable[[str], Path]
FAMILIES = ("gemma2", "gpt_neox", "falcon", "opt-350m", "lfm2", "qwen3-next")
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def foreign_model(family: str) -> Any:
    """Random models: windowed layers and capped scores; partly rotary; ALiBi; norms after the blocks, a projection;
    convolutions, and recurrent states, in some layers; rotary positions for short texts and for long ones.
    """
    import transformers as t

    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "gemma2":
        more: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "sliding_window": 8}
        return t.Gemma2ForCausalLM(t.Gemma2Config(**shared, **sizes, **more, initializer_range=0.2))
    if family == "gpt_neox":
        more = {"intermediate_size": 128, "max_position_embeddings": 256, "initializer_range": 0.2}
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**shared, **sizes, **more))
    if family == "falcon":
        return t.FalconForCausalLM(t.FalconConfig(**shared, **sizes, alibi=True, initializer_range=0.2))
    if family == "lfm2":
        more = {"num_key_value_heads": 2, "intermediate_size": 128, "layer_types": ["conv", "full_attention"]}
        return t.Lfm2ForCausalLM(t.Lfm2Config(**shared, **sizes, **more, initializer_range=0.2))
    if family == "qwen3-next":
        more = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 256}
        more |= {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1}
        more |= {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")}
        more |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        more |= {f"{kind}_intermediate_size": 32 for kind in ("moe", "shared_expert")}
        return t.Qwen3NextForCausalLM(t.Qwen3NextConfig(**shared, **sizes, **more, initializer_range=0.2))
    if family == "phi3":
        rotary = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
        more = {"intermediate_size": 128, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
        return t.Phi3ForCausalLM(t.Phi3Config(**shared, **sizes, **more, rope_parameters=rotary, initializer_range=0.2))
    sizes |= {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 256}
    return t.OPTForCausalLM(t.OPTConfig(**shared, **sizes, do_layer_norm_before=False, init_std=0.2))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            foreign_model(family).eval().save_pretrained(made[family])
            write_tokenizer(made[family])
        return made[family]

    return make


def expected_tokens(folder: Path, prompt: list[int]) -> list[int]:
    model: Any = reference(folder)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(folder_of: Folder, family: str) -> None:
    """Two prompts together, in chunks of 8 tokens."""
    config = EngineConfig(dtype="float32", max_num_seqs=4, max_num_batched_tokens=8, kv_cache_gb=0.01)
    engine = LLMEngine.from_folder(folder_of(family), config)
    engine.self_test()
    prompts = [PROMPT, PROMPT[3:9]]
    answers = engine.generate(prompts, GREEDY)
    assert [answer.token_ids for answer in answers] == [expected_tokens(folder_of(family), p) for p in prompts]
    assert engine.blocks.num_used == 0 and not engine.compiled


@pytest.mark.parametrize("length", [20, 50, 100])
def test_factors_of_long_texts_do_not_change_on_the_way(
    folder_of: Folder, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    """Below the 64 tokens that the short ones are for, across them, and above: as transformers has it in one call."""
    folder, prompt = folder_of("phi3"), [(7 * i + 5) % VOCAB for i in range(length)]
    settings = {"dtype": "float32", "kv_cache_gb": 0.01, "max_num_seqs": 4, "max_num_batched_tokens": 40}
    [answer] = LLMEngine.from_folder(folder, **settings).generate([prompt], GREEDY)
    assert "--max-model-len 64" in caplog.text
    whole = [*prompt, *answer.token_ids, *[9] * 64]
    with torch.inference_mode():
        likeliest = reference(folder)(torch.tensor([whole])).logits[0].argmax(-1).tolist()
    assert answer.token_ids == likeliest[length - 1 : length + 19]
    if length == 20:
        [short] = LLMEngine.from_folder(folder, **settings, max_model_len=64).generate([prompt], GREEDY)
        assert short.token_ids == expected_tokens(folder, prompt) != answer.token_ids


def test_states_of_sequences_count(folder_of: Folder) -> None:
    """Of one that LFM2's convolution keeps, beside a token's 256 bytes: 64 channels of 3 numbers."""
    engine = LLMEngine.from_folder(folder_of("lfm2"), dtype="float32", kv_cache_gb=1e-3, max_num_seqs=100)
    assert engine.loaded.config.sequence_bytes == 64 * 3 * 4
    assert engine.plan.num_blocks == (2**30 // 1000 - 100 * 768) // (16 * 256)
    assert engine.kv_cache_bytes <= 2**30 // 1000


def test_a_cache_that_the_checkpoint_asks_for_in_vain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign_model("gpt_neox").to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig({}, kv_cache_dtype="int8").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_manifest(tmp_path)
    assert LLMEngine.from_folder(tmp_path, kv_cache_gb=0.01).plan.dtype == "bfloat16"
    assert "not in int8 as the checkpoint asks" in caplog.text


def test_preempted_sequences_lose_nothing(folder_of: Folder) -> None:
    folder = folder_of("gpt_neox")
    config = EngineConfig(dtype="float32", max_model_len=64, kv_cache_gb=64 * 1024 / 2**30)  # 64 tokens of 1 KiB
    engine = LLMEngine.from_folder(folder, config)
    prompts = [PROMPT, PROMPT[2:], PROMPT[4:]]
    answers = engine.generate(prompts, GREEDY)
    assert engine.scheduler.num_preemptions > 0
    assert [answer.token_ids for answer in answers] == [expected_tokens(folder, p) for p in prompts]


def test_scores_of_a_prompt(folder_of: Folder) -> None:
    folder = folder_of("gemma2")
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, max_num_seqs=2, max_num_batched_tokens=6)
    [answer] = engine.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    with torch.inference_mode():
        likelihood = reference(folder)(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    expected = [float(likelihood[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert answer.prompt_logprobs[0] is None
    assert [p.logprob for p in answer.prompt_logprobs[1:] if p] == pytest.approx(expected, abs=1e-3)


def test_packed_checkpoint(folder_of: Folder, tmp_path: Path) -> None:
    """Packed linears and embedding, a head tied to it: close to the same model with the unpacked weights."""
    from safetensors.torch import save_file

    model = foreign_model("gpt_neox").to(torch.bfloat16)
    blocks = {f"gpt_neox.layers.{i}.{part}" for i in range(2) for part in ("attention.dense", "mlp.dense_4h_to_h")}
    schemes = dict.fromkeys(sorted(blocks), Scheme("int8", 32)) | {"gpt_neox.embed_in": Scheme("int8", -1)}
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    unpacked = dict(stored)
    for name, scheme in schemes.items():
        tensors = make_format(scheme).pack(rtn(stored.pop(f"{name}.weight").float(), None, scheme))
        unpacked[f"{name}.weight"] = make_format(scheme).unpack(tensors).to(torch.bfloat16)
        stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    answers = []
    for kind, tensors in (("packed", stored), ("plain", unpacked)):
        folder = tmp_path / kind
        model.save_pretrained(folder)
        write_tokenizer(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if kind == "packed":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"] = QuantizationConfig.from_schemes(schemes).to_dict()
            (folder / "config.json").write_text(json.dumps(config))
            write_manifest(folder)
        engine = LLMEngine.from_folder(folder, kv_cache_gb=0.01)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        [answer] = engine.generate([PROMPT], params)
        answers.append(torch.tensor([p.logprob for p in answer.prompt_logprobs[1:] if p]))
        assert engine.loaded.formats == (("dense", "int8") if kind == "packed" else ("dense",))
    assert (answers[0] - answers[1]).norm() < 0.05 * answers[1].norm()


def test_incomplete_unknown_and_uncached_models_are_refused(folder_of: Folder, tmp_path: Path) -> None:
    import transformers as t
    from safetensors.torch import load_file, save_file

    foreign_model("falcon").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.dense_h_to_4h.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="dense_h_to_4h"):
        LLMEngine.from_folder(tmp_path, kv_cache_gb=0.01)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]}))
    with pytest.raises(ValueError, match="unsupported architecture FooForCausalLM"):
        LLMEngine.from_folder(tmp_path, kv_cache_gb=0.01)
    mamba = t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4))
    mamba.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no cache of keys and values"):
        LLMEngine.from_folder(tmp_path, kv_cache_gb=0.01)


@pytest.mark.parametrize("settings", [{"prompt_lookup": 4}, {"kv_cache_dtype": "int8"}])
def test_what_it_cannot_do_is_refused(folder_of: Folder, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not served for GPTNeoXForCausalLM"):
        LLMEngine.from_folder(folder_of("gpt_neox"), kv_cache_gb=0.01, **settings)
