"""
The tests: `python -m pytest -q test_all.py`, a few minutes on two CPU cores. With SLOW=1 in front, as in .ci/run, one
more that takes minutes.
"""
import importlib
import itertools
import json
import math
import os
import random
import re
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

import train
from apo import apo_loss, group_advantages, grpo_loss, optimal_value, sequence_logprobs, value_loss
from model import (KVCache, ModelConfig, Transformer, generate, load_pretrained, read_config, sample,
                   save_pretrained)
from tasks import (END_THINK, EOS, FORMS, TASKS, WRONG, Countdown, CountdownProblem, Multiplication,
                   MultiplicationProblem, PretrainedTokenizer, ReasoningGym, Tokenizer, evaluate, reachable,
                   tokenizer_files)

train.device, train.dtype = 'cpu', 'float32' # what main() settles in a run
HERE = os.path.dirname(os.path.abspath(__file__))
# A model that learns 5 x 5 well enough in a second or two to earn rewards.
TINY = ['--task=multiplication', '--max_factor=5', '--d_model=64', '--n_layers=2', '--n_heads=2', '--d_ff=128',
        '--warmup_steps=60', '--warmup_batch_size=16', '--batch_size=32', '--num_train_samples=32',
        '--warmup_muon_learning_rate=0.02', '--max_new_tokens=32', '--num_responses_per_prompt=4',
        '--num_eval_samples=64', '--learning_rate=1e-3', '--keep_checkpoints=0']


slow = pytest.mark.skipif('SLOW' not in os.environ, reason="takes minutes: SLOW=1 python -m pytest -q test_all.py")


def run(*command, ranks=0, **options):
    """A script of the repo in a process of its own, with torchrun when ranks are given;
    returns the finished process."""
    launcher = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--master_port=0', '--rdzv_backend=c10d',
                '--rdzv_endpoint=localhost:0'] if ranks else []
    return subprocess.run([sys.executable, *launcher, *map(str, command)], cwd=HERE, capture_output=True, text=True,
                          timeout=600, **options)


def metrics(out_dir):
    return [json.loads(line) for line in open(os.path.join(out_dir, 'metrics.jsonl'))]


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


def test_grpo_advantages_and_clip():
    advantages = group_advantages(torch.tensor([[1., 0, 0, 1], [1, 1, 1, 1]]))
    assert torch.allclose(advantages[0], torch.tensor([1., -1, -1, 1]) * math.sqrt(3) / 2, atol=1e-3) \
        and (advantages[1] == 0).all()
    old, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    for shift, gradient in ((0.0, True), (0.5, False)): # a good response that has become much more likely is left alone
        logprobs = (old + shift).requires_grad_()
        grpo_loss(logprobs, old, torch.tensor([1., 1.]), mask).backward()
        assert (logprobs.grad != 0).all() == gradient


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
    tokens, mask = generate(model, PROMPTS, 40, temperature=0, eos=1)
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


def test_logprobs_of_the_cache_equal_those_of_the_training_forward():
    model, train.temperature = small_model(), 0.7
    tokens, mask = generate(model, PROMPTS, 40, temperature=0.7, eos=1, generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, len(PROMPTS), tokens.size(1), 'cpu', torch.float32)
    with torch.no_grad():
        steps = [model(tokens[:, t:t + 1], cache) for t in range(tokens.size(1) - 1)]
        trained, values = train.token_logprobs(model, tokens, mask)
    logprobs = (torch.cat([logits for logits, _ in steps], 1) / 0.7).log_softmax(-1).gather(
        2, tokens[:, 1:, None]).squeeze(2)
    train.temperature = 1.0
    assert torch.allclose(trained[:, 1:], logprobs * mask[:, 1:], atol=1e-5) and (trained[:, 0] == 0).all()
    ends = torch.tensor([len(p) - 1 for p in PROMPTS])
    assert torch.allclose(values, torch.cat([v for _, v in steps], 1)[torch.arange(len(PROMPTS)), ends], atol=1e-5)


def test_what_a_row_samples_does_not_depend_on_the_others():
    model, noise = small_model(), lambda: torch.Generator().manual_seed(5)
    together, mask = generate(model, PROMPTS, 30, eos=1, generator=noise())
    never, _ = generate(model, PROMPTS, 30, eos=-1, generator=noise()) # no row ends, so no row is ever dropped
    for row, other, marked in zip(together, never, mask):
        assert torch.equal(row[marked], other[:len(row)][marked])


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 2.0, -1.0, float('-inf'), 1.0]])
    for temperature in (1.0, 0.5):
        draws = sample(logits.expand(200_000, 5), temperature,
                       torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
        frequencies = torch.bincount(draws, minlength=5) / 200_000
        assert torch.allclose(frequencies, (logits[0] / temperature).softmax(0), atol=5e-3) and frequencies[3] == 0
    assert sample(logits, 0, torch.rand(1)).item() == 1
    assert sample(logits, 1.0, torch.tensor([0.0])).item() == 0 \
        and sample(logits, 1.0, torch.tensor([1 - 2 ** -24])).item() == 4


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


# ---- tasks.py --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', TASKS)
def test_tokens_go_round_and_demonstrations_have_the_format(name):
    task, rng = TASKS[name](), np.random.default_rng(0)
    tokenizer = Tokenizer(task.tokens)
    grades = []
    for _ in range(500):
        problem = task.problem(rng)
        prompt, demonstration = task.prompt(problem), task.demonstration(problem, rng)
        text = prompt + demonstration + EOS
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode(prompt) + tokenizer.encode(demonstration + EOS)
        grades.append(task.grade(problem, demonstration))
    assert all(g.formatted for g in grades)
    low, high = dict(countdown=(0.5, 0.75), grid=(0.5, 0.7)).get(name, (1, 1))
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
                value, used = evaluate(expression)
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
                    value, used = evaluate(expression)
                    assert value == int(result)
                    for n in used:
                        numbers.remove(n)
                    numbers.append(value)
                assert made[-1] in wanted and numbers == [problem.target]
                solved += 1
        if len(set(problem.numbers)) == 4:
            assert len(set(joins)) == len(joins), "nothing is tried twice"
    assert solved > 100


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
    ranks = []
    for p in problems:
        targets = sorted(v for v in reachable(tuple(sorted(p.numbers))) if 1 <= v <= 100)
        ranks.append((targets.index(p.target) + 0.5) / len(targets))
    assert abs(np.mean(ranks) - 0.5) < 0.02 and abs(np.std(ranks) - 12 ** -0.5) < 0.02


@pytest.mark.parametrize('name', TASKS)
def test_nothing_of_the_test_split_is_ever_trained_on(name):
    """Both sets at the default settings, by canonical form; the canonical form does not see the order."""
    task = TASKS[name]()
    held_out = {task.canonical(p) for p in train.held_out_problems(task, 2000)}
    assert len(held_out) == (2000 if name not in ('multiplication', 'equation') else len(held_out)) > 400
    for stream in (train.WARMUP, train.STAGE1, train.TRAIN):
        assert not held_out & {task.canonical(p) for step in range(10) for p, _ in train.draw(task, stream, step, 300)}
    rng = np.random.default_rng(1)
    share = np.mean([task.is_test(problem := task.problem(rng)) for _ in range(5000)])
    assert 0.07 < share < 0.13
    a, b = dict(countdown=(CountdownProblem((3, 5, 7), 22), CountdownProblem((7, 3, 5), 22)),
                multiplication=(MultiplicationProblem(3, 7), MultiplicationProblem(7, 3))).get(name, (problem, problem))
    assert task.canonical(a) == task.canonical(b) and task.is_test(a) == task.is_test(b)


@pytest.mark.parametrize('name, typed, right, wrong', [
    ('chain', '7 + 12-5', ['14', ' 14\n'], ['13', '014', '+14', '-14', '14.0', '7+12-5', '', '١٤', '1 4']),
    ('equation', '3x+7=22', ['5', ' 5 '], ['4', '15', '05', 'x=5', '5.0', '10/2', '', '-5']),
    ('equation', '3*x+7=23', [], ['5', '6']), # no whole number
    ('grid', 'S.#../.##../...../.#.#./....G', ['DDRRDDRR', 'DDDDRRRR', 'DUDDDDRRRR'],
     ['', 'DDDD', 'RRDDDDRR', 'DDRDDRRR', 'UDDDDRRRR', 'DDDDRRRRR', 'DDDDRRRRL', 'ddddrrrr', 'DDDD RRRR', 'LDDDDRR'])])
def test_the_small_tasks_accept_and_refuse(name, typed, right, wrong):
    task = TASKS[name]()
    problem = task.parse(typed)
    for answer in right + wrong:
        response = f'3{END_THINK}<answer>{answer}</answer>'
        assert task.grade(problem, response).correct == (answer in right), answer
        assert not task.grade(problem, response.replace(END_THINK, '')).formatted
    for nonsense in ('', 'hello', '1' * 300, typed + '!', 'S' * 29):
        with pytest.raises(ValueError):
            task.parse(nonsense)


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


# ---- train.py and sample.py ------------------------------------------------------------------------------------------

@pytest.fixture
def settings():
    """train.py's settings at their defaults, whatever the last test set, and its signal handlers put back."""
    def reset():
        vars(train).update(train.SETTINGS, device='cpu', dtype='float32', rank=0, world_size=1, stop_signal=0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reset()
    yield reset
    reset()


def main(reset, *arguments):
    """train.py in this process."""
    reset()
    sys.argv = ['train.py', '--device=cpu', *map(str, arguments)]
    train.main()


@pytest.mark.parametrize('arguments, words', [
    (['--learning_rat=1'], "did you mean --learning_rate?"), (['batch_size=3'], "unknown setting"),
    (['--batch_size=many'], "batch_size: invalid int value: 'many'"),
    (['--fresh_prompts=maybe'], "invalid true_or_false value"), (['--seed'], "--seed: expected one argument"),
    (['--task=chess'], "countdown, multiplication, chain"),
    (['--d_model=30', '--n_heads=4'], "n_heads=4 does not divide d_model=30"),
    (['--init_from=resume'], "nothing to resume"),
    (['--init_from=nowhere.pt'], "No such file or directory: 'nowhere.pt'"),
    (['--beta1=0'], "--beta1 must be at least 0.03"), (['--temperature=0'], "above 0"),
    (['--algorithm=ppo'], "choose from 'apo', 'grpo'"), (['--algorithm=grpo', '--batch_size=12'], "a multiple of 8"),
    (['--partial_credit=1'], "below 1"), (['--min_numbers=5'], "3 to 6 numbers"),
    (['--seed=-1'], "at least 0"), (['--eval_temperature=nan'], "at least 0"),
    (['--device=abacus'], "cannot use --device=abacus"), (['--batch_size=0.5'], "invalid int value"),
    (['--batch_size=0'], "above 0"), (['--warmup_steps=-1'], "at least 0"),
    ([f'--init_from={HERE}/assets/countdown_base.pt', '--d_model=64'], "which has 128")])
def test_a_users_mistake_gets_one_clear_line(settings, tmp_path, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(settings, f'--out_dir={tmp_path}/new', *arguments)
    assert words in error.value.code and '\n' not in error.value.code
    assert not os.path.exists(f'{tmp_path}/new')


def test_the_command_line_exits_with_one_line_and_help_lists_every_setting():
    process = run('train.py', '--warmup_steps=1', '--out_dir=/dev/null/run')
    assert process.returncode == 1 and process.stderr == 'error: /dev/null/run: Not a directory\n'
    process = run('train.py', '--bach_size', '3')
    assert process.returncode == 1 and process.stderr.count('\n') == 1 \
        and 'did you mean --batch_size?' in process.stderr
    text = run('train.py', '--help').stdout
    assert all(f'  --{name} ' in text for name in train.SETTINGS)
    assert 'temperature of V*' in text


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """One tiny run with a checkpoint at every step and all that A*PO offers switched on; its out_dir and arguments."""
    out = tmp_path_factory.mktemp('runs') / 'whole'
    arguments = [*TINY, '--max_steps=8', '--checkpoint_interval=2', '--eval_interval=1', '--ref_update_interval=4']
    process = run('train.py', *arguments, f'--out_dir={out}', '--device=cpu',
                  env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert process.returncode == 0, process.stderr
    assert process.stderr == '', "a default run prints no warning"
    return str(out), arguments


def test_a_run_leaves_what_it_promises(trained):
    out, _ = trained
    summary = json.load(open(f'{out}/results_summary.json'))
    for name in ('task', 'accuracy', 'interval_95', 'accuracy_by_difficulty', 'average_reward', 'accuracy_after_warmup',
                 'parameters', 'seconds', 'settings', 'versions', 'git_commit', 'tokens_per_second', 'seconds_rollout'):
        assert name in summary
    assert summary['settings']['d_model'] == 64 and summary['settings']['n_layers'] == 2
    assert os.path.getsize(f'{out}/curves.png') > 10_000
    rows = metrics(out)
    assert [r['step'] for r in rows if r['phase'] == 'warm-up'] == list(range(1, 61))
    steps = [r for r in rows if r['phase'] == 'apo']
    assert [r['step'] for r in steps] == list(range(61, 69))
    assert [r['step'] for r in rows if r['phase'] == 'evaluation'] == [50, *range(60, 69)]
    for name in ('reward', 'accuracy', 'kl', 'residual', 'residual_std', 'value_zero', 'truncated', 'entropy',
                 'grad_norm', 'seconds_rollout', 'seconds_update'):
        assert all(math.isfinite(r[name]) for r in steps), name
    assert abs(steps[0]['kl']) < 1e-4, "the first step is taken from the reference itself"
    assert any(r['reward'] > 0 for r in steps), "no reward, so this run tests little"
    assert {'correct', 'response', 'prompt'} <= set(json.loads(open(f'{out}/samples.jsonl').readline()))


def weights(path):
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    for x, y in zip(a['model'].items(), b['model'].items()):
        assert x[0] == y[0] and torch.equal(x[1], y[1]), x[0]


@pytest.mark.parametrize('step', [30, 60, 62, 64, 66])
def test_resume_equals_uninterrupted_to_the_bit(trained, tmp_path, step):
    """From the warm-up, from behind stage 1, and after a refresh of the reference."""
    out, arguments = trained
    os.makedirs(tmp_path / 'part')
    os.link(f'{out}/checkpoint_step_{step}.pt', tmp_path / 'part' / f'checkpoint_step_{step}.pt')
    process = run('train.py', f'--out_dir={tmp_path}/part', '--init_from=resume',
                  env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert process.returncode == 0, process.stderr
    assert_same(weights(f'{out}/tinyzero_astarpo_final.pt'), weights(tmp_path / 'part' / 'tinyzero_astarpo_final.pt'))


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=slow)])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(trained, tmp_path, kills):
    """kill -9 after some steps, or in the middle of writing a checkpoint: a half of one is left behind then."""
    out, arguments = trained
    rng, command = random.Random(kills), [sys.executable, 'train.py', f'--out_dir={tmp_path}/run', '--device=cpu']
    arguments, environment = [*arguments, '--checkpoint_interval=1'], {**os.environ, 'OMP_NUM_THREADS': '1'}
    killed, in_a_save = 0, 0
    for attempt in range(kills):
        extra, before = ['--init_from=resume'] if attempt else arguments, len(train.checkpoints(tmp_path / 'run'))
        process = subprocess.Popen([*command, *extra], cwd=HERE, env=environment, stdout=subprocess.DEVNULL)
        steps = rng.randrange(1, 4)
        while process.poll() is None and len(train.checkpoints(tmp_path / 'run')) < before + steps:
            time.sleep(0.001)
        while attempt % 2 and process.poll() is None and not list((tmp_path / 'run').glob('*.pt.tmp')):
            pass
        time.sleep(0 if attempt % 2 else rng.random() / 20)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        in_a_save += bool(list((tmp_path / 'run').glob('*.pt.tmp')))
    assert killed >= 0.7 * kills and in_a_save
    done = subprocess.run([*command, '--init_from=resume'], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(weights(f'{out}/tinyzero_astarpo_final.pt'), weights(tmp_path / 'run' / 'tinyzero_astarpo_final.pt'))
    strip = lambda rows: [{k: v for k, v in row.items() if 'seconds' not in k} for row in rows]
    assert strip(metrics(out)) == strip(metrics(tmp_path / 'run')), "every step and evaluation is logged once"
    assert open(f'{out}/samples.jsonl').read() == open(tmp_path / 'run' / 'samples.jsonl').read()


@pytest.mark.parametrize('extra', [
    ['--algorithm=grpo'], ['--fresh_prompts=False', '--ref_update_interval=3', '--filter_failed=True'],
    ['--dtype=float16'], ['--dtype=bfloat16']])
def test_resume_is_exact_for_grpo_stored_values_and_low_precision(settings, tmp_path, extra):
    arguments = [*TINY, '--checkpoint_interval=2', *extra]
    torch.set_num_threads(1)
    main(settings, *arguments, '--max_steps=6', f'--out_dir={tmp_path}/whole')
    os.makedirs(tmp_path / 'part')
    os.link(tmp_path / 'whole' / 'checkpoint_step_64.pt', tmp_path / 'part' / 'checkpoint_step_64.pt')
    main(settings, '--init_from=resume', f'--out_dir={tmp_path}/part')
    assert_same(weights(tmp_path / 'whole' / 'tinyzero_astarpo_final.pt'),
                weights(tmp_path / 'part' / 'tinyzero_astarpo_final.pt'))


@pytest.mark.parametrize('algorithm', ['apo', 'grpo'])
def test_a_star_po_raises_the_accuracy(settings, tmp_path, algorithm):
    """Learning itself: from a warm-up that was cut short, a minute of A*PO (and of GRPO, to compare with)."""
    main(settings, *TINY, f'--algorithm={algorithm}', '--warmup_steps=70', '--max_steps=120', '--batch_size=64',
         '--learning_rate=3e-4', f'--out_dir={tmp_path}/run')
    rewards = [row['reward'] for row in metrics(tmp_path / 'run') if row['phase'] == algorithm]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:10]) + 0.1


def test_without_matplotlib_a_run_says_once_what_is_missing(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    main(settings, *TINY, '--warmup_steps=100', '--eval_interval=1', '--max_steps=0', f'--out_dir={tmp_path}/run')
    said = capsys.readouterr().out
    assert said.count('pip install matplotlib') == 1 and 'held-out at step 50' in said
    assert not os.path.exists(tmp_path / 'run' / 'curves.png')


def test_a_gradient_that_is_not_finite_changes_nothing_and_five_end_the_run(settings, tmp_path):
    train.configure([*TINY, f'--out_dir={tmp_path}'])
    for train.dtype, patience in (('float32', 5), ('float16', 25)):
        run = train.build(None)
        before = {name: p.clone() for name, p in run.model.state_dict().items()}
        for step in range(patience - 1):
            run.model.norm.weight.grad = torch.full_like(run.model.norm.weight, math.nan)
            train.optimizer_step(run)
            assert run.bad_steps == step + 1 and run.model.norm.weight.grad is None
        assert all(torch.equal(p, before[name]) for name, p in run.model.state_dict().items())
        assert run.loss_scale == (1 if patience == 5 else 2.0 ** (16 - 24)), "float16 tries smaller ones first"
        run.model.norm.weight.grad = torch.full_like(run.model.norm.weight, math.inf)
        with pytest.raises(SystemExit, match=f'not finite in {patience} steps in a row.*learning_rate'):
            train.optimizer_step(run)
        run.bad_steps = 3
        for p in run.model.parameters():
            p.grad = torch.ones_like(p)
        train.optimizer_step(run)
        assert run.bad_steps == 0 and not torch.equal(run.model.norm.weight, before['norm.weight'])


def test_the_value_head_does_not_shrink_the_policys_step(settings, tmp_path):
    """Clipped together, the head's gradient, which is large where beta1 is small, would take its place."""
    train.configure([*TINY, f'--out_dir={tmp_path}'])
    run, seen = train.build(None), []
    run.optimizers = [types.SimpleNamespace(step=lambda: seen.extend(p.grad.norm().item() for p in (
        run.model.norm.weight, run.model.value_head.weight)))]
    run.model.norm.weight.grad = torch.full_like(run.model.norm.weight, 0.01)
    run.model.value_head.weight.grad = torch.full_like(run.model.value_head.weight, 1000.0)
    norm = train.optimizer_step(run)
    assert norm == pytest.approx(0.01 * 8) and seen == pytest.approx([norm, train.grad_clip], rel=1e-4) # d_model 64


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


def test_half_precision_has_the_gradient_of_float32_and_its_sampler_the_policys_probabilities(settings, tmp_path):
    """A*PO's gradients are small, for beta2 is: float16 would lose them without its loss scale."""
    train.configure([*TINY, f'--out_dir={tmp_path}'])
    gradients = {}
    for train.dtype in ('float32', 'bfloat16', 'float16'):
        run = train.build(None)
        run.base, run.step = train.frozen_copy(run.model), train.warmup_steps
        run.reference = run.base
        problems, _ = train.training_problems(run)
        batch, seconds = train.rollout(run, problems, train.TRAIN, 1.0)
        if train.dtype == 'float32':
            same = batch
        logprobs, sampler_logprobs = (train.token_logprobs(model, batch['tokens'], batch['mask'])[0].sum(1).detach()
                                      for model in (run.model, run.sampler))
        assert abs((sampler_logprobs - logprobs).mean()) < 0.01, "KL at step 0"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, 'optimizer_step', lambda run: gradients.update({train.dtype: torch.cat(
                [p.grad.flatten() / run.loss_scale for p in run.model.parameters() if p.grad is not None])}) or 0.0)
            train.update(run, same, torch.ones(len(problems)), dict(seconds))
        off = gradients[train.dtype] - gradients['float32']
        assert off.norm() < 0.05 * gradients['float32'].norm(), train.dtype


@pytest.mark.parametrize('bias, value', [(5.0, 1), (-5.0, 0)])
def test_values_of_the_head_stay_within_the_rewards(settings, tmp_path, bias, value):
    train.configure([*TINY, f'--out_dir={tmp_path}'])
    run = train.build(None)
    run.reference = run.base = train.frozen_copy(run.model)
    run.step = train.warmup_steps
    torch.nn.init.constant_(run.model.value_head.bias, bias)
    problems, stored_values = train.training_problems(run)
    batch, seconds = train.rollout(run, problems, train.TRAIN, 1.0)
    assert train.update(run, batch, stored_values, seconds)['value'] == value


def test_metrics_also_go_to_a_tracker_and_a_missing_one_is_named(settings, tmp_path, monkeypatch):
    logged, arguments = [], [*TINY, '--warmup_steps=2', '--max_steps=0', '--num_eval_samples=8']
    tracker = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))
    fake = types.SimpleNamespace(init=lambda **options: options['config']['warmup_steps'] == 2 and tracker)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    main(settings, *arguments, '--tracker=wandb', f'--out_dir={tmp_path}/run')
    assert [step for step, _ in logged] == [1, 2, 2] and 'warm-up/loss' in logged[0][1]
    assert logged[-1][1]['evaluation/count'] == 3
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(SystemExit, match='--tracker=wandb needs a package that is not installed: pip install wandb'):
        main(settings, *arguments, '--tracker=wandb', f'--out_dir={tmp_path}/without')


def test_activation_checkpointing_changes_no_gradient(settings):
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


def test_micro_batches_hold_every_row_once_and_keep_to_their_size(settings):
    train.micro_batch_tokens, rng = 256, np.random.default_rng(0)
    for _ in range(50):
        lengths = torch.tensor(rng.integers(1, 400, rng.integers(1, 40))) # some rows alone are longer than 256
        mask = torch.arange(400) < lengths[:, None]
        pieces = train.micro_batches(mask)
        assert torch.equal(torch.cat(pieces).sort().values, torch.arange(len(lengths)))
        assert all(len(rows) == 1 or len(rows) * -(-int(lengths[rows].max()) // 16) * 16 <= 256 for rows in pieces)
    mask = torch.arange(400) < torch.tensor([20] * 8 + [200])[:, None]
    assert [len(rows) for rows in train.micro_batches(mask)] == [1, 8], "one long row does not pad the short ones"


def test_two_and_four_ranks_take_the_steps_of_one(trained, tmp_path):
    """Sharded over processes, with greedy sampling: the same problems, gradients and weights as one process. And what
    two ranks saved goes on with four."""
    driver = tmp_path / 'driver.py'
    driver.write_text("import train\nsampled = train.generate\n"
                      "train.generate = lambda model, prompts, n, temperature, *rest: "
                      "sampled(model, prompts, n, 0, *rest)\n"
                      "if __name__ == '__main__':\n    train.main()\n")
    environment = {**os.environ, 'PYTHONPATH': HERE, 'OMP_NUM_THREADS': '1'}
    tiny = [*TINY, '--device=cpu', '--micro_batch_tokens=512', '--checkpoint_interval=5']
    # Stage 1 would refuse a model as raw as that of the short warm-up, so stage 2 starts from another one.
    warmup, stage2 = [*tiny, '--warmup_steps=10', '--max_steps=0'], [
        *tiny, '--warmup_steps=0', '--max_steps=3', '--learning_rate=1e-5', '--value_learning_rate=1e-4',
        f'--init_from={trained[0]}/tinyzero_astarpo_final.pt']
    os.makedirs(tmp_path / 'resumed') # by four ranks, from what two saved
    for name, ranks, arguments in [('warmup1', 1, warmup), ('warmup2', 2, warmup),
                                   ('resumed', 4, ['--init_from=resume']),
                                   ('warmup2_offload', 2, [*warmup, '--cpu_offload=True']),
                                   ('stage1', 1, stage2), ('stage2', 2, stage2), ('stage4', 4, stage2),
                                   ('stage1_offload', 1, [*stage2, '--cpu_offload=True'])]:
        process = run(driver, *arguments, f'--out_dir={tmp_path}/{name}', ranks=ranks, env=environment)
        assert process.returncode == 0, process.stderr
        if name == 'warmup2':
            shutil.copy(tmp_path / name / 'checkpoint_step_5.pt', tmp_path / 'resumed')
    for one, more in [('warmup1', 'warmup2'), ('warmup1', 'resumed'), ('warmup1', 'warmup2_offload'),
                      ('stage1', 'stage2'), ('stage1', 'stage4'), ('stage1', 'stage1_offload')]:
        a, b = (weights(tmp_path / name / 'tinyzero_astarpo_final.pt')['model'] for name in (one, more))
        # Where a gradient is nearly 0 rounding decides its sign, and AdamW steps as far as elsewhere: not quite all.
        apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
        assert (apart > 5e-6).float().mean() < 1e-3 and apart.max() < 1e-4, (one, more)
        rows = {row['step']: row for row in metrics(tmp_path / one) if row['phase'] != 'evaluation'}
        for row in [row for row in metrics(tmp_path / more) if row['phase'] != 'evaluation']:
            for name in ('loss', 'reward', 'kl', 'residual', 'grad_norm', 'length', 'accuracy'):
                a, b = rows[row['step']].get(name, 0), row.get(name, 0)
                assert abs(a - b) < 1e-4 + 3e-3 * abs(a), (one, more, row['step'], name)


@pytest.fixture
def hosts():
    """Two hosts, each the words before a command and its variables: network namespaces with a cable between them where
    this machine allows that, else this machine twice."""
    names = [f'tinyzero{os.getpid()}{x}' for x in 'ab']
    ip = lambda *words: subprocess.run(['ip', *words], capture_output=True).returncode == 0
    separate = shutil.which('ip') and all(ip('netns', 'add', name) for name in names) and ip(
        'link', 'add', 'cable', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'cable', 'netns', names[1])
    for i, name in enumerate(names if separate else []):
        ip('-n', name, 'address', 'add', f'10.99.0.{i + 1}/24', 'dev', 'cable')
        ip('-n', name, 'link', 'set', 'cable', 'up')
        ip('-n', name, 'link', 'set', 'lo', 'up')
    yield [(['ip', 'netns', 'exec', name], '10.99.0.1', dict(GLOO_SOCKET_IFNAME='cable')) for name in names] \
        if separate else [([], '127.0.0.1', {})] * 2
    for name in names:
        ip('netns', 'delete', name) if shutil.which('ip') else None


def test_two_nodes_take_the_steps_of_one(hosts, tmp_path):
    """Two launchers that meet, as the README says for several nodes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    arguments = [*TINY, '--warmup_steps=5', '--max_steps=0', '--num_eval_samples=8', '--device=cpu']
    nodes = [subprocess.Popen([*host, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
                               f'--node_rank={i}', f'--master_addr={address}', f'--master_port={port}',
                               'train.py', *arguments, f'--out_dir={tmp_path}/two'], cwd=HERE,
                              env={**os.environ, **variables, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for i, (host, address, variables) in enumerate(hosts)]
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert 'warm-up 5/5' in said[0][0] and said[1][0] == '', "rank 0 alone speaks"
    assert run('train.py', *arguments, f'--out_dir={tmp_path}/one').returncode == 0
    one, two = (weights(tmp_path / name / 'tinyzero_astarpo_final.pt')['model'] for name in ('one', 'two'))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_a_second_run_does_not_overwrite_the_first(settings, trained):
    out, arguments = trained
    with pytest.raises(SystemExit, match='already holds a run.*resume'):
        main(settings, *arguments, f'--out_dir={out}')


def test_damaged_and_foreign_checkpoints_are_refused(settings, trained, tmp_path):
    out, arguments = trained
    whole = open(f'{out}/tinyzero_astarpo_final.pt', 'rb').read()
    def damaged(start, end):
        return whole[:start] + bytes(byte ^ 0xff for byte in whole[start:end]) + whole[end:]
    cuts = [len(whole) * i // 200 for i in range(201)]
    for content in [b'', b'hello', whole[:100], whole[:len(whole) // 2], whole[:-1], whole[1000:], b'\0' * 5000,
                    *map(damaged, cuts, cuts[1:]), *(damaged(i, i + 1) for i in range(len(whole) - 400, len(whole)))]:
        (tmp_path / 'bad.pt').write_bytes(content)
        try:
            assert_same(train.load_checkpoint(str(tmp_path / 'bad.pt')),
                        weights(f'{out}/tinyzero_astarpo_final.pt')) # harmless, or refused
        except SystemExit as error:
            assert 'bad.pt' in error.code and '\n' not in error.code
    with pytest.MonkeyPatch.context() as patch, \
            pytest.raises(SystemExit, match='cannot use .*bad.pt as a checkpoint.*not yours'):
        patch.setattr(train.zipfile, 'ZipFile', lambda path: (_ for _ in ()).throw(PermissionError(13, 'not yours')))
        train.load_checkpoint(str(tmp_path / 'bad.pt'))
    torch.save(dict(weights=torch.zeros(3)), tmp_path / 'foreign.pt')
    with pytest.raises(SystemExit, match='foreign.pt as a checkpoint of this program: it does not say'):
        main(settings, f'--init_from={tmp_path}/foreign.pt', f'--out_dir={tmp_path}/new')
    with pytest.raises(SystemExit, match='does not fit --task=countdown'):
        main(settings, f'--init_from={out}/tinyzero_astarpo_final.pt', '--task=countdown', f'--out_dir={tmp_path}/new')


def test_resuming_passes_over_a_damaged_checkpoint_and_old_ones_go(settings, trained, tmp_path, capsys):
    for step in (62, 64, 66):
        shutil.copy(f'{trained[0]}/checkpoint_step_{step}.pt', tmp_path)
    (tmp_path / 'checkpoint_step_66.pt').write_bytes(b'half a check')
    main(settings, '--init_from=resume', f'--out_dir={tmp_path}', '--keep_checkpoints=2')
    said = capsys.readouterr().out
    assert 'cannot use' in said and 'checkpoint_step_66.pt as a checkpoint' in said and 'passing over it' in said \
        and 'resuming at step 64' in said
    assert sorted(path.name for path in tmp_path.glob('checkpoint*')) == ['checkpoint_step_67.pt',
                                                                          'checkpoint_step_68.pt']
    assert_same(weights(tmp_path / 'tinyzero_astarpo_final.pt'), weights(f'{trained[0]}/tinyzero_astarpo_final.pt'))
    for path in tmp_path.glob('checkpoint*'):
        path.write_bytes(b'')
    with pytest.raises(SystemExit, match='cannot use .*checkpoint_step_67.pt as a checkpoint'):
        main(settings, '--init_from=resume', f'--out_dir={tmp_path}')


def test_out_of_memory_names_the_settings_to_lower(tmp_path):
    driver = tmp_path / 'driver.py'
    driver.write_text("import runpy, sys, torch\nsys.argv[0] = 'train.py'\n"
                      "torch.nn.utils.clip_grad_norm_ = lambda *_: torch.empty(2 ** 60)\n"
                      "runpy.run_path('train.py', run_name='__main__')\n")
    process = run(driver, *TINY, '--warmup_steps=1', f'--out_dir={tmp_path}/run', '--device=cpu',
                  env={**os.environ, 'PYTHONPATH': HERE})
    assert process.returncode == 1 and process.stderr.count('\n') == 1, process.stderr
    assert re.match('error: rank 0 is out of memory: lower --micro_batch_tokens=2048, --rollout_rows', process.stderr)


def test_where_memory_runs_out_a_step_is_taken_in_smaller_pieces(settings, tmp_path, monkeypatch, capsys):
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *args: norms.append(clip(*args).item()) or
                        torch.tensor(norms[-1]))
    main(settings, *TINY, '--max_steps=2', f'--out_dir={tmp_path}/whole')
    scored, sampled, large = train.token_logprobs, train.generate, itertools.count()

    def small_score(model, tokens, mask):
        if tokens.numel() > 100 and next(large): # the first one passes and leaves its gradient
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')
        return scored(model, tokens, mask)

    def small_sample(model, prompts, *options):
        if len(prompts) > 40:
            raise RuntimeError('MPS backend out of memory')
        return sampled(model, prompts, *options)

    monkeypatch.setattr(train, 'token_logprobs', small_score)
    monkeypatch.setattr(train, 'generate', small_sample)
    main(settings, *TINY, '--max_steps=2', '--micro_batch_tokens=200', f'--out_dir={tmp_path}/pieces')
    assert 'going on with --micro_batch_tokens=100' in (said := capsys.readouterr().out) and '--rollout_rows=32' in said
    kept = torch.load(tmp_path / 'pieces/checkpoint_step_62.pt')['settings']
    assert kept['micro_batch_tokens'] == 100 and kept['rollout_rows'] == 32
    whole, pieces = norms[:4], norms[len(norms) // 2:][:4]
    assert pieces == pytest.approx(whole, rel=1e-3), "no gradient is lost or counted twice"


def test_a_hint_says_once_why_the_reward_is_flat(settings, capsys):
    healthy = dict(reward=0.5, truncated=0.0, base_kl=1.0, formatted=1.0)
    run = train.Run(None, None, None, None)
    for run.step in range(train.warmup_steps + 1, train.warmup_steps + 61):
        train.hint(run, healthy | dict(reward=0.3 + run.step / 100))
    assert capsys.readouterr().out == '', "a run that learns gets no advice"
    for sign, advice in [(dict(truncated=0.9), '--max_new_tokens'), (dict(reward=0.1, base_kl=50.0), 'KL is large'),
                         (dict(reward=0.1, formatted=0.2), 'keep the format'), (dict(), 'the reward is flat')]:
        run = train.Run(None, None, None, None)
        for run.step in range(train.warmup_steps + 1, train.warmup_steps + 61):
            step = run.step - train.warmup_steps - 1
            train.hint(run, healthy | (sign if step > 5 else {}))
        assert sum(advice in line for line in capsys.readouterr().out.splitlines()) == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)
    torch.save(dict(format=train.FORMAT, model=Evil()), tmp_path / 'evil.pt')
    with pytest.raises(SystemExit, match='Weights only load failed'):
        train.load_checkpoint(str(tmp_path / 'evil.pt'))
    assert not os.path.exists(tmp_path / 'owned')


def test_a_signal_finishes_the_step_and_saves(tmp_path):
    process = subprocess.Popen([sys.executable, 'train.py', *TINY, '--warmup_steps=100000',
                                f'--out_dir={tmp_path}/run', '--device=cpu'], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not os.path.exists(tmp_path / 'run' / 'metrics.jsonl'):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    step = int(re.fullmatch(r'error: stopped by a signal at step (\d+); '
                            r'continue with --init_from=resume --out_dir=\S+\n', message)[1])
    assert process.returncode == 1 and weights(tmp_path / 'run' / f'checkpoint_step_{step}.pt')['step'] == step


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    driver = tmp_path / 'driver.py'
    driver.write_text("import time, train\ntrain.warm_up_step = lambda run: (print('in a step', flush=True), "
                      "time.sleep(60))\ntrain.main()\n")
    process = subprocess.Popen([sys.executable, driver, *TINY, f'--out_dir={tmp_path}/run', '--device=cpu'], cwd=HERE,
                               env={**os.environ, 'PYTHONPATH': HERE}, stdout=subprocess.PIPE, text=True)
    while 'in a step' not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the step is finished first"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT


def test_a_full_disk_gets_one_line_and_leaves_the_last_checkpoint_whole(trained, tmp_path):
    resource = pytest.importorskip('resource', reason="needs limits as Unix has them")
    shutil.copy(f'{trained[0]}/checkpoint_step_62.pt', tmp_path)
    limit = os.path.getsize(tmp_path / 'checkpoint_step_62.pt') // 2 # no file may be larger
    process = run('train.py', '--init_from=resume', f'--out_dir={tmp_path}', '--device=cpu',
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert process.returncode == 1 and process.stderr.count('\n') == 1
    assert re.match('error: could not write .*, earlier ones are whole; is the disk full', process.stderr)
    assert [path.name for path in tmp_path.glob('checkpoint*')] == ['checkpoint_step_62.pt']
    train.load_checkpoint(str(tmp_path / 'checkpoint_step_62.pt'))


def test_a_rank_that_dies_ends_the_others(tmp_path):
    driver = tmp_path / 'driver.py'
    driver.write_text("import os, runpy, signal, sys, torch\nsys.argv[0] = 'train.py'\nstep = torch.optim.AdamW.step\n"
                      "torch.optim.AdamW.step = lambda *a: step(*a) if os.environ['RANK'] == '0' else "
                      "os.kill(os.getpid(), signal.SIGKILL)\nrunpy.run_path('train.py', run_name='__main__')\n")
    started = time.time()
    process = run(driver, *TINY, f'--out_dir={tmp_path}/run', '--device=cpu', ranks=2,
                  env={**os.environ, 'PYTHONPATH': HERE})
    assert process.returncode != 0 and time.time() - started < 60
    assert 'error: rank 0 lost another rank, which died; go on with --init_from=resume' in process.stderr


def test_nothing_to_learn_from_is_said(settings, tmp_path):
    with pytest.raises(SystemExit, match='nothing to learn from.*warmup_steps'):
        main(settings, *TINY, '--warmup_steps=1', '--max_steps=1', f'--out_dir={tmp_path}/run')


def test_truncated_responses_earn_nothing(settings, monkeypatch):
    """Right up to the limit, but without end-of-sequence: one place decides, for stage 1, stage 2 and evaluation."""
    task = Multiplication()
    tokenizer = Tokenizer(task.tokens)
    problem = MultiplicationProblem(3, 4)
    prompt, response = tokenizer.encode(task.prompt(problem)), tokenizer.encode('</think><answer>12</answer>')
    def fake(model, prompts, *rest):
        rows = torch.tensor([prompt + response + [tokenizer.eos], prompt + response + [tokenizer.ids['\n']]])
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        mask[:, len(prompt):] = True
        return rows, mask
    monkeypatch.setattr(train, 'generate', fake)
    train.rollout_rows = 8
    batch, _ = train.rollout(train.Run(task, tokenizer, None, None), [problem, problem], train.TRAIN, 1.0)
    assert batch['reward'].tolist() == [1, 0] and batch['correct'].tolist() == [1, 0] \
        and batch['truncated'].tolist() == [0, 1]


def test_tasks_say_what_is_wrong_with_a_problem_or_an_answer():
    task, problem = Countdown(), CountdownProblem((3, 5, 7), 22)
    assert task.explain(problem, '3*5+5') == task.explain(problem, '3*5') == 'it does not use each number once'
    assert task.explain(problem, '3+5+7') == 'it makes 15' and task.explain(problem, '(5-3)/7') == 'it makes 2/7'
    assert task.explain(CountdownProblem((1, 1, 2), 5), '2/(1-1)') == 'it divides by zero'
    assert task.remark(problem) == '' and task.remark(CountdownProblem((1, 1, 1), 99)).startswith('cannot be solved')
    for numbers, target in ((3, 5), 8), ((21, 1, 1), 21), ((20, 20, 1), 400), ((1, 2, 3, 4, 5), 15), ((3, 3, 5), 0):
        assert task.remark(CountdownProblem(numbers, target)).startswith('outside its training')
    task = Multiplication()
    assert task.explain(task.parse('12*12'), '145') == 'the product is 144'
    assert task.remark(task.parse('99*99')) == '' and task.remark(task.parse('100*9')).endswith('factors up to 99')


def test_sample_answers_evaluates_and_plots(trained, tmp_path):
    out, _ = trained
    checkpoint = f'--checkpoint={out}/tinyzero_astarpo_final.pt'
    process = run('sample.py', checkpoint, '--prompt=3 * 4', '--num_samples=8')
    assert process.returncode == 0 and 'What is 3 × 4?' in process.stdout and 'pass@8' in process.stdout \
        and 'verdict' in process.stdout
    assert run('sample.py', '--eval', '--prompt=3 * 4').stderr == \
        'error: --eval grades held-out problems, --prompt asks one: choose\n'
    process = run('sample.py', f'--checkpoint={out}', '--eval', '--num_problems=10')
    assert process.returncode == 0 and 'accuracy' in process.stdout \
        and json.load(open(f'{out}/sample_eval.json'))['num_problems'] <= 10
    process = run('sample.py', '--plot', out, out, f'--output={tmp_path}/both.png')
    assert process.returncode == 0 and os.path.getsize(tmp_path / 'both.png') > 10_000
    for wrong, words in ((['--prompt=hello'], 'write it like'),
                         (['--seed=-1'], '--seed'), (['--temperature=nan'], '--temperature'),
                         (['--prompt=' + '1' * 300 + ' * 3'], 'positions'),
                         (['--checkpoint=none.pt'], 'No such file')):
        process = run('sample.py', checkpoint, *wrong)
        assert process.returncode == 1 and words in process.stderr and 'Traceback' not in process.stderr


def test_the_task_in_the_readme_is_trained_as_it_stands(tmp_path):
    source = re.search(r'<!-- task -->\n```python\n(.*?)```', open(f'{HERE}/README.md').read(), re.S)[1]
    for name in ('model', 'apo', 'tasks', 'train', 'sample'):
        text = open(f'{HERE}/{name}.py').read()
        (tmp_path / f'{name}.py').write_text(text + '\n\n' + source if name == 'tasks' else text)
    process = run(f'{tmp_path}/train.py', '--task=sorting', '--max_number=12', *TINY[2:], '--warmup_steps=300',
                  '--max_steps=2', f'--out_dir={tmp_path}/run', '--device=cpu')
    assert process.returncode == 0 and process.stderr == '', process.stderr
    assert metrics(f'{tmp_path}/run')[-1]['accuracy'] > 0
    process = run(f'{tmp_path}/sample.py', f'--checkpoint={tmp_path}/run/tinyzero_astarpo_final.pt', '--prompt=3 1 2')
    assert process.returncode == 0 and 'answer' in process.stdout


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    notebook = nbformat.read(f'{HERE}/TinyZero_AstarPO.ipynb', as_version=4)
    notebook.cells[1].source += f"\nOUT = {str(tmp_path / 'run')!r}"
    os.environ['NOTEBOOK_ARGS'] = ' '.join(
        [*TINY, '--max_steps=2', '--device=cpu'])
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
    """A tiny random model in the Hugging Face layout, written by transformers; skips the test where that is missing.
    Returns it as transformers loads it."""
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


def make_tokenizer(folder, eos='<|endoftext|>', begin=None):
    """A byte-level BPE trained on prompts and demonstrations, with the files that a model's tokenizer has. Its padding
    is the end-of-sequence."""
    tokenizers = pytest.importorskip('tokenizers', reason="needs pip install tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    task, rng = Multiplication(5), np.random.default_rng(0)
    texts = [task.demonstration(task.problem(rng), rng) for _ in range(50)]
    for task.form in FORMS.values():
        texts += [task.prompt(task.problem(rng)) for _ in range(50)]
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin|>']
    library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if begin:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=f'{begin} $A', special_tokens=[(begin, library.token_to_id(begin))])
    os.makedirs(folder, exist_ok=True)
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
    ours, mask = generate(model, prompts, 24, temperature=0, eos=1)
    for row, marked, prompt in zip(ours, mask, prompts):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=1)[0]
        assert row[marked].tolist() == expected[len(prompt):].tolist()
    save_pretrained(model, tmp_path / 'export', 1)
    again = type(theirs).from_pretrained(tmp_path / 'export')
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, logits, atol=1e-4) and again.config.eos_token_id == 1


def test_pretrained_tokenizer_goes_round_and_knows_its_end(tmp_path):
    """Also in Qwen's chat form, and where each text begins with a token of its own. Only the end reads as EOS, not
    what a model spells out."""
    for eos, begin, words in (('<|endoftext|>', None, 'The following'), ('<|im_end|>', None, '<|im_start|>system'),
                              ('<|endoftext|>', '<|begin|>', '<|begin|>The following')):
        make_tokenizer(tmp_path, eos, begin)
        state = tokenizer_files(tmp_path)
        tokenizer = PretrainedTokenizer(json.loads(json.dumps(state))) # plain data
        assert tokenizer.library.id_to_token(tokenizer.eos) == eos and tokenizer.form.startswith(words)
        rng = np.random.default_rng(0)
        for task in (kind() for kind in TASKS.values()):
            task.form = tokenizer.form
            for problem in (task.problem(rng) for _ in range(20)):
                prompt, response = task.prompt(problem), task.demonstration(problem, rng)
                assert prompt.endswith('<think>') and tokenizer.library.decode(
                    tokenizer.encode(prompt), skip_special_tokens=False) == prompt
                ids = tokenizer.encode(response)
                assert tokenizer.decode(ids) == response
                assert tokenizer.decode([*ids, tokenizer.eos, 5]) == response + EOS
        assert EOS not in tokenizer.decode(tokenizer.encode('</think><answer>1</answer><eos>!'))
    for name, text, eos in (('generation_config.json', '{"eos_token_id": [2, 0]}', 2),
                            ('config.json', '{"eos_token_id": 1}', 1),
                            ('tokenizer_config.json', '{"eos_token": {"content": "<|im_end|>"}}', 2)):
        assert PretrainedTokenizer({'tokenizer.json': state['tokenizer.json'], name: text}).eos == eos
    with pytest.raises(ValueError, match='no end-of-sequence'):
        PretrainedTokenizer({'tokenizer.json': state['tokenizer.json']})


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A few steps of A*PO by the command line from a tiny model in the Hugging Face layout, after a warm-up, because
    random weights earn no rewards; its folder and its out_dir."""
    folder, out = tmp_path_factory.mktemp('pretrained') / 'model', tmp_path_factory.mktemp('pretrained') / 'run'
    make_pretrained(folder)
    make_tokenizer(folder)
    process = run('train.py', *TINY, '--n_heads=4', '--d_ff=96', f'--init_from={folder}', f'--out_dir={out}',
                  '--warmup_steps=70', '--max_steps=60', '--checkpoint_interval=120', '--device=cpu',
                  env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert process.returncode == 0 and process.stderr == '', process.stderr
    return str(folder), str(out)


def test_a_star_po_raises_the_reward_from_pretrained_weights(pretrained):
    """End-of-sequence is trained although it also pads; the reward rises."""
    steps = [row for row in metrics(pretrained[1]) if row['phase'] == 'apo']
    assert all(row['truncated'] < 0.2 for row in steps)
    assert np.mean([row['reward'] for row in steps[-10:]]) > np.mean([row['reward'] for row in steps[:5]]) + 0.1


def test_settings_that_fit_pretrained_weights_are_chosen_and_printed(pretrained, settings, tmp_path, capsys):
    checkpoint = train.configure([f'--init_from={pretrained[0]}', f'--out_dir={tmp_path}', '--max_target=50',
                                  '--value_learning_rate=0.01'])
    assert (train.learning_rate, train.warmup_steps, train.max_new_tokens, train.max_number) == (1e-6, 0, 1024, 99)
    assert (train.max_target, train.value_learning_rate, train.d_model) == (50, 0.01, 64), "what is given is kept"
    assert 'learning_rate=1e-06' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--max_new_tokens=1024 .* 512 positions'):
        train.build(checkpoint)


def test_runs_from_pretrained_weights_resume_answer_and_export(pretrained, settings, tmp_path):
    """Without the folder that they came from: the checkpoint holds all."""
    folder, out = pretrained
    os.makedirs(tmp_path / 'part')
    os.link(f'{out}/checkpoint_step_120.pt', tmp_path / 'part' / 'checkpoint_step_120.pt')
    torch.set_num_threads(1)
    main(settings, '--init_from=resume', f'--out_dir={tmp_path}/part')
    final = f'{out}/tinyzero_astarpo_final.pt'
    assert_same(weights(final), weights(tmp_path / 'part' / 'tinyzero_astarpo_final.pt'))
    process = run('sample.py', f'--checkpoint={final}', '--prompt=3 * 4', '--num_samples=8', '--device=cpu')
    assert process.returncode == 0 and 'User: What is 3 × 4?' in process.stdout and 'pass@8' in process.stdout
    settings()
    loaded = train.load_run(final, device='cpu')
    importlib.import_module('sample').export(loaded, f'{tmp_path}/export')
    transformers = pytest.importorskip('transformers')
    prompt = loaded.task.prompt(MultiplicationProblem(3, 4))
    tokens = loaded.tokenizer.encode(prompt)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'export')(prompt).input_ids == tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    with torch.no_grad():
        ours = loaded.model(torch.tensor([tokens]))[0]
        assert torch.allclose(theirs(torch.tensor([tokens])).logits, ours, atol=1e-4)
    with pytest.raises(SystemExit, match='choose a new folder'):
        importlib.import_module('sample').export(loaded, f'{tmp_path}/export')


def test_a_model_from_random_weights_is_exported_as_a_llama(trained, settings, tmp_path):
    transformers = pytest.importorskip('transformers', reason="needs pip install transformers safetensors")
    process = run('sample.py', f'--checkpoint={trained[0]}/tinyzero_astarpo_final.pt', f'--export={tmp_path}/export')
    assert process.returncode == 0 and 'config.json, model.safetensors' in process.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    ours = train.load_run(f'{trained[0]}/tinyzero_astarpo_final.pt', device='cpu').model
    tokens = torch.randint(0, ours.config.vocab_size, (4, 30))
    with torch.no_grad():
        assert type(theirs).__name__ == 'LlamaForCausalLM' and torch.allclose(theirs(tokens).logits, ours(tokens)[0],
                                                                              atol=1e-4)


def test_what_pretrained_weights_cannot_do_is_said_in_one_line(settings, tmp_path, monkeypatch):
    make_pretrained(tmp_path / 'model', vocab_size=64)
    make_tokenizer(tmp_path / 'model')
    from safetensors.torch import load_file, save_file
    weights, config = load_file(tmp_path / 'model/model.safetensors'), json.load(open(tmp_path / 'model/config.json'))
    norm = weights['model.norm.weight']
    cases = [(dict(model_type='mamba'), {}, [], "model_type 'mamba' is not covered"),
             (dict(rope_parameters=dict(rope_type='yarn')), {}, [], "rope_type 'yarn' is not covered"),
             (dict(use_sliding_window=True), {}, [], "use_sliding_window True is not covered"),
             ({}, {'model.vision.weight': norm}, [], "a tensor model.vision.weight (64,), which"),
             ({}, {'model.norm.weight': norm[:7]}, [], "model.norm.weight (7,), which should be (64,)"),
             ({}, {}, ['model.layers.1.self_attn.k_proj.bias'], "layers.1.self_attn.k_proj.bias is missing (1 in all)"),
             ({}, {}, ['tokenizers'], "not installed: pip install tokenizers"),
             ({}, {}, ['safetensors'], "not installed: pip install safetensors"),
             ({}, {}, ['huggingface_hub'], "not installed: pip install huggingface_hub")]
    for i, (changes, added, without, words) in enumerate(cases):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
            for name in without:
                patch.setitem(sys.modules, name, None)
            json.dump(config | changes, open(tmp_path / 'model/config.json', 'w'))
            save_file({k: v.clone() for k, v in (weights | added).items() if k not in without},
                      tmp_path / 'model/model.safetensors')
            start = 'someone/something' if 'huggingface_hub' in without else tmp_path / 'model'
            main(settings, f'--init_from={start}', f'--out_dir={tmp_path}/{i}', '--max_new_tokens=64')
        assert words in error.value.code and '\n' not in error.value.code
    for name in ('model.safetensors', 'tokenizer.json', 'config.json'): # damaged, then missing
        for damage in (lambda path: open(path, 'w').write('{'), os.remove):
            damage(tmp_path / 'model' / name)
            with pytest.raises(SystemExit, match=f'cannot use {tmp_path}/model: [^\n]*$'):
                main(settings, f'--init_from={tmp_path}/model', f'--out_dir={tmp_path}/{name}', '--max_new_tokens=64')


# ---- the tasks of reasoning-gym --------------------------------------------------------------------------------------

def make_gym(name, **changes):
    """A task of reasoning-gym; skips the test where that is missing."""
    pytest.importorskip('reasoning_gym', reason="needs pip install reasoning-gym")
    return ReasoningGym(name, **changes)


def answered(answer):
    return f'{END_THINK}<answer> {answer} </answer>'


@pytest.mark.parametrize('name', ['ab', 'acre', 'basic_arithmetic', 'chain_sum', 'gcd', 'jugs', 'kakurasu',
                                  'list_functions', 'maze', 'mini_sudoku', 'syllogism', 'word_sorting'])
def test_problems_of_reasoning_gym_are_fixed_split_and_graded_by_it(name):
    task, again = make_gym(name), make_gym(name)
    task.form = FORMS['chat']
    draws = [train.draw(kind, train.TRAIN, 0, 30) for kind in (task, again)]
    problems, held_out = [problem for problem, _ in draws[0]], train.held_out_problems(task, 10)
    assert problems == [problem for problem, _ in draws[1]]
    assert not {p['question'] for p in problems} & {p['question'] for p in held_out} and len(held_out) == 10
    for problem in problems + held_out:
        assert problem['question'] in task.prompt(problem) and task.prompt(problem).endswith('<think>')
        assert task.grade(problem, answered(problem['answer'])) == (1, True, True)
        assert task.grade(problem, f"<answer>{problem['answer']}</answer>") == WRONG, "the format is ours"
        for nonsense in ('...', '?', '9' * 250, '[' * 250, '{}', 'null', 'NaN', '-inf', '1e999', 'x' * 257, ' '):
            grade = task.grade(problem, answered(nonsense))
            assert grade.reward == 0 and not grade.correct, nonsense


def test_right_is_what_reasoning_gym_says_even_where_it_errs():
    """The README tells of this one; when the package mends it, so should the README."""
    task, rng = make_gym('coin_flip'), np.random.default_rng(0)
    problem = next(p for p in iter(lambda: task.problem(rng), None) if p['answer'] == '0.5')
    assert task.grade(problem, answered('0.59')).correct and not task.grade(problem, answered('0.6')).correct


def test_partial_scores_of_reasoning_gym_are_paid_when_asked_for():
    for share in (0.0, 0.5):
        task = make_gym('emoji_mystery', partial_credit=share)
        problem = task.problem(np.random.default_rng(0))
        wrong = problem['answer'][:-1] + '~'
        assert task.grade(problem, answered(wrong)) == (share * (len(wrong) - 1) / len(wrong), False, True)


@pytest.mark.parametrize('name', ['binary_matrix', 'bitwise_arithmetic', 'countdown', 'n_queens',
                                  'polynomial_multiplication', 'puzzle24', 'simple_integration', 'spiral_matrix'])
def test_scorers_of_reasoning_gym_that_run_answers_as_code_are_refused(name, tmp_path):
    """And nothing runs, should one of them be asked after all."""
    task = make_gym(name)
    with pytest.raises(ValueError, match=f'reasoning_gym:{name} is refused: its scorer runs text as code'):
        task.problem(np.random.default_rng(0))
    attack = f"__import__('os').mkdir('{tmp_path}/hacked')"
    assert not task.grade(task.dataset(seed=0)[0], answered(attack)).correct
    assert os.listdir(tmp_path) == []


def test_scorers_of_reasoning_gym_are_bounded(tmp_path):
    """In time and in what they may touch. A score that is none, or above 1, is 0 too, and an entry is never written."""
    task = make_gym('gcd')
    problem = task.problem(np.random.default_rng(0))
    def touch(answer, entry):
        open(tmp_path / 'hacked', 'w')
    def hide(answer, entry):
        try:
            touch(answer, entry)
        except: # as some scorers do
            return 0.5
    bad = [touch, hide, lambda *_: eval('1'), lambda *_: exec('1'), lambda *_: compile('1', '', 'eval'),
           lambda *_: os.system('true'), lambda *_: subprocess.run('true'), lambda *_: float('nan'), lambda *_: 1.5,
           lambda *_: -1, lambda *_: None, lambda *_: 1 / 0, lambda *_: Fraction('1e99999999'),
           lambda answer, entry: entry.clear()]
    own = task.scorer.score_answer
    for scorer in bad:
        task.scorer.score_answer, started = scorer, time.process_time()
        assert task.grade(problem, answered('1')) == (0, False, True)
        assert time.process_time() - started < 3
    task.scorer.score_answer = own
    assert task.grade(problem, answered(problem['answer'])).correct and os.listdir(tmp_path) == []
    assert eval('1') == 1, "the watch is over"


@pytest.mark.parametrize('name, words', [
    ('chain_sun', "no task 'chain_sun'; did you mean reasoning_gym:chain_sum?"), ('chain_sum', "no demonstrations"),
    ('', "no task ''"), ('composite', "Must specify at least one dataset")])
def test_a_mistake_with_reasoning_gym_gets_one_line(settings, tmp_path, name, words):
    make_gym('chain_sum')
    with pytest.raises(SystemExit) as error:
        main(settings, f'--task=reasoning_gym:{name}', f'--out_dir={tmp_path}/new')
    assert words in error.value.code and '\n' not in error.value.code


def test_a_missing_reasoning_gym_gets_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'reasoning_gym.factory', None)
    with pytest.raises(SystemExit, match='error: --task=reasoning_gym:chain_sum .*: pip install reasoning_gym'):
        main(settings, '--task=reasoning_gym:chain_sum', f'--out_dir={tmp_path}/new')


def test_a_pretrained_model_is_trained_on_a_task_of_reasoning_gym(settings, tmp_path, monkeypatch, capsys):
    """Two steps (GRPO, which does not mind that random weights earn nothing), and sample.py from the checkpoint. Tasks
    that are refused, and a warm-up, end in one line."""
    make_gym('chain_sum')
    make_pretrained(tmp_path / 'model')
    make_tokenizer(tmp_path / 'model')
    config = json.load(open(tmp_path / 'model/config.json'))
    json.dump(config | dict(max_position_embeddings=8192), open(tmp_path / 'model/config.json', 'w'))
    monkeypatch.chdir(tmp_path)
    start = [f'--init_from={tmp_path}/model', '--algorithm=grpo', '--batch_size=8', '--max_steps=2',
             '--num_eval_samples=4', '--max_new_tokens=8', '--device=cpu']
    main(settings, *start, '--task=reasoning_gym:chain_sum')
    out = tmp_path / 'out' / 'reasoning_gym_chain_sum'
    assert [row['step'] for row in metrics(out) if row['phase'] == 'grpo'] == [1, 2]
    assert json.load(open(out / 'results_summary.json'))['accuracy_by_difficulty'] == {'all': 0}
    settings()
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', '--num_problems=2'])
    sample_py = importlib.import_module('sample')
    sample_py.main() # the newest run under out/
    assert '2 problem(s) x 1 response(s): accuracy 0.000' in capsys.readouterr().out
    settings()
    monkeypatch.setattr(sys, 'argv', ['sample.py', '--device=cpu', '--prompt=1 + 2'])
    with pytest.raises(SystemExit, match='cannot be typed'):
        sample_py.main()
    for wrong, words in ((['--task=reasoning_gym:countdown'], 'runs text as code'),
                         (['--task=reasoning_gym:game_of_life_halting'], 'its own answers from nonsense'),
                         (['--task=reasoning_gym:complex_arithmetic'], 'its own answers from nonsense'),
                         (['--task=reasoning_gym:gcd', '--warmup_steps=3'], 'has no demonstrations')):
        with pytest.raises(SystemExit) as error:
            main(settings, *start, *wrong, f'--out_dir={tmp_path}/wrong')
        assert words in error.value.code and '\n' not in error.value.code
