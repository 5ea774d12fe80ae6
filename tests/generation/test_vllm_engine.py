"""The sampler over vLLM itself, with a tiny random model: the interpreter is named by a variable.

An engine takes some 20 s to start on a quiet core, so tests share one where they can.
"""

import os
import signal
from collections import Counter

import psutil
import pytest
import torch
from engines import VLLM_PYTHON, needs_vllm
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from trl_selfplay.generation.engine import EngineSettings, EngineWeights
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.token_filters import filter_logits
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.vllm_sampler import EngineFailure, VLLMSampler

pytestmark = [pytest.mark.vllm, needs_vllm]

PAD, EOS, NUM_IDS, NUM_LOGITS, CONTEXT = 0, 1, 259, 320, 256
OPTIONS = SamplingOptions(48, eos_token_ids=(EOS,), return_logprobs=True)
TOLERANCE = 1e-3  # of the sum of log-probs


class Policy:
    """A model with an adapter that can be changed, its folders, and an engine that samples from it."""

    def __init__(self, folder, tokenizer) -> None:
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=NUM_LOGITS,
                hidden_size=128,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=64,
                max_position_embeddings=CONTEXT,
                initializer_range=0.1,
                pad_token_id=PAD,
                eos_token_id=EOS,
                bos_token_id=None,
            )
        ).float()
        with torch.no_grad():  # padding of the vocabulary would win each time
            base.lm_head.weight[NUM_IDS:] = 3 * base.lm_head.weight[5]
        # Nothing of the checkpoint's own generation config may count.
        base.generation_config.update(eos_token_id=[7, 8], temperature=0.1, top_k=1, do_sample=True)
        base.save_pretrained(folder / "base")
        base.generation_config.eos_token_id = EOS
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
        self.model = get_peft_model(base, lora).eval()
        self.tokenizer = tokenizer
        self._folder = folder
        self.change_adapter(0)
        self.sampler = VLLMSampler(
            settings=EngineSettings(
                python=VLLM_PYTHON, dtype="float32", max_num_seqs=32, step_patience_s=60.0
            ),
            export=lambda: self.weights,
            tokenizer=tokenizer,
            traits=describe_model(self.model),
        )
        self.in_process = TransformersSampler(self.model, tokenizer)

    def change_adapter(self, version: int) -> None:
        """Give the adapter other weights, and save it."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        folder = self._folder / "adapter"
        self.model.save_pretrained(folder)
        self.weights = EngineWeights(str(self._folder / "base"), folder, 4, version)

    @torch.no_grad()
    def logprob(self, request, completion, options) -> float:
        """Compute the log-prob of a completion in one forward over all of it."""
        prompt, ids = request.prompt_ids, completion.completion_ids
        logits = self.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logits[:, NUM_IDS:] = -torch.inf
        total = 0.0
        for step, token in enumerate(ids):
            seen = torch.zeros(1, NUM_LOGITS, dtype=torch.bool)
            seen[0, [*prompt, *ids[:step]]] = True
            row = filter_logits(logits[step : step + 1].clone(), options, seen)
            total += float(row.log_softmax(-1)[0, token])
        return total

    def sample(self, requests, options=OPTIONS, batch_size=64):
        return dict(self.sampler.sample(requests, options, batch_size))

    def largest_gap(self, requests, completions, options=OPTIONS) -> float:
        gaps = [
            abs(self.logprob(requests[index], completion, options) - completion.logprob)
            for index, completion in completions.items()
        ]
        return max(gaps)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tokenizer):
    policy = Policy(tmp_path_factory.mktemp("policy"), tokenizer)
    yield policy
    policy.sampler.release()


@pytest.fixture
def requests(tokenizer) -> list[SampleRequest]:
    """Four samples of each of eight prompts."""
    texts = ["What is " + "long " * number for number in range(8)]
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    return [
        SampleRequest(prompt, (0x9E3779B97F4A7C15 * (4 * number + k + 1)) % 2**64)
        for number, prompt in enumerate(prompts)
        for k in range(4)
    ]


def test_greedy_completions_are_those_of_the_sampler_in_process(policy, requests) -> None:
    options = SamplingOptions(48, temperature=0.0, eos_token_ids=(EOS,), return_logprobs=True)
    ours = dict(policy.in_process.sample(requests, options, 64))
    theirs = policy.sample(requests, options)
    same = [i for i in ours if ours[i].completion_ids == theirs[i].completion_ids]
    assert len(same) >= 0.9 * len(requests)  # a tie in the last bit may part two texts
    assert max(abs(ours[i].logprob - theirs[i].logprob) for i in same) < TOLERANCE
    assert policy.largest_gap(requests, theirs, options) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(
    policy, requests, changes
) -> None:
    options = SamplingOptions(48, eos_token_ids=(EOS,), return_logprobs=True, **changes)
    completions = policy.sample(requests, options)
    assert sorted(completions) == list(range(len(requests)))
    assert len({c.completion_ids for c in completions.values()}) == len(requests)
    assert all(max(c.completion_ids) < NUM_IDS for c in completions.values())
    assert policy.largest_gap(requests, completions, options) < TOLERANCE


def test_first_tokens_have_the_models_frequencies(policy, tokenizer) -> None:
    prompt = tuple(tokenizer("What").input_ids)
    wanted = [SampleRequest(prompt, key) for key in range(4000)]
    options = SamplingOptions(1, top_k=8)
    counts = Counter(c.completion_ids[0] for c in policy.sample(wanted, options, 256).values())
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[:, -1]
    logits[:, NUM_IDS:] = -torch.inf
    probs = filter_logits(logits, options, None)[0].double().softmax(-1)
    kept = probs.nonzero()[:, 0].tolist()
    assert set(counts) <= set(kept)
    expected = [4000 * float(probs[token]) for token in kept]
    assert chisquare([counts[token] for token in kept], expected).pvalue > 1e-4


def test_completions_end_where_they_should(policy, requests, tokenizer) -> None:
    options = SamplingOptions(200, eos_token_ids=(EOS, 9), stop_strings=("a", "bc"))
    long = SampleRequest((40,) * (CONTEXT - 20), 5)
    completions = policy.sample([*requests, long], options)
    finishes = Counter(c.finish for c in completions.values())
    assert finishes["eos"] > 0
    assert finishes["stop"] > 0
    for completion in completions.values():
        *before, last = completion.completion_ids
        text = tokenizer.decode(before, clean_up_tokenization_spaces=False)
        assert not {EOS, 9} & {*before}
        assert "a" not in text.replace("<pad>", "")
        assert (completion.finish == "eos") == (last in (EOS, 9))
        if completion.finish == "stop":
            assert tokenizer.decode(completion.completion_ids).endswith(("a", "bc", "<pad>"))
    assert len(completions[len(requests)].completion_ids) <= 20
    without = SamplingOptions(200)
    completions = policy.sample([*requests[:2], long], without)
    assert [len(completions[i].completion_ids) for i in range(3)] == [200, 200, 20]
    assert all(c.finish == "length" for c in completions.values())


def test_prompts_that_exceed_a_step_together_are_sampled(policy) -> None:
    """With 12,000 tokens, some prompts have to wait; vLLM on a CPU can't compute a part of one."""
    wanted = [SampleRequest((3 + i, *[4 + i] * 199), i) for i in range(60)]
    options = SamplingOptions(4, return_logprobs=True)
    completions = policy.sample(wanted, options)
    assert sorted(completions) == list(range(60))
    assert policy.largest_gap(wanted, completions, options) < TOLERANCE


def test_requests_enter_while_others_decode(policy, requests) -> None:
    done, given = [], []

    def turns():
        for request in requests[:8]:
            given.append(request)
            yield request
        for _ in range(8):
            while not done:
                yield None
            index, completion = done.pop()
            prompt = (*given[index].prompt_ids, *completion.completion_ids)
            given.append(SampleRequest(prompt, 1 + index))
            yield given[-1]

    got = {}
    for index, completion in policy.sampler.sample(turns(), OPTIONS, 4):
        got[index] = completion
        if index < 8:
            done.append((index, completion))
    assert sorted(got) == list(range(16))
    assert policy.largest_gap(given, got) < TOLERANCE


def test_the_current_adapter_samples_and_a_stale_one_is_noticed(policy, requests) -> None:
    policy.change_adapter(1)
    first = policy.sample(requests)
    assert policy.largest_gap(requests, first) < TOLERANCE
    policy.change_adapter(2)
    second = policy.sample(requests)
    assert policy.largest_gap(requests, second) < TOLERANCE
    assert sum(first[i].completion_ids != second[i].completion_ids for i in first) > 16
    assert policy.largest_gap(requests, first) > 0.1  # the last round's samples are not this one's
    # What a running engine does with the same number again, were it given it.
    policy.change_adapter(3)
    policy.weights = EngineWeights(policy.weights.model, policy.weights.adapter, 4, 2)
    stale = policy.sample(requests)
    assert policy.largest_gap(requests, stale) > 0.1
    policy.change_adapter(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_a_phase_survives_its_engine_and_has_the_same_samples(
    policy, requests, number, caplog
) -> None:
    wanted = [SampleRequest(r.prompt_ids, r.stream_key + n) for n in range(3) for r in requests]
    before = policy.sample(wanted, batch_size=32)
    policy.sampler.release()
    policy.sample(requests[:1])
    members = psutil.Process(policy.sampler._process._process.pid).children(recursive=True)
    object.__setattr__(policy.sampler._process, "_patience_s", 5.0)
    got = {}
    for index, completion in policy.sampler.sample(wanted, OPTIONS, 32):
        assert index not in got
        got[index] = completion
        if len(got) == 10:
            os.kill(members[0].pid, number)
    assert sorted(got) == list(range(len(wanted)))
    what = "was ended by SIGKILL" if number == signal.SIGKILL else "did not finish a step"
    assert what in caplog.text
    same = [i for i in got if got[i].completion_ids == before[i].completion_ids]
    # Other requests decode beside them, so that sums may differ in the last bit.
    assert len(same) >= 0.95 * len(wanted)
    assert policy.largest_gap(wanted, got) < TOLERANCE
    assert not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)


def test_a_phase_sampled_again_on_another_engine_has_the_same_samples(policy, requests) -> None:
    before = policy.sample(requests, batch_size=16)
    processes = psutil.Process().children(recursive=True)
    engine = psutil.Process(policy.sampler._process._process.pid)
    members = [engine, *engine.children(recursive=True)]
    assert {*members} <= {*processes}
    policy.sampler.release()
    assert not any(m.is_running() and m.status() != psutil.STATUS_ZOMBIE for m in members)
    assert policy.sample(requests, batch_size=16) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_a_gpu_agrees_and_leaves_its_memory_free(policy, requests, tokenizer) -> None:
    """Never run: no machine at hand had a GPU and vLLM."""
    sampler = VLLMSampler(
        settings=EngineSettings(python=VLLM_PYTHON, dtype="float32", gpu_memory_utilization=0.5),
        export=lambda: policy.weights,
        tokenizer=tokenizer,
        traits=describe_model(policy.model),
        device="cuda",
    )
    torch.zeros(1, device="cuda")  # the context of this process itself
    before, _ = torch.cuda.mem_get_info()
    completions = dict(sampler.sample(requests, OPTIONS, 64))
    assert torch.cuda.mem_get_info()[0] < before - 2**30
    assert policy.largest_gap(requests, completions) < 0.1  # the device may compute in TF32
    sampler.release()
    assert torch.cuda.mem_get_info()[0] > before - 2**28


def test_memory_that_does_not_suffice_is_an_error_that_says_so(policy, requests, tokenizer) -> None:
    sampler = VLLMSampler(
        settings=EngineSettings(
            python=VLLM_PYTHON, engine_arguments={"kv_cache_memory_bytes": 2**50}
        ),
        export=lambda: policy.weights,
        tokenizer=tokenizer,
        traits=describe_model(policy.model),
    )
    with pytest.raises(EngineFailure, match="is less than requested memory"):
        list(sampler.sample(requests, OPTIONS, 4))
