"""
The tests: `python -m pytest -q test_all.py`, a few minutes on two CPU cores.
"""
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from apo import apo_loss, group_advantages, grpo_loss, optimal_value, sequence_logprobs, value_loss
from model import KVCache, ModelConfig, Transformer, generate, sample
from tasks import EOS, TASKS, Countdown, CountdownProblem, Multiplication, MultiplicationProblem, Tokenizer, reachable

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = ['--d_model=32', '--n_layers=2', '--n_heads=2', '--d_ff=64', '--batch_size=32', '--warmup_batch_size=16', '--num_train_samples=32',
        '--num_eval_samples=64', '--num_responses_per_prompt=4', '--max_new_tokens=32', '--task=multiplication', '--max_factor=5']


def run(*command, ranks=0, **options):
    """A script of the repo in a process of its own, with torchrun when ranks are given; returns the finished process."""
    launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0'] if ranks else []
    return subprocess.run([sys.executable, *launcher, *map(str, command)], cwd=HERE, capture_output=True, text=True, timeout=600, **options)


def metrics(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, 'metrics.jsonl'))]


# ---- apo.py -----------------------------------------------------------------------------------------------------------

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
    assert torch.allclose(optimal_value(rewards, 1e-6), rewards.amax(1), atol=1e-4), "no overflow, and the limit is the best"
    assert torch.allclose(optimal_value(rewards, 1e6), rewards.mean(1), atol=1e-4)
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
    losses = torch.stack([apo_loss(logprobs[i:i + 1], ref.log()[i:i + 1], rewards[i:i + 1], torch.full((1,), baseline), beta2)
                          for i in range(len(ref))])
    ours, = torch.autograd.grad((weights * losses).sum(), logits, retain_graph=True)
    objective = (logprobs.exp() * (rewards - beta2 * (logprobs - ref.log()))).sum()
    theirs, = torch.autograd.grad(objective, logits)
    assert torch.allclose(ours, -theirs, atol=1e-12)


def test_value_loss_has_its_minimum_at_the_optimal_value():
    rewards = torch.tensor([[1., 1, 0, 0, 0, 0, 0, 0], [0] * 8, [1] * 8, [.5, .2, 0, 1, 1, 0, .1, 0]], dtype=torch.float64)
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


def test_grpo_advantages_and_clip():
    advantages = group_advantages(torch.tensor([[1., 0, 0, 1], [1, 1, 1, 1]]))
    assert torch.allclose(advantages[0], torch.tensor([1., -1, -1, 1]) * math.sqrt(3) / 2, atol=1e-3) and (advantages[1] == 0).all()
    old, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    for shift, gradient in ((0.0, True), (0.5, False)): # a good response that has become much more likely is left alone
        logprobs = (old + shift).requires_grad_()
        grpo_loss(logprobs, old, torch.tensor([1., 1.]), mask).backward()
        assert (logprobs.grad != 0).all() == gradient
