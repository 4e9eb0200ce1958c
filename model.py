"""
The model: a decoder-only transformer in the Llama / Qwen recipe, its KV cache, batched sampling,
scoring, pretrained weights.

RMSNorm before every sublayer, rotary positions, grouped-query attention, SwiGLU, no biases
(Qwen2.5's QKV bias, Qwen3's QK-norm and untied output weights are options). Beside the next-token
logits it has a value head: one scalar per position, which A*PO reads at the end of the prompt as
its estimate of V*(x).

One `trunk` serves training, prefill and one-token decoding: it takes a KVCache, or rows packed
behind one another, or neither. This file knows integers only: no text, no tasks, no rewards.
"""
import contextlib
import json
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

torch.backends.cuda.enable_cudnn_sdp(False) # it plans every new shape anew: 40 ms on an H200


@dataclass
class ModelConfig:
    vocab_size: int
    max_seq_len: int = 2 ** 20 # longest prompt + response, which bounds pretrained weights only
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 0 # heads of keys and values, which query heads share; 0: as many as n_heads
    d_ff: int = 384 # width of the SwiGLU, which has three matrices of this width
    head_dim: int = 0 # 0: d_model / n_heads
    rope_theta: float = 10000.0
    rope_scaling: dict = None # Llama 3.1's stretched positions, under the names of its config.json
    norm_eps: float = 1e-6
    tie_embeddings: bool = True # output weights = token embedding
    qkv_bias: bool = False # Qwen2.5
    qk_norm: bool = False # Qwen3, and our own models, because they learn faster with it

    def __post_init__(self):
        if not self.head_dim and self.d_model % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of features, so head_dim={self.head_dim} must be even")


class KVCache:
    """Keys and values of every layer for the positions seen so far, allocated once: (n_layers, B,
    n_kv_heads, max_len, head_dim). All rows are at the same position (see generate)."""

    def __init__(self, config, batch_size, max_len, device, dtype):
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0 # positions filled
        self.at = None # in a CUDA graph, which repeats plain numbers: the next position, a tensor (1,)

    def extend(self, count):
        """Take in the next `count` positions, and return which they are. A CUDA graph reads all
        keys up to the next multiple of 64, and `hidden`, (end,), is -inf at those not yet there."""
        self.new, self.hidden = slice(self.length, self.length + count), None
        self.length = self.end = self.length + count
        if self.at is not None:
            self.new, self.end = self.at, round_up(self.length, 64)
            later = torch.arange(self.end, device=self.at.device) > self.at
            self.hidden = torch.zeros_like(later, dtype=self.k.dtype).masked_fill(later, -torch.inf)
        assert self.end <= self.k.size(3), f"the cache holds {self.k.size(3)} positions, {self.end} are needed"
        return self.new

    def prepare_graph(self, at):
        """Take positions from a tensor from now on. What is not filled must be a number."""
        self.at = at
        for part in (self.k, self.v):
            part[..., self.length:, :] = 0

    def append(self, layer, k, v):
        """Write k, v (B, n_kv_heads, T, head_dim) there; return all keys and values of that layer.
        Those of a batch of one are written into every row, and only one row is returned."""
        self.k[layer][:, :, self.new] = k
        self.v[layer][:, :, self.new] = v
        return self.k[layer, :len(k), :, :self.end], self.v[layer, :len(k), :, :self.end]

    def keep(self, rows):
        """Drop every row that is not in rows (a LongTensor): finished responses stop costing
        anything."""
        for name in ('k', 'v'):
            old = getattr(self, name)
            new = torch.empty_like(old[:, :rows.numel()])
            filled = self.length if self.at is None else old.size(3)
            new[..., :filled, :] = old[:, rows, :, :filled]
            setattr(self, name, new)


class Prefix:
    """Keys and values of what all rows of a batch begin with, computed for one row and with its
    gradient. The first tokens to be appended are the prefix, later ones stand behind it."""

    def __init__(self):
        self.layers, self.length = {}, 0

    def extend(self, count):
        """Take in the next `count` positions, and return which they are."""
        self.length += count
        return slice(self.length - count, self.length)

    def append(self, layer, k, v):
        """Take k, v (1, n_kv_heads, T, head_dim) as the prefix, or return the prefix and k, v
        (B, ...) behind it."""
        if layer not in self.layers:
            self.layers[layer] = k, v
            return k, v
        return [torch.cat((first.expand(len(rest), -1, -1, -1), rest), dim=2)
                for first, rest in zip(self.layers[layer], (k, v))]


def shared_length(tokens):
    """Return how many tokens all rows (B, T) begin with, or 0 where it does not pay to compute
    these apart."""
    same = (tokens == tokens[:1]).all(0) # (T,)
    length = min(int(same.cumprod(0).sum()), tokens.size(1) - 1)
    return length if len(tokens) > 1 and length >= 32 else 0


class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads] # of q, k and v
        self.wqkv = nn.Linear(config.d_model, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, cache, lengths):
        B, T, _ = x.shape
        qkv = self.wqkv(x).view(B, T, -1, self.head_dim).transpose(1, 2) # (B, n_heads + 2 n_kv_heads, T, head_dim)
        *qk_heads, v_heads = self.heads
        qk, v = qkv.split([sum(qk_heads), v_heads], dim=1) # q and k are treated in one go
        if hasattr(self, 'q_norm'):
            norms = zip((self.q_norm, self.k_norm), qk_heads)
            scale = torch.cat([norm.weight.expand(count, 1, -1) for norm, count in norms]) # (heads, 1, head_dim)
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.q_norm.eps) * scale.to(qk.dtype)
        q, k = rotate(qk, cos, sin).split(qk_heads, dim=1)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if T == 1:
            # Decoding: the query heads that share a key head become the rows of one small matrix,
            # nothing is copied. Fused attention is made for many queries: two products beat it.
            q = q.view(B, k.size(1), -1, self.head_dim) * self.head_dim ** -0.5 # before, or float16 overflows
            scores = q @ k.transpose(-1, -2)
            hidden = getattr(cache, 'hidden', None)
            y = (scores if hidden is None else scores + hidden).softmax(-1) @ v
        elif lengths: # rows behind one another, and none sees another
            rows = zip(*(part.split(lengths, dim=2) for part in (q, k, v)))
            parts = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
            y = torch.cat([part.transpose(1, 2) for part in parts], dim=1)
        else:
            # Behind tokens in the cache each sees all of these, and of its own what comes before.
            past = k.size(2) - T
            seen = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if past else None
            if past and x.is_cuda: # with a mask its fused kernels want as many heads of keys as of queries
                k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=not past, enable_gqa=q.size(1) != k.size(1))
            y = y.transpose(1, 2)
        return self.wo(y.reshape(B, T, -1))


LLAMA3_KEYS = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


def rotary_frequencies(config):
    """Return the radians per position of each feature, (head_dim,): those of its pair, negative in
    the first half. Llama 3.1 slows down, by `factor`, the pairs that turn less than
    `low_freq_factor` times within the length it was first trained on, and the next ones ever
    less."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling:
        factor, low, high, length = (config.rope_scaling[name] for name in LLAMA3_KEYS)
        turns = length * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1) # 1: as it was
        frequencies = frequencies * (kept + (1 - kept) / factor)
    return torch.cat((-frequencies, frequencies))


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, arXiv 2104.09864), first half against second half as in Llama;
    sin carries the sign. x: (B, heads, T, head_dim)."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.w_gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False) # both in one multiply
        self.w_down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x, cos, sin, cache, lengths):
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, lengths)
        gate, up = self.w_gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.w_down(F.silu(gate) * up)


class Transformer(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False # keep only each block's input, and compute the rest again backwards
        self.share_prefix = True # compute once what all rows begin with
        self.pack = True # on a CPU score rows without their padding
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.value_head = nn.Linear(config.d_model, 1)
        self.tie_and_rotate()
        self.init_weights()

    def tie_and_rotate(self, device=None):
        """Make what is derived: output weights that are the embedding's, and the table of rotary
        positions."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        self.rotary_table(min(self.config.max_seq_len, 2048), device)

    @torch.inference_mode(False) # training reads it too
    def rotary_table(self, length, device=None):
        """Tabulate cosines and sines of the first `length` positions."""
        angles = torch.outer(torch.arange(length), rotary_frequencies(self.config))
        table = torch.stack((angles.cos(), angles.sin())).to(device=device) # (2, length, head_dim)
        self.register_buffer('cos_sin', table, persistent=False)

    @classmethod
    def without_memory(cls, config):
        """Build a model of shapes only, to be sharded or cast. `allocate` gives it memory; its
        weights come later."""
        with torch.device('meta'):
            return cls(config)

    def allocate(self, weights_on, device=None):
        """Give memory to the weights, which may stay on the CPU. Then tie them and make the rotary
        table again, on the device that computes, because to_empty undoes both. The value head is 0
        until it gets weights."""
        self.to_empty(device=weights_on)
        self.tie_and_rotate(device or weights_on)
        for p in self.value_head.parameters():
            nn.init.zeros_(p)

    def init_weights(self):
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # matrices that write to the residual stream start smaller, so that its variance
                # does not grow with depth
                to_residual = name.endswith(('wo.weight', 'w_down.weight'))
                scale = 1 / math.sqrt(2 * self.config.n_layers) if to_residual else 1.0
                nn.init.normal_(p, std=0.02 * scale)
        nn.init.zeros_(self.value_head.weight)

    def num_params(self):
        """Count every parameter, embeddings included (a tied one once)."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens, cache=None, at=None, lengths=None):
        """
        Compute tokens (B, T) -> logits (B, T, vocab_size), values (B, T).

        With a cache, tokens are the positions that follow those in it. `at`, a boolean mask (B, T),
        asks for the logits of the marked positions only: logits (at.sum(), vocab_size), which
        spares padding and prompts the widest matrix. With `lengths`, a list, tokens (1, sum of
        lengths) are rows that stand behind one another without padding, and none sees another.
        Raises ValueError when the sequence is longer than max_seq_len.
        """
        x = self.trunk(tokens, cache, lengths)
        # The value head learns from what the policy knows but does not change it: no gradient flows
        # into the trunk.
        values = self.value_head(x.detach()).float().sum(-1) # (B, T); a squeeze is a view, which FSDP dislikes
        logits = self.lm_head(x if at is None else x[at])
        return logits, values

    def trunk(self, tokens, cache=None, lengths=None):
        """Compute all but the heads: tokens (B, T) -> (B, T, d_model)."""
        shared = shared_length(tokens) if self.share_prefix and cache is None else 0
        if shared:
            prefix = Prefix()
            first = self.trunk(tokens[:1, :shared], prefix) # (1, shared, d_model)
            rest = self.trunk(tokens[:, shared:], prefix)
            return torch.cat((first.expand(len(tokens), -1, -1), rest), dim=1)
        end = max(lengths or [tokens.size(1)]) + (cache.length if cache is not None else 0)
        if end > self.config.max_seq_len:
            raise ValueError(f"a sequence of {end} tokens does not fit max_seq_len={self.config.max_seq_len}")
        if end > self.cos_sin.size(1): # it grows: for a million positions it would take gigabytes
            self.rotary_table(min(2 * end, self.config.max_seq_len), tokens.device)
        x = self.embed(tokens) # (B, T, d_model)
        where = cache.extend(tokens.size(1)) if cache is not None else slice(end)
        if lengths: # positions start anew in each row
            where = torch.cat([torch.arange(length) for length in lengths])
        cos, sin = self.cos_sin[:, where].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, cache, lengths) if not self.recompute or cache is not None else \
                checkpoint(block, x, cos, sin, None, lengths, use_reentrant=False)
        return self.norm(x)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, ends=(0,), uniform=None, stop=None):
    """Sample one response for each prompt.

    prompts: list of lists of token ids, lengths may differ. temperature divides the logits; 0 is
    greedy. ends: the tokens that end a response; the first one also pads. uniform (B,
    max_new_tokens) in [0, 1): the noise, one number for each token, fresh when not given; what a
    row samples does not depend on the others. stop, a function, says before each step whether to
    raise KeyboardInterrupt.

    Returns tokens (B, T), each row its prompt, its response and padding, and mask (B, T), True at
    sampled positions up to and including the first end. A row without an end under its mask ran
    into max_new_tokens. Raises ValueError when prompt and max_new_tokens exceed max_seq_len.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if longest + max_new_tokens > model.config.max_seq_len:
        raise ValueError(f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} "
                         f"do not fit max_seq_len={model.config.max_seq_len}")
    batch = Decoding(model, prompts, max_new_tokens, temperature, ends, uniform)
    # Without autograd's bookkeeping a step of one row takes three quarters of the time. What is made
    # inside can never be trained on, so the tokens and the mask are made outside, and written to.
    with torch.inference_mode():
        batch.read(shortest)
        for t in range(shortest, longest + max_new_tokens): # the newest tokens stand there
            if stop and stop():
                raise KeyboardInterrupt
            # A GPU is asked every few tokens only, because it has to stop and answer.
            if t % 8 == 0 or not batch.tokens.is_cuda:
                batch.drop_ended()
            if len(batch.rows) == 0 or t == longest + max_new_tokens - 1:
                break
            batch.step()
    T = int(row_lengths(batch.mask).max()) # positions that no row reached are cut off
    return batch.tokens[:, :T], batch.mask[:, :T]


class Decoding:
    """
    The responses of a batch while they are sampled. No row is padded on the left: all stand at the
    same position, and a row whose prompt is longer than the shortest has its own tokens forced
    until the prompt is used up. So no row needs a mask of its own. Rows that end leave the batch.
    """

    def __init__(self, model, prompts, max_new_tokens, temperature, ends, uniform):
        self.model, self.temperature, device = model, temperature, model.embed.weight.device
        self.last = max_new_tokens - 1 # index of a response's last token
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)
        B, T = len(prompts), int(self.lengths.max()) + max_new_tokens
        padded = [prompt + [ends[0]] * (T - len(prompt)) for prompt in prompts]
        self.tokens = torch.tensor(padded, device=device) # (B, T)
        self.mask = torch.zeros(B, T, dtype=torch.bool, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.uniform = torch.rand(B, max_new_tokens, device=device) if uniform is None else uniform.to(device)
        self.cache = KVCache(model.config, B, round_up(T, 64), device, model.embed.weight.dtype)
        self.rows = torch.arange(B, device=device) # the rows still running
        self.alive = torch.ones(B, dtype=torch.bool, device=device) # one flag for each of them
        self.graph = None # of a step on a GPU

    def read(self, shortest):
        """Read what the prompts have up to the shortest one's end, and sample the next tokens."""
        self.at = torch.tensor([shortest - 1], device=self.tokens.device) # the position of the newest tokens
        shared = shared_length(self.tokens[:, :shortest])
        if shared: # one row computes it for all
            self.model.trunk(self.tokens[:1, :shared], self.cache)
        self.sample(self.tokens[:, shared:shortest])
        if self.at.is_cuda:
            self.cache.prepare_graph(self.at)
            if self.tokens.size(1) > self.model.cos_sin.size(1): # a graph cannot make it longer
                self.model.rotary_table(self.tokens.size(1), self.at.device)

    def sample(self, unseen):
        """Let the model read the tokens (rows, T) that it has not seen, and sample the next of each
        row."""
        # (rows, vocab_size) for the last position only, because it is 150,000 wide in Qwen
        logits = self.model.lm_head(self.model.trunk(unseen, self.cache)[:, -1])
        self.at += 1
        index = self.at - self.lengths[self.rows] # in the response; negative inside a prompt
        sampled = sample_token(logits, self.temperature, self.uniform[self.rows, index.clamp(0, self.last)])
        is_response = (index >= 0) & self.alive
        token = torch.where(is_response, sampled, self.tokens[self.rows, self.at]) # or the prompt's own
        self.tokens[self.rows, self.at], self.mask[self.rows, self.at] = token, is_response
        ended = is_response & (token[:, None] == self.ends).any(1)
        self.alive &= ~ended & (index < self.last)

    def step(self):
        """Sample the next token of each row. Python starts kernels more slowly than a GPU runs them,
        so there a step is recorded, and repeated for as long as its shapes hold."""
        if not self.at.is_cuda:
            return self.sample(self.tokens[self.rows[:, None], self.at])
        if self.graph is None or self.cache.length == self.cache.end:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode='thread_local'):
                self.sample(self.tokens[self.rows[:, None], self.at])
        else:
            self.cache.length += 1
        self.graph.replay()

    def drop_ended(self):
        """Drop the rows that have ended once they are an eighth of all: dropping copies the cache."""
        if 8 * self.alive.sum() <= 7 * len(self.rows):
            keep = self.alive.nonzero().squeeze(1)
            self.cache.keep(keep)
            self.rows, self.alive, self.graph = self.rows[keep], self.alive[keep], None


def sample_token(logits, temperature, uniform):
    """Sample one token per row by inverting the cumulative distribution. logits (B, V), uniform
    (B,) in [0, 1) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = F.softmax(logits.float() / temperature, dim=-1).cumsum(-1) # (B, V)
    # The first token whose cumulative probability exceeds the draw; one of probability 0 can never
    # be it.
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logits.size(-1) - 1)


def token_logprobs(model, tokens, mask, temperature=1.0, dtype='float32'):
    """
    Score responses: the log-probabilities of the tokens under the mask, and the value head at the
    end of the prompt.

    tokens, mask (B, T) -> (B, T) in float32, zero outside the mask, and (B,). temperature divides
    the logits, as in sampling. dtype is the precision of the matrix multiplies.
    """
    # The logits at position t are about the token at t + 1.
    inputs, targets = tokens[:, :-1], mask[:, 1:]
    prompt_end = mask.int().argmax(1, keepdim=True) - 1
    with torch.autocast(tokens.device.type, getattr(torch, dtype), enabled=dtype != 'float32'):
        if packs(model, inputs):
            ends = row_lengths(targets)
            inside = torch.arange(inputs.size(1)) < ends[:, None] # (B, T - 1), not padding
            logits, values = model(inputs[inside][None], at=targets[inside][None], lengths=ends.tolist())
            values = torch.zeros(inside.shape).masked_scatter(inside, values)
        else:
            logits, values = model(inputs, at=targets)
    logprobs = -F.cross_entropy(logits.float() / temperature, tokens[:, 1:][targets], reduction='none')
    by_token = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)
    return by_token, values.gather(1, prompt_end).squeeze(1)


def packs(model, tokens):
    """Return whether rows (B, T) are scored behind one another, without their padding: on a CPU,
    because a GPU would have to start each row's attention, and unless all rows begin alike, which
    is computed once where they stand side by side."""
    if not model.pack or tokens.device.type != 'cpu':
        return False
    return not (model.share_prefix and shared_length(tokens))


def round_up(n, multiple):
    """Return the least multiple that is not below n."""
    return -(-n // multiple) * multiple


def row_lengths(mask):
    """Return how many positions each row has up to its last one under the mask: (B, T) -> (B,)."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1)


def micro_batches(mask, micro_batch_tokens, at_least=1, packed=False):
    """
    Cut a batch into pieces of rows of similar length, the longest first, with at most
    micro_batch_tokens each: padding counts too, unless the rows are packed. A row that is longer is
    a piece of its own. mask (B, T) -> list of at_least or more LongTensors of row indices.
    """
    lengths = row_lengths(mask).cpu().numpy()
    padded = round_up(lengths, 16) # as trim leaves them
    pieces = []
    for row in (-lengths).argsort(kind='stable').tolist():
        piece = pieces[-1] + [row] if pieces else [row]
        size = lengths[piece].sum() if packed else len(piece) * padded[piece[0]]
        if pieces and size <= micro_batch_tokens:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    while len(pieces) < at_least:
        pieces.sort(key=len)
        largest = pieces.pop()
        half = len(largest) // 2
        pieces += [largest[:half], largest[half:]]
    return [torch.tensor(piece, dtype=torch.long, device=mask.device) for piece in pieces]


def trim(tokens, mask):
    """Cut the padding behind the longest row; lengths are multiples of 16, because each new shape
    costs a CPU a new kernel. tokens, mask (B, T) -> (B, T'), (B, T')."""
    end = min(round_up(int(row_lengths(mask).max()), 16), mask.size(1))
    return tokens[:, :end], mask[:, :end]


@torch.no_grad()
def embed_numbers(model, numbers):
    """Let tokens that are numbers, {id: value}, start as sines and cosines of their value (after
    FoNE, arXiv 2502.09741). Addition then becomes rotation, which the model learns in minutes; from
    random vectors it has to discover the order of the numbers first."""
    ids, values = torch.tensor([*numbers.keys()]), torch.tensor([*numbers.values()], dtype=torch.float32)
    angles = values[:, None] * 2 * math.pi / torch.tensor([2, 3, 5, 7, 10, 20, 50, 100, 200, 400])
    waves = torch.cat((angles.cos(), angles.sin()), dim=1) # (numbers, 20), each row of length sqrt(10)
    directions = torch.randn(waves.size(1), model.config.d_model) / math.sqrt(10)
    model.embed.weight[ids] = 0.02 * waves @ directions + 0.25 * model.embed.weight[ids]


# --------------------------------------------------------------------------------------------------
# Pretrained weights, in the layout of Hugging Face: config.json and one or several safetensors
# files

ARCHITECTURES = dict(llama={}, qwen2=dict(qkv_bias=True), qwen3=dict(qk_norm=True)) # by what they add to Llama
HF_CONFIG = dict(vocab_size='vocab_size', max_seq_len='max_position_embeddings', d_model='hidden_size',
                 n_layers='num_hidden_layers', n_heads='num_attention_heads', n_kv_heads='num_key_value_heads',
                 d_ff='intermediate_size', head_dim='head_dim', norm_eps='rms_norm_eps', rope_theta='rope_theta',
                 rope_scaling='rope_scaling', tie_embeddings='tie_word_embeddings') # our names, theirs
HF_MODULES = { # ours, and theirs, whose rows stand in it one after another
    'embed': ['model.embed_tokens'], 'norm': ['model.norm'], 'lm_head': ['lm_head'],
    'attn_norm': ['input_layernorm'], 'attn.wqkv': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'], 'attn.wo': ['self_attn.o_proj'],
    'mlp_norm': ['post_attention_layernorm'], 'w_gate_up': ['mlp.gate_proj', 'mlp.up_proj'],
    'w_down': ['mlp.down_proj']}


def read_config(folder):
    """Read config.json into a ModelConfig, with the format's own defaults. Raises ValueError,
    naming it, for what the Transformer does not cover."""
    with open(os.path.join(folder, 'config.json')) as file:
        theirs = dict(tie_word_embeddings=False, rope_theta=10000.0, hidden_act='silu', max_position_embeddings=2048)
        theirs |= json.load(file)
    rope = theirs.get('rope_scaling') or theirs.get('rope_parameters') or {} # transformers 5 writes the latter
    theirs['rope_theta'] = rope.get('rope_theta', theirs['rope_theta'])
    theirs['rope_type'] = rope.get('rope_type', rope.get('type', 'default'))
    theirs['rope_scaling'] = rope if theirs['rope_type'] == 'llama3' else None
    for name, covered in dict(model_type=[*ARCHITECTURES], rope_type=['default', 'llama3'], hidden_act=['silu'],
                              use_sliding_window=[None, False]).items():
        if theirs.get(name) not in covered:
            raise ValueError(f"{name} {theirs.get(name)!r} is not covered, only {' and '.join(map(str, covered))}")
    for name in LLAMA3_KEYS if theirs['rope_scaling'] else ():
        if name not in rope:
            raise ValueError(f"config.json says rope_type llama3 without {name}")
    known = {ours: theirs[name] for ours, name in HF_CONFIG.items() if theirs.get(name) is not None}
    return ModelConfig(**known, **ARCHITECTURES[theirs['model_type']])


def counterparts(model):
    """Yield pairs of each of our parameters and the tensors of Hugging Face that its rows are made
    of, {name: rows}: q, k, v and gate, up are one matrix here. The value head, which they do not
    have, is left out."""
    config = model.config
    qkv = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    for name, p in model.named_parameters(): # without lm_head where that is the embedding
        layer, module, kind = re.fullmatch(r'(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)', name).groups()
        if module != 'value_head':
            place = f'model.layers.{layer}.' if layer else ''
            names = [f'{place}{theirs}.{kind}' for theirs in HF_MODULES[module]]
            rows = qkv if module == 'attn.wqkv' else [p.size(0) // len(names)] * len(names)
            yield p, dict(zip(names, rows))


def weight_files(folder):
    """Return the paths of the safetensors files that hold a model: the one whole file, as in
    transformers, else those that its index names, because others may lie there too."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    names = ['model.safetensors']
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, *names)):
        with open(index) as file:
            names = sorted({*json.load(file)['weight_map'].values()})
    return [os.path.join(folder, name) for name in names]


def load_pretrained(model, folder):
    """Read the weights in a folder: yield pairs of a parameter and its whole value, one after the
    other, so that no second copy is held in memory. Raises ValueError, naming it, for a tensor that
    is unknown, of another shape, missing or not tied where config.json says so."""
    from safetensors import safe_open
    where = {}
    with contextlib.ExitStack() as stack:
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, 'pt'))
            where |= dict.fromkeys(file.keys(), file)
        pairs = list(counterparts(model))
        expected = {name: (rows, *p.shape[1:]) for p, parts in pairs for name, rows in parts.items()}
        ignored = ('rotary_emb.inv_freq',) + ('lm_head.weight',) * model.config.tie_embeddings # some files repeat these
        for name, file in where.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != expected.get(name) and not name.endswith(ignored):
                raise ValueError(f"there is a tensor {name} {shape}, which " + (
                    f"should be {expected[name]}" if name in expected else "this architecture has not"))
        if missing := expected.keys() - where.keys():
            raise ValueError(f"the tensor {min(missing)} is missing ({len(missing)} in all)")
        head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
        if model.config.tie_embeddings and head in where \
                and not torch.equal(where[head].get_tensor(head), where[embedding].get_tensor(embedding)):
            raise ValueError(f"config.json says tie_word_embeddings, but {head} is not {embedding}")
        for p, parts in pairs:
            yield p, torch.cat([where[name].get_tensor(name) for name in parts])
