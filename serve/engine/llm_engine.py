"""The engine: requests in, tokens out, one step at a time. It knows nothing of HTTP and runs in one thread.

engine = LLMEngine.from_folder("OUT")
for output in engine.generate(["Hello"], SamplingParams(max_tokens=20)):
    print(output.text)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import kernels
from compressor.machine import use_threads
from serve.engine.block_manager import BlockManager
from serve.engine.compiled import BackgroundCompiler, CompiledStep, can_compile, program_path
from serve.engine.config import EngineConfig, plan_cache
from serve.engine.constraints import GrammarError
from serve.engine.detokenizer import TextStream
from serve.engine.grammar import GrammarCompiler
from serve.engine.model_runner import ModelRunner
from serve.engine.models.decoder import Decoder
from serve.engine.prompt_lookup import PromptLookup
from serve.engine.sampler import Floats, NotFiniteError, Sampled, Sampler, logprobs_of
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduled, Scheduler
from serve.engine.sequence import Sequence, Status, TokenLogprobs
from serve.engine.tokenizer import Tokenizer
from serve.engine.transformers_model import TransformersRunner
from serve.engine.weights import LoadedModel, eos_ids, load_model

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepOutput:
    """What one step brought for one sequence; not to be changed, though freezing it would cost 2 us a token."""

    seq_id: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_prompt: int = 0
    num_generated: int = 0
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: Exception | None = None


@dataclass
class GenerationOutput:
    """The whole answer to one prompt; times are seconds since the request was made."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    token_times: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def time_to_first_token(self) -> float:
        return self.token_times[0]


@dataclass
class EngineStats:
    """Counters since the start; gauges are read from the scheduler."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class LLMEngine:
    def __init__(self, loaded: LoadedModel, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.config = config
        self.loaded = loaded
        self.tokenizer = tokenizer
        self.plan = plan_cache(config, loaded.config, loaded.kv_cache_dtype)
        loaded.decoder.reach(self.plan.max_model_len)
        self.eos_token_ids = loaded.eos_token_ids | eos_ids(tokenizer.eos_token_id, loaded.config.vocab_size)
        self.runner, shares = self._runner(), isinstance(loaded.decoder, Decoder)
        if config.prompt_lookup and not shares:
            raise ValueError(f"--prompt-lookup is not served for {loaded.config.architecture}; leave it out")
        self.blocks = BlockManager(self.plan.num_blocks, self.plan.block_size, config.prefix_caching and shares)
        self.prompt_lookup = (
            PromptLookup(config.prompt_lookup, self.plan.max_model_len) if config.prompt_lookup else None
        )
        kernels.set_batch_invariant(config.deterministic)
        self.scheduler = Scheduler(
            self.blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_prefill_beside_decode,
            self.prompt_lookup,
            config.fixed_chunk if config.deterministic else None,
        )
        self.grammars = GrammarCompiler(tokenizer, loaded.config.vocab_size, self.eos_token_ids)
        self.sampler = Sampler(self.eos_token_ids)
        self.stats = EngineStats()
        self._compiler: BackgroundCompiler | None = None
        self._streams: dict[int, TextStream] = {}
        self._sequences: dict[int, Sequence] = {}

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        **settings: Any,
    ) -> LLMEngine:
        """Load a checkpoint folder; `settings` are fields of EngineConfig, `tokenizer` is the folder's, if loaded."""
        config = config or EngineConfig(**settings)
        use_threads(config.num_threads)
        folder = Path(folder)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        engine = cls(load_model(folder, config.dtype, config.deterministic), tokenizer, config)
        if config.compile and not config.deterministic:  # a program that comes later would round elsewhere
            engine._use_program(folder)
        return engine

    def _runner(self) -> ModelRunner | TransformersRunner:
        decoder = self.loaded.decoder
        return ModelRunner(decoder, self.plan) if isinstance(decoder, Decoder) else TransformersRunner(decoder)

    def _use_program(self, folder: Path) -> None:
        """Exchange the decoder for its compiled program: at once if that is on disk, else when it is made."""
        decoder, geometry = self.loaded.decoder, (self.plan.block_size, self.plan.dtype)
        if not isinstance(decoder, Decoder) or decoder.fused is not None:
            return  # all layers are one operator already
        if not can_compile(decoder):
            logger.info("steps stay uncompiled: not all operators of this model have kernels here")
            return
        path = program_path(decoder, *geometry)
        if path.is_file():
            try:
                self._exchange(CompiledStep(path, decoder))
                return
            except RuntimeError as error:
                logger.warning("the compiled program %s is damaged (%s) and is made again", path.name, error)
                path.unlink()
        self._compiler = BackgroundCompiler(folder, decoder, *geometry, self._exchange)
        if not self.config.compile_in_background:
            self._compiler.wait()

    def _exchange(self, program: CompiledStep) -> None:
        assert isinstance(self.runner, ModelRunner)
        self.runner.forward = program

    @property
    def compiled(self) -> bool:
        """Whether the layers run as native code by now: as one operator, or as a compiled program."""
        runner = self.runner
        return isinstance(runner, ModelRunner) and (
            runner.model.fused is not None or runner.forward is not runner.model
        )

    def close(self) -> None:
        """Stop what still runs in the background."""
        if self._compiler is not None:
            self._compiler.stop()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in memory, shared ones counted once."""
        return self.loaded.weight_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self.plan.num_bytes

    @property
    def max_model_len(self) -> int:
        return self.plan.max_model_len

    @property
    def max_num_seqs(self) -> int:
        return self.config.max_num_seqs

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check_prompt(self, tokens: Sequence_[int]) -> None:
        """Raise ValueError unless `tokens` can be answered."""
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        if len(tokens) > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, but this server takes at most {self.max_model_len} "
                "tokens of prompt and answer together; shorten it"
            )
        vocab = self.loaded.config.vocab_size
        if min(tokens) < 0 or max(tokens) >= vocab:
            raise ValueError(f"the prompt has token ids outside the vocabulary of {vocab} tokens")

    def add(self, prompt_tokens: list[int], params: SamplingParams, index: int = 0) -> Sequence:
        """Queue one sequence; `index` tells the n answers to one prompt apart."""
        self.check_prompt(prompt_tokens)
        self.check_params(params)
        seq = Sequence(prompt_tokens, params, index)
        self._sequences[seq.id] = seq
        self._streams[seq.id] = TextStream(
            self.tokenizer,
            prompt_tokens,
            params.stop,
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )
        self.scheduler.add(seq)
        return seq

    def abort(self, seq_id: int) -> None:
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self._forget(seq, "abort")

    def step(self) -> list[StepOutput]:
        """Compute one step for all scheduled sequences."""
        began = time.perf_counter()
        step = self.scheduler.schedule()
        if not step:
            return []
        hidden = self.runner.run(step)
        self._score_prompts(hidden, step)
        sampling = [item for item in step if item.samples]
        logits = self.runner.sample_logits(hidden, step).numpy() if sampling else ()
        self.scheduler.commit(step)
        outputs = [self._advance(item, row) for item, row in zip(sampling, logits, strict=True) if self._stands(item)]
        self._count(step, len(outputs), time.perf_counter() - began)
        return outputs

    def _stands(self, item: Scheduled) -> bool:
        """Whether what was computed for `item` counts: always, unless it is a draft that turned out wrong."""
        if item.draft is None:
            return True
        self.stats.drafted_tokens += 1
        if not item.confirmed:
            return False
        self.stats.accepted_tokens += 1
        self.scheduler.commit([item])
        return True

    def generate(
        self,
        prompts: Sequence_[str | list[int]],
        params: SamplingParams | Sequence_[SamplingParams] | None = None,
    ) -> list[GenerationOutput]:
        """Answer every prompt (text or token ids), together; for benchmarks, tests and scripts.

        GrammarError or NotFiniteError when an answer cannot be finished: the others are dropped too.
        """
        params = params or SamplingParams()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        began = time.perf_counter()
        outputs: dict[int, GenerationOutput] = {}
        try:
            for prompt, own in zip(prompts, each, strict=True):
                tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
                outputs[self.add(tokens, own).id] = GenerationOutput(tokens)
            while any(output.finish_reason is None for output in outputs.values()):
                for step in self.step():
                    if step.seq_id in outputs:
                        _collect(outputs[step.seq_id], step, time.perf_counter() - began)
        finally:
            for seq_id in outputs:
                self.abort(seq_id)
        return list(outputs.values())

    def self_test(self) -> None:
        """One greedy token with finite logits, or NotFiniteError: a broken checkpoint must not look healthy."""
        seq = Sequence([min(5, self.loaded.config.vocab_size - 1), 0], SamplingParams(max_tokens=1, temperature=0.0))
        self.blocks.extend(seq, len(seq))
        try:
            step = [Scheduled(seq, 0, len(seq))]
            logits = self.runner.sample_logits(self.runner.run(step), step)
        finally:
            self.blocks.free(seq)
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(
                "the self-test of the model gave NaN or infinite logits: the checkpoint is damaged; "
                "run `compress verify` on it, or make it again"
            )

    def check_params(self, params: SamplingParams) -> None:
        """Raise ValueError when `params` names tokens that the model does not have."""
        vocab = self.loaded.config.vocab_size
        wrong = [token for token in (*params.logit_bias, *params.stop_token_ids) if not 0 <= token < vocab]
        if wrong:
            raise ValueError(f"token id {wrong[0]} in logit_bias or stop_token_ids is outside the vocabulary ({vocab})")

    def _score_prompts(self, hidden: Tensor, step: list[Scheduled]) -> None:
        offset = 0
        for item in step:
            seq, count = item.seq, item.seq.params.prompt_logprobs
            if count is not None and item.start < seq.num_prompt and len(seq.prompt_logprobs) < seq.num_prompt:
                if not seq.prompt_logprobs:
                    seq.prompt_logprobs.append(None)
                place = item.start + 1
                for logits in self.runner.prompt_logits(hidden, offset, item.count):
                    for row in logits.numpy():
                        if len(seq.prompt_logprobs) == place < seq.num_prompt:
                            seq.prompt_logprobs.append(logprobs_of(row, seq.tokens[place], count))
                        place += 1
            offset += item.count

    def _advance(self, item: Scheduled, logits_V: Floats) -> StepOutput:
        """Sample a token, append it, and decide whether the sequence is finished."""
        seq = item.seq
        if seq.params.max_tokens == 0:  # the prompt was to be scored, nothing more
            return self._output(seq, "", None, "length", None)
        try:
            sampled = self.sampler(logits_V, seq)
        except (GrammarError, NotFiniteError) as error:
            output = self._output(seq, "", None, "error", None)
            output.error = error
            return output
        seq.append(sampled.token)
        params, stream = seq.params, self._streams[seq.id]
        ends = sampled.token in params.stop_token_ids or (sampled.token in self.eos_token_ids and not params.ignore_eos)
        stop_reason: str | int | None = None
        text = ""
        reason: str | None = None
        enough = seq.num_generated > params.min_tokens
        if ends and enough:
            reason = "stop"
            stop_reason = sampled.token if sampled.token in params.stop_token_ids else None
            text = (stream.push(sampled.token) if params.include_stop_str_in_output else "") + stream.finish()
        else:
            text = stream.push(sampled.token, may_stop=enough)
            if stream.stopped_by is not None:
                reason, stop_reason = "stop", stream.stopped_by
            elif sampled.complete or self._is_full(seq):
                reason = "stop" if sampled.complete else "length"
                text += stream.finish()
                if stream.stopped_by is not None:
                    reason, stop_reason = "stop", stream.stopped_by
        return self._output(seq, text, sampled, reason, stop_reason)

    def _is_full(self, seq: Sequence) -> bool:
        limit = seq.params.max_tokens
        return len(seq) >= self.max_model_len or (limit is not None and seq.num_generated >= limit)

    def _output(
        self, seq: Sequence, text: str, sampled: Sampled | None, reason: str | None, stop: str | int | None
    ) -> StepOutput:
        first = seq.num_generated <= 1 and seq.params.prompt_logprobs is not None
        output = StepOutput(
            seq_id=seq.id,
            text=text,
            tokens=() if sampled is None else (sampled.token,),
            logprobs=() if sampled is None or sampled.logprobs is None else (sampled.logprobs,),
            finish_reason=reason,
            stop_reason=stop,
            num_prompt=seq.num_prompt,
            num_generated=seq.num_generated,
            num_cached=seq.num_cached,
            prompt_logprobs=tuple(seq.prompt_logprobs) if first else None,
        )
        if reason is not None:
            self._forget(seq, reason)
        return output

    def _forget(self, seq: Sequence, reason: str) -> None:
        seq.finish_reason = reason
        if seq.status is not Status.FINISHED:
            self.scheduler.finish(seq)
        self.sampler.forget(seq)
        if self.prompt_lookup is not None:
            self.prompt_lookup.forget(seq)
        self._streams.pop(seq.id, None)
        self._sequences.pop(seq.id, None)

    def _count(self, step: list[Scheduled], generated: int, seconds: float) -> None:
        self.stats.steps += 1
        self.stats.step_seconds += seconds
        self.stats.generated_tokens += generated
        for item in step:
            if item.start < item.seq.num_prompt:
                self.stats.prompt_tokens += min(item.start + item.count, item.seq.num_prompt) - item.start


def _collect(output: GenerationOutput, step: StepOutput, now: float) -> None:
    if step.error is not None:
        raise step.error
    output.text += step.text
    output.token_ids += step.tokens
    output.token_times += [now] * len(step.tokens)
    output.logprobs += step.logprobs
    if step.prompt_logprobs is not None:
        output.prompt_logprobs = list(step.prompt_logprobs)
    output.finish_reason = step.finish_reason
