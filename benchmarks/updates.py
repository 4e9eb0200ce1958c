"""
Training tokens per second, forward and backward, ours against padded batches: 16 rows as they come,
all as long as the longest of these, logits at every position. The same model, weights and
responses; only tokens of responses count.

    python benchmarks/updates.py

The model of assets/ on 256 responses of its own, and a 50M model on an eighth of these, which is
also compared with the rate of a matrix multiply in bfloat16. First both must give the same
gradient. Pairs of passes, one after the other; the ratio is the median over the pairs, with the
least and the greatest.
"""
import argparse
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from model import ModelConfig, Transformer, micro_batches, packs, row_lengths, token_logprobs, trim
from sample import EVAL, held_out_problems, load, load_checkpoint, respond
from train import GPU, MODEL

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--checkpoint', default=f'{top}/assets/countdown_trained.pt')
parser.add_argument('--rows', type=int, default=256)
parser.add_argument('--pairs', type=int, default=5)
args = parser.parse_args()


def ours(model, tokens, mask, dtype):
    for rows in micro_batches(mask, micro_batch_tokens, packed=packs(model, tokens)):
        logprobs, _ = token_logprobs(model, *trim(tokens[rows], mask[rows]), dtype=dtype)
        logprobs.sum().backward()


def padded(model, tokens, mask, dtype):
    for rows in torch.arange(len(tokens)).split(16):
        end = int(mask[rows].any(0).nonzero().max()) + 1
        with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
            logits, _ = model(tokens[rows, :end - 1])
        logprobs = -F.cross_entropy(logits.float().flatten(0, 1), tokens[rows, 1:end].flatten(), reduction='none')
        (logprobs * mask[rows, 1:end].flatten()).sum().backward()


def seconds(function, *arguments):
    started = time.time()
    function(*arguments)
    return time.time() - started


def gradient(function, model, *arguments):
    model.zero_grad()
    function(model, *arguments)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(name, model, tokens, mask, dtype):
    """Print a line of the table. Returns the seconds of our fastest pass."""
    a, b = (gradient(function, model, tokens, mask, dtype) for function in (ours, padded))
    if (a - b).norm() > (1e-4 if dtype == 'float32' else 3e-2) * b.norm():
        sys.exit('error: the two do not compute the same gradient')
    pairs = [tuple(seconds(function, model, tokens, mask, dtype) for function in (ours, padded))
             for _ in range(args.pairs)]
    ratios = sorted(b / a for a, b in pairs)
    count = mask.sum().item()
    print(f'| {name} | {dtype} | {count / statistics.median(a for a, _ in pairs):,.0f} '
          f'| {count / statistics.median(b for _, b in pairs):,.0f} '
          f'| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |', flush=True)
    return min(a for a, _ in pairs)


def matmul_rate(dtype, n=2048):
    """Return the operations per second of a square matrix multiply, the best of ten."""
    x = torch.randn(n, n).to(dtype)
    return 2 * n ** 3 / min(seconds(torch.mm, x, x) for _ in range(10))


checkpoint = load_checkpoint(args.checkpoint)
settings = checkpoint['settings']
micro_batch_tokens = settings['micro_batch_tokens']
model, task, tokenizer = load(checkpoint, args.checkpoint, device='cpu')
batch = respond(model, task, tokenizer, held_out_problems(task, args.rows), (settings['seed'], EVAL),
                max_new_tokens=settings['max_new_tokens'], temperature=settings['temperature'])
tokens, mask = batch.tokens, batch.mask
print(f'{len(tokens)} responses of {mask.sum(1).float().mean():.0f} tokens on average, the longest row '
      f'{tokens.size(1)}; micro-batches of {micro_batch_tokens} tokens; {torch.get_num_threads()} threads\n\n'
      '| forward and backward | precision | ours, tokens/s | padded | ratio: median (least to greatest) |\n'
      '|---|---|---|---|---|')
compare('0.8M', model.requires_grad_(), tokens, mask, 'float32')
few = torch.arange(0, len(tokens), 8) # an eighth of the rows, for it is sixty times as large
tokens, mask = trim(tokens[few], mask[few])
model = Transformer(ModelConfig(
    model.config.vocab_size, model.config.max_seq_len, **{name: GPU[name] for name in MODEL}))
best = compare('50M', model, tokens, mask, 'bfloat16')
rate = 6 * model.num_params() * row_lengths(mask).sum() / best # attention, a few percent, is left out
print(f'\nthe 50M model computes {rate / 1e9:.0f} GFLOP/s, where bfloat16 matrix multiplies run at '
      f'{matmul_rate(torch.bfloat16) / 1e9:.0f} and float32 ones at {matmul_rate(torch.float32) / 1e9:.0f}')
