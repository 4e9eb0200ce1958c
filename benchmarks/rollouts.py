"""
Sampled tokens per second, ours against transformers' `generate` on the same weights and prompts, on
this machine.

    pip install transformers safetensors
    python benchmarks/rollouts.py

256 held-out puzzles answered by the trained countdown model in assets/, responses that end by
themselves; a token counts when it is part of a response, up to and including its end-of-sequence.
First both must give the same greedy tokens. Pairs of runs, one after the other; the ratio is the
median over the pairs, with the least and the greatest.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time

import torch

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
from examples.export import save_pretrained
from model import generate
from sample import held_out_problems, load, load_checkpoint

try:
    from transformers import AutoModelForCausalLM
except ModuleNotFoundError:
    sys.exit('error: this comparison needs two packages: pip install transformers safetensors')

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--checkpoint', default=f'{top}/assets/countdown_trained.pt')
parser.add_argument('--rows', type=int, default=256)
parser.add_argument('--pairs', type=int, default=5)
args = parser.parse_args()

checkpoint = load_checkpoint(args.checkpoint)
model, task, tokenizer = load(checkpoint, args.checkpoint)
model.float()
eos, device, limit = tokenizer.ends[0], model.embed.weight.device, checkpoint['settings']['max_new_tokens']
prompts = [tokenizer.encode(tokenizer.prompt(task, problem)) for problem in held_out_problems(task, args.rows)]
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(model, f'{folder}/model', tokenizer.ends)
    theirs = AutoModelForCausalLM.from_pretrained(f'{folder}/model', dtype=torch.float32).to(device).eval()


def ours(temperature):
    tokens, mask = generate(model, prompts, limit, temperature, [eos])
    return [row[marked].tolist() for row, marked in zip(tokens, mask)]


def transformers(temperature, cache):
    width = max(map(len, prompts)) # padded on the left
    tokens = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    with torch.no_grad():
        out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=limit, eos_token_id=eos, pad_token_id=eos,
                              cache_implementation=cache, **how)[:, width:].tolist()
    return [row[:row.index(eos) + 1] if eos in row else row for row in out]


def speed(sampler, *arguments):
    started = time.time()
    return sum(map(len, sampler(*arguments))) / (time.time() - started)


same = sum(a == b for a, b in zip(ours(0), transformers(0, 'dynamic')))
print(f'{same} of {args.rows} greedy responses are the same, token by token; {torch.get_num_threads()} threads')
if same < 0.99 * args.rows: # two equal logits may fall either way
    sys.exit('error: the two do not compute the same thing')
print('\n| against transformers | ours, tokens/s | theirs | ratio: median (least to greatest) |\n'
      '|---|---|---|---|')
kinds = [('float32', 'dynamic'), ('float32', 'static'), ('bfloat16', 'dynamic')]
if device.type == 'cuda':
    kinds += [('bfloat16', 'static')]
for dtype, cache in kinds:
    theirs.to(getattr(torch, dtype))
    if device.type == 'cuda': # on a CPU ours is always float32
        model.to(getattr(torch, dtype))
    pairs = [(speed(ours, 1.0), speed(transformers, 1.0, cache)) for _ in range(args.pairs + 1)][1:] # warmed up
    ratios = sorted(a / b for a, b in pairs)
    print(f'| {dtype}, {cache} cache | {statistics.median(a for a, _ in pairs):,.0f} '
          f'| {statistics.median(b for _, b in pairs):,.0f} '
          f'| {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) |')
