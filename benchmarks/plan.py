"""
What fits where: memory per GPU and bytes on the wire per step, for models from 50M to 7B on 1, 8
and 64 GPUs, and the settings by which pretrained models fit one GPU. Arithmetic, but for the
activations, which autograd's hooks count on one block.

    python benchmarks/plan.py

Per parameter. Sharded over the ranks: 4 bytes of master weight, 4 of gradient, 8 of AdamW. Whole on
every rank: 2 of the model that responds, 2 of the reference, and in an update what computes: 2 that
autocast makes or, where the model is sharded, 8 of two blocks and the outer weights with their
gradients, while they are used. With --cpu_offload the GPU holds 2 of one of the two models at a
time, and what computes.

On the wire, per rank and step: every micro-batch gathers the weights in bfloat16 forward and
backward and scatters the gradients in float32, 2 + 2 + 4 bytes, and the model that responds is
refreshed once, 4 (times (ranks - 1) / ranks).
"""
import functools
import itertools
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import Block, ModelConfig, Transformer
from train import GPU, MODEL

QWEN = dict(qkv_bias=True, max_seq_len=2048)
MODELS = {
    '50M': ModelConfig(116, 1024, **{name: GPU[name] for name in MODEL}),
    'Qwen2.5-0.5B': ModelConfig(151936, d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, d_ff=4864, **QWEN),
    'Qwen2.5-1.5B': ModelConfig(151936, d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, d_ff=8960, **QWEN),
    'Qwen2.5-3B': ModelConfig(151936, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=2, d_ff=11008, **QWEN),
    'Qwen2.5-7B': ModelConfig(152064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, d_ff=18944,
                              tie_embeddings=False, **QWEN),
}
BATCH, LENGTH, USED = 1024, 1280, 0.5 # responses a step, their most tokens, how much of these is used on average
# In the order of what they cost: settings to lower, at 1,024 new tokens after a prompt of 256.
DEFAULTS = dict(micro_batch_tokens=4096, rollout_rows=256, activation_checkpointing=False, cpu_offload=False)
TRIES = [dict(micro_batch_tokens=tokens, rollout_rows=rows, activation_checkpointing=again, cpu_offload=offload)
         for offload, again, rows, tokens in itertools.product(
             (False, True), (False, True), (256, 128, 64), (4096, 2048, 1280))]


@functools.cache
def activation_bytes(name, tokens=251):
    """Count the bytes that one block keeps for its backward pass, per token, in bfloat16."""
    config = MODELS[name]
    block, kept = Block(config, 0), {}
    weights = {tuple(sorted(p.shape)) for p in block.parameters()} # and their bfloat16 copies, counted elsewhere
    angle = torch.zeros(tokens, config.head_dim)

    def keep(x):
        if tuple(sorted(x.shape)) not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autocast('cpu', torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = block(torch.zeros(1, tokens, config.d_model, requires_grad=True), angle, angle, None, None)
    del y
    return sum(kept.values()) / tokens


@functools.cache
def parameters(name):
    """Count the parameters of a model."""
    return Transformer.without_memory(MODELS[name]).num_params()


def memory(name, ranks, micro_batch_tokens, rollout_rows, activation_checkpointing, cpu_offload):
    """Return the bytes on a GPU while it updates and while it samples."""
    config, P = MODELS[name], parameters(name)
    block = activation_bytes(name)
    activations = config.n_layers * 4 * config.d_model + block if activation_checkpointing else config.n_layers * block
    per_token = activations + 14 * config.vocab_size # the logits: float32 and its gradient, bfloat16 and its
    cache = 4 * config.n_layers * config.n_kv_heads * config.head_dim * min(rollout_rows, BATCH // ranks) * LENGTH
    outer = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2) # embedding and output weights
    computes = 8 * (outer + 2 * (P - outer) / config.n_layers) if cpu_offload or ranks > 1 else 2 * P
    # weights, gradients, AdamW's two averages, the weights before the step; the copies that sample and are pi_ref
    update, sampling = (2 * P, 2 * P) if cpu_offload else (P * (20 / ranks + 4), P * (12 / ranks + 4))
    return update + computes + micro_batch_tokens * per_token, sampling + cache


def gb(x):
    return f'{x / 1e9:,.1f} GB'


print(f'{BATCH:,} responses a step of up to {LENGTH:,} tokens; ' + ', '.join(f'{k}={v}' for k, v in DEFAULTS.items()))
print('\n| model | parameters | activations a token | ranks | update | sampling | on the wire, per step |\n'
      '|---|---|---|---|---|---|---|')
for name, config in MODELS.items():
    for ranks in (1, 8, 64):
        pieces = max(1, round(BATCH // ranks * LENGTH * USED / DEFAULTS['micro_batch_tokens']))
        wire = parameters(name) * (8 * pieces + 4) * (ranks - 1) / ranks
        update, sampling = map(gb, memory(name, ranks, **DEFAULTS))
        print(f'| {name} | {parameters(name) / 1e6:,.0f} M | {config.n_layers * activation_bytes(name) / 1e6:.2f} MB '
              f'| {ranks} | {update} | {sampling} | {gb(wire) if ranks > 1 else "none"} |')

print('\nOne GPU, with a tenth of it to spare: the settings that are not the default, and the most that is in use\n')
sizes = (16, 24, 48, 80, 141)
print('| model | ' + ' | '.join(f'{size} GB' for size in sizes) + ' |\n|---|' + '---|' * len(sizes))
for name in [name for name in MODELS if 'Qwen' in name]:
    cells = []
    for size in sizes:
        needs, settings = next(((needs, settings) for settings in TRIES
                                if (needs := max(memory(name, 1, **settings))) < 0.9e9 * size), (None, {}))
        changed = ' '.join(f'`--{k}={v}`' for k, v in settings.items() if v != DEFAULTS[k])
        cells.append(f"{changed or 'as it is'}: {gb(needs)}" if settings else 'no')
    print(f"| {name} | {' | '.join(cells)} |")
