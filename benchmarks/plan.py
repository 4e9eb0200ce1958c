"""
What fits where: memory per GPU and bytes on the wire per step, for models from 50M to 7B on 1, 8 and 64 GPUs.
Arithmetic, but for the activations, which autograd's hooks count on one block.

    python benchmarks/plan.py

Per parameter. Sharded over the ranks: 4 bytes of master weight, 4 of gradient, 8 of AdamW. Whole on every rank: 2 of
the sampler, 2 of the reference, 2 that autocast makes in an update. Starting: every rank builds the model whole, 4.
On the wire, per rank and step: every micro-batch gathers the weights forward and backward and scatters the gradients,
3 x 4 bytes, and the sampler is refreshed once, 4 (times (ranks - 1) / ranks).
"""
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import SIZES, Block, ModelConfig, Transformer

QWEN = dict(qkv_bias=True, max_seq_len=2048)
MODELS = {
    '50M': ModelConfig(116, 1024, **SIZES['50m']),
    'Qwen2.5-0.5B': ModelConfig(151936, d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, d_ff=4864, **QWEN),
    'Qwen2.5-1.5B': ModelConfig(151936, d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, d_ff=8960, **QWEN),
    'Qwen2.5-3B': ModelConfig(151936, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=2, d_ff=11008, **QWEN),
    'Qwen2.5-7B': ModelConfig(152064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, d_ff=18944,
                              tie_embeddings=False, **QWEN),
}
BATCH, MICRO_BATCH, ROWS, LENGTH = 1024, 4096, 256, 1280 # responses, tokens, rows sampled side by side, tokens each
USED = 0.5 # responses are half as long as they may get, on average


def activation_bytes(config, tokens=251):
    """Bytes that one block keeps for its backward pass, per token, under bfloat16 autocast."""
    block, kept = Block(config, 0), {}
    weights = {tuple(sorted(p.shape)) for p in block.parameters()} # and their bfloat16 copies, counted elsewhere
    angle = torch.zeros(tokens, config.head_dim)

    def keep(x):
        if tuple(sorted(x.shape)) not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autocast('cpu', torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = block(torch.zeros(1, tokens, config.d_model, requires_grad=True), angle, angle, None)
    del y
    return sum(kept.values()) / tokens


print(f'update: {MICRO_BATCH:,} tokens at once; sampling: {ROWS} rows x {LENGTH:,} tokens; {BATCH:,} responses a step')
print('| model | parameters | activations a token | ranks | at start | update | sampling | on the wire, per step |\n'
      '|---|---|---|---|---|---|---|---|')
for name, config in MODELS.items():
    with torch.device('meta'):
        parameters = Transformer(config).num_params()
    activations = config.n_layers * activation_bytes(config) # the logits: float32 and its gradient, bfloat16 and its
    per_token = activations + 14 * config.vocab_size
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim * ROWS * LENGTH # keys and values, bfloat16
    for ranks in (1, 8, 64):
        share = BATCH // ranks
        pieces = max(1, round(share * LENGTH * USED / MICRO_BATCH))
        update = parameters * (16 / ranks + 6) + MICRO_BATCH * per_token
        sampling = parameters * (12 / ranks + 4) + min(1, share / ROWS) * cache # the gradient is gone by then
        wire = parameters * (12 * pieces + 4) * (ranks - 1) / ranks
        gb = lambda x: f'{x / 1e9:,.1f} GB'
        print(f'| {name} | {parameters / 1e6:,.0f} M | {activations / 1e6:.2f} MB | {ranks} '
              f'| {gb(parameters * 6)} | {gb(update)} | {gb(sampling)} | {gb(wire) if ranks > 1 else "none"} |')
