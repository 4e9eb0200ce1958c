"""
Milliseconds that one decoding step takes, for all rows together, and what share of the memory's bandwidth
it uses; and on a GPU how many tokens a second an update computes, against a matrix multiply.

    python benchmarks/decoding.py                             # on a GPU two minutes; on a CPU the small model only
    python benchmarks/decoding.py --sizes small --rows 1 32 128
    python benchmarks/decoding.py --profile                   # where a step of the small model spends its time on a CPU
    python benchmarks/decoding.py --count                     # what a recorded step asks of a GPU, without one

Random weights, no response ends before the limit. On a GPU a step is recorded once and repeated
(model.Decoding.step); the column beside it is the same step started by Python. The bytes that must move are
the weights once and the keys and values so far; the bandwidth is that of a large copy, counted both ways.
"""
import argparse
import math
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from model import Decoding, ModelConfig, Transformer, generate, token_logprobs
from sample import pick_device, pick_dtype
from train import GPU, MODEL

# The published one is advertised as 50M; with SwiGLU's three matrices it is 201M.
MODELS = {'small': dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=384),
          '50m': {name: GPU[name] for name in MODEL},
          'published': dict(d_model=1024, n_layers=12, n_heads=16, n_kv_heads=16, d_ff=4096)}
PROMPT, TOKENS, LENGTH = 8, 256, 256 # of a prompt, sampled, and of a response in an update


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', choices=MODELS, help='default: all on a GPU and to count, else small')
    parser.add_argument('--rows', nargs='+', type=int, default=[1, 32, 128, 1024])
    parser.add_argument('--profile', action='store_true')
    parser.add_argument('--count', action='store_true')
    args = parser.parse_args()
    if args.count:
        return print_count(args.sizes or MODELS, args.rows)
    if args.profile:
        return print_profile(build('small', 'cpu').requires_grad_(False), args.rows)
    device = pick_device('auto')
    on_gpu, dtype = device.startswith('cuda'), pick_dtype(device)
    x = torch.empty(2 ** 31 if on_gpu else 2 ** 27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() / seconds(lambda: y.copy_(x))
    x = torch.randn(8192 if on_gpu else 1024, 8192 if on_gpu else 1024, device=device, dtype=getattr(torch, dtype))
    rate = 2 * len(x) ** 3 / seconds(lambda: x @ x)
    name = torch.cuda.get_device_name() if on_gpu else f'CPU, {torch.get_num_threads()} threads'
    print(f'{name}, {dtype}: a copy moves {bandwidth / 1e9:,.0f} GB/s, a matrix multiply computes '
          f'{rate / 1e12:.2f} TFLOP/s\n\n| model | rows | a step, ms | started by Python, ms | tokens/s | of the copy '
          '|\n|---|---|---|---|---|---|')
    for size in args.sizes or (MODELS if on_gpu else ['small']):
        model = build(size, device).to(getattr(torch, dtype)).requires_grad_(False)
        for rows in args.rows:
            ours, plain = step_seconds(model, rows, Decoding.step), None
            if on_gpu:
                plain = step_seconds(model, rows, started_by_python)
            config = model.config
            keys_and_values = 2 * config.n_layers * config.n_kv_heads * config.head_dim * rows * (PROMPT + TOKENS / 2)
            moved = (model.num_params() + keys_and_values) * model.embed.weight.element_size()
            print(f'| {size} | {rows:,} | {1000 * ours:.2f} | {f"{1000 * plain:.2f}" if plain else "–"} '
                  f'| {rows / ours:,.0f} | {moved / bandwidth / ours:.0%} |', flush=True)
    if on_gpu:
        print('\n| update, tokens in a piece | tokens/s | of the matrix multiply | GB |\n|---|---|---|---|')
        for size, tokens in (('small', 131072), ('50m', 32768), ('50m', 131072), ('published', 131072)):
            print_update(size, tokens, device, dtype, rate)


def build(size, device):
    torch.manual_seed(0)
    return Transformer(ModelConfig(166, 900, qk_norm=True, **MODELS[size])).to(device)


def seconds(work, repeat=10):
    """Return the median of the seconds that some work takes."""
    times = []
    for _ in range(repeat + 2):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def started_by_python(batch):
    """Take a decoding step without a recorded one."""
    batch.sample(batch.tokens[batch.rows[:, None], batch.at])


def step_seconds(model, rows, step):
    """Return the seconds of a decoding step, the mean over a whole response."""
    own, Decoding.step = Decoding.step, step
    prompts, uniform = [list(range(2, 2 + PROMPT))] * rows, torch.rand(rows, TOKENS)
    once = seconds(lambda: generate(model, prompts, TOKENS, 1.0, [-1], uniform), repeat=3)
    Decoding.step = own
    return once / TOKENS


def print_profile(model, all_rows):
    """Print what shares of a decoding step's time go where, by a profiler, which makes it longer. The calls include
    those that others make."""
    print('| rows | a step, ms | calls | products with weights | products of attention | all else |\n'
          '|---|---|---|---|---|---|')
    for rows in all_rows:
        milliseconds = 1000 * step_seconds(model, rows, Decoding.step)
        prompts, uniform = [list(range(2, 2 + PROMPT))] * rows, torch.rand(rows, TOKENS)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            generate(model, prompts, TOKENS, 1.0, [-1], uniform)
        operations = profiler.key_averages()
        calls = sum(one.count for one in operations) / TOKENS
        weights = share(operations, 'aten::mm', 'aten::addmm')
        attention = share(operations, 'aten::bmm', 'aten::baddbmm')
        print(f'| {rows:,} | {milliseconds:.2f} | {calls:,.0f} | {weights:.0%} | {attention:.0%} '
              f'| {1 - weights - attention:.0%} |', flush=True)


def share(operations, *names):
    """Return which share of the time the operations of these names took."""
    spent = sum(one.self_cpu_time_total for one in operations if one.key in names)
    return spent / sum(one.self_cpu_time_total for one in operations)


class Norms(TorchFunctionMode):
    """Take a norm for one kernel, as it is on a GPU, where a CPU computes it in several."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counter.inside_norm = function is F.rms_norm
        result = function(*args, **(kwargs or {}))
        if self.counter.inside_norm:
            self.counter.inside_norm = False
            self.counter.count('norm', args[:1], result)
        return result


class Counter(TorchDispatchMode):
    """Count the kernels that a step starts, and the bytes that they read and write, each tensor once a kernel."""

    def __init__(self):
        super().__init__()
        self.kernels, self.moved, self.attention, self.inside_norm = 0, 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside_norm and not function.is_view and 'view' not in str(function):
            self.count(str(function), (args, kwargs), result)
        return result

    def count(self, name, inputs, result):
        read, written = (sum(map(bytes_of, tree_leaves(part))) for part in (inputs, result))
        if 'index_put' in name: # only what is written of a cache moves
            read = written = bytes_of(inputs[0][2])
        elif 'index' in name or 'embedding' in name: # only what is chosen moves
            read = written
        self.kernels += 1
        self.moved += read + written
        if 'bmm' in name:
            self.attention += read + written


def bytes_of(x):
    """Return the bytes of a tensor; what is expanded is read once."""
    if not torch.is_tensor(x):
        return 0
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride()) if stride)


def counted_step(model, rows):
    """Return (kernels, bytes, bytes of the products of attention) of a step, which reads keys up to the next multiple
    of 64: the mean over a whole response."""
    batch = Decoding(model, [list(range(2, 2 + PROMPT))] * rows, TOKENS, 1.0, [1], torch.rand(rows, TOKENS))
    batch.read(PROMPT)
    batch.cache.prepare_graph(batch.at)
    counts = []
    for at in range(32, PROMPT + TOKENS, 64):
        batch.cache.length = at
        batch.at.fill_(at)
        with Counter() as counter, Norms(counter):
            started_by_python(batch)
        counts.append((counter.kernels, counter.moved, counter.attention))
    return [statistics.mean(column) for column in zip(*counts)]


def print_count(sizes, all_rows):
    """Print what a recorded step in bfloat16 asks of a GPU. Every row adds as many bytes, so 8 and 16 rows are enough
    to know all others."""
    print('| model, rows | kernels | GB read and written | of these products of attention '
          '| TFLOP of products with weights |\n|---|---|---|---|---|')
    for size in sizes:
        model = build(size, 'cpu').to(torch.bfloat16).requires_grad_(False)
        few, more = counted_step(model, 8), counted_step(model, 16)
        for rows in all_rows:
            kernels, moved, attention = (a + (b - a) * (rows - 8) / 8 for a, b in zip(few, more))
            print(f'| {size}, {rows:,} | {kernels:.0f} | {moved / 1e9:.2f} | {attention / 1e9:.2f} '
                  f'| {2 * rows * model.num_params() / 1e12:.3f} |', flush=True)


def print_update(size, tokens, device, dtype, rate):
    """Print how fast forward and backward are on responses of LENGTH tokens."""
    model = build(size, device)
    model.share_prefix = False
    batch = torch.randint(0, 166, (tokens // LENGTH, LENGTH), device=device)
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[:, :PROMPT] = False

    def update():
        logprobs, _ = token_logprobs(model, batch, mask, 1.0, dtype)
        (-logprobs.sum()).backward()
        model.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    once = seconds(update, repeat=5)
    blocks = model.num_params() - model.embed.weight.numel()
    flops = 6 * tokens * (blocks + LENGTH * model.config.d_model * model.config.n_layers) # attention looks half back
    print(f'| {size}, {tokens:,} | {tokens / once:,.0f} | {flops / once / rate:.0%} '
          f'| {torch.cuda.max_memory_allocated() / 1e9:.1f} |', flush=True)


if __name__ == '__main__':
    main()
