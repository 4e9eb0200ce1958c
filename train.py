"""
Train a transformer to solve countdown or multiplication: warm-up by imitation, then A*PO.

    python train.py                                               # countdown on this machine, CPU or GPU
    torchrun --nproc_per_node=1 train.py --task=multiplication    # the same through torchrun
    torchrun --nproc_per_node=8 train.py --batch_size=4096        # eight GPUs, FSDP
    python train.py --init_from=resume                            # go on with the run in out/countdown
    python train.py --init_from=PATH --out_dir=out/more           # A*PO from the model of a checkpoint
    python train.py --init_from=Qwen/Qwen2.5-0.5B                 # A*PO from pretrained weights, TinyZero's experiment

Every setting below can be given as --name=value or --name value; --help lists them.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import glob
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence

from apo import apo_loss, group_advantages, grpo_loss, optimal_value, sequence_logprobs, value_loss
from model import SIZES, ModelConfig, Transformer, generate, load_pretrained, read_config
from tasks import EOS, WRONG, PretrainedTokenizer, Tokenizer, find_task, tokenizer_files

# ---- settings; what is 0 or 'auto' here and not given is filled in by AUTO below, for the task and the machine -----
task = 'countdown' # countdown | multiplication | chain | equation | grid | reasoning_gym:NAME
out_dir = '' # where checkpoints, metrics and curves go; empty: out/TASK
init_from = 'scratch' # scratch | resume (the newest checkpoint in out_dir) | a checkpoint or pretrained weights
seed = 1337 # problems, weights and sampling noise all follow from it
device = 'auto' # auto | cpu | cuda | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16: of the matrix multiplies; master weights are always float32
compile = False # torch.compile the training forward
# problems
min_numbers = 3 # countdown: how many numbers at least
max_numbers = 4 # countdown: how many at most
max_number = 20 # countdown: numbers are drawn from 1 to this
max_target = 100 # countdown: targets are drawn from 1 to this, among those that can be reached
max_factor = 99 # multiplication: factors are drawn from 1 to this
partial_credit = 0.0 # countdown, reasoning_gym: the most that a nearly right answer earns, below 1
# model
d_model = 0 # width of the residual stream
n_layers = 0 # blocks
n_heads = 0 # attention heads
n_kv_heads = 0 # heads of keys and values, shared by groups of attention heads
d_ff = 0 # width of the SwiGLU
# warm-up: imitation of the task's demonstrations
warmup_steps = 0 # optimizer steps; none where 0 is given
warmup_batch_size = 0 # demonstrations per step, over all ranks
warmup_learning_rate = 3e-3 # AdamW, for all but the matrices of the blocks; decays linearly over the last two fifths
warmup_muon_learning_rate = 0.006 # Muon, for the matrices of the blocks; decays with it
# A*PO
algorithm = 'apo' # apo | grpo
max_steps = 0 # optimizer steps after the warm-up; none where 0 is given
batch_size = 0 # responses per step, over all ranks
learning_rate = 0.0 # AdamW; decays linearly to 0 over max_steps
grad_clip = 1.0 # clip the gradient's norm here
beta1 = 0.5 # temperature of V* (apo.py, formula 1)
beta2 = 1e-3 # strength of the pull to the reference (apo.py, formula 2)
temperature = 1.0 # divides the logits, in sampling and in scoring alike
max_new_tokens = 0 # longest response; one that does not end by then has reward 0
num_train_samples = 0 # prompts of stage 1, where the reference answers each num_responses_per_prompt times
num_responses_per_prompt = 8 # responses of the reference in stage 1, and the group size of GRPO
fresh_prompts = True # new prompts at every step with V* from the value head; False: those of stage 1 with their own V*
filter_failed = False # with fresh_prompts=False: leave out the prompts that the reference never solved
ref_update_interval = 0 # every so many steps the reference becomes the current policy; 0: never, as in the paper
value_learning_rate = 1e-2 # AdamW, for the value head
# evaluation and records
eval_temperature = 1.0 # 0 is greedy
num_eval_samples = 2000 # held-out problems of the final evaluation; those on the way use an eighth of them
eval_interval = 0 # A*PO steps between evaluations; in the warm-up, whose steps are short, 50 times as many
checkpoint_interval = 500 # steps between checkpoints; in A*PO, whose steps are long, each evaluation leaves one too
keep_checkpoints = 3 # the newest checkpoints that stay on the disk; 0: all
tracker = 'none' # none | wandb | tensorboard: where the metrics go beside metrics.jsonl
micro_batch_tokens = 0 # tokens in one forward and backward pass; halved where memory runs out, on one rank
activation_checkpointing = False # compute each block twice in an update, to keep less in memory
cpu_offload = False # keep master weights, optimizer state and, between uses, the copies of the policy on the CPU
rollout_rows = 0 # responses sampled side by side; halved where memory runs out, on one rank
# ---- end of settings -----------------------------------------------------------------------------------------------
SETTINGS = {name: value for name, value in list(globals().items())
            if isinstance(value, (bool, int, float, str)) and name.islower() and not name.startswith('_')}
CHOICES = dict(algorithm=('apo', 'grpo'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
               tracker=('none', 'wandb', 'tensorboard'))

# What the settings that are left open become: by machine, and where a task needs something else, by both.
AUTO = {
    'cpu': dict(**SIZES['small'], warmup_steps=6000, warmup_batch_size=16, max_steps=80, batch_size=128,
                learning_rate=2e-4, num_train_samples=256, max_new_tokens=800, eval_interval=20,
                micro_batch_tokens=2048, rollout_rows=1024),
    'gpu': dict(**SIZES['50m'], warmup_steps=3000, warmup_batch_size=256, max_steps=400, batch_size=1024,
                learning_rate=2e-4, num_train_samples=2048, max_new_tokens=800, eval_interval=100,
                micro_batch_tokens=131072, rollout_rows=4096),
    ('multiplication', 'cpu'): dict(warmup_steps=4000, warmup_batch_size=32, max_steps=160, learning_rate=4e-4,
                                    num_train_samples=512, max_new_tokens=96),
    ('multiplication', 'gpu'): dict(warmup_steps=1000, max_steps=200, max_new_tokens=96),
    ('chain', 'cpu'): dict(warmup_steps=1000, warmup_batch_size=32, max_steps=60, max_new_tokens=64),
    ('equation', 'cpu'): dict(warmup_steps=1500, warmup_batch_size=32, max_steps=60, max_new_tokens=64),
    ('grid', 'cpu'): dict(warmup_steps=2000, warmup_batch_size=32, max_steps=120, max_new_tokens=192),
    # Over all of these, and over defaults that are not open: TinyZero's puzzles, small steps, pieces that leave room
    # for 150,000 logits a token.
    'pretrained': dict(max_steps=200, batch_size=256, learning_rate=1e-6, value_learning_rate=1e-4, max_new_tokens=1024,
                       max_number=99, num_train_samples=512, eval_interval=25, micro_batch_tokens=4096,
                       rollout_rows=256),
}
WARMUP, STAGE1, TRAIN, EVAL = range(4) # streams of random numbers
LOGS = ('metrics.jsonl', 'samples.jsonl')
PARTS = ('rollout', 'reference', 'update', 'grading') # of a step of A*PO, timed
GRADES = ('reward', 'correct', 'formatted', 'truncated', 'length') # what rollout says of a response
FORMAT = 'tinyzero-astarpo 1' # what a checkpoint of ours says of itself
rank, world_size = 0, 1
stop_signal = 0 # the number of the signal that asked this process to stop


@dataclasses.dataclass
class Run:
    """What a run consists of."""
    task: object
    tokenizer: Tokenizer
    model: Transformer # the policy pi, and the value head; sharded when there are several ranks
    sampler: Transformer # a whole copy of the policy that responds; the policy itself on one rank in float32
    reference: Transformer = None # pi_ref, whole and frozen
    base: Transformer = None # the warmed-up model, for the KL that a refreshed reference would hide
    optimizers: list = None # AdamW, and Muon where it is on
    values: torch.Tensor = None # V* of the prompts of stage 1, (num_train_samples,)
    step: int = 0 # optimizer steps so far, those of the warm-up included
    started: float = dataclasses.field(default_factory=time.time) # this run, less the time between its sessions
    warmup_accuracy: float = 0.0
    bad_steps: int = 0 # steps in a row whose gradient was not finite
    loss_scale: float = 1.0 # in float16 the loss is multiplied by this, or small gradients would vanish
    recent: list = dataclasses.field(default_factory=list) # when the last steps ended, for the time left
    rewards: list = dataclasses.field(default_factory=list) # of this session's steps, for the hints
    hints: list = dataclasses.field(default_factory=list) # that were given

    @property
    def seconds(self):
        return time.time() - self.started


def main():
    run = build(configure(sys.argv[1:]))
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
    print0(f"{run.model.num_params():,} parameters, {run.model.config.vocab_size} tokens in the vocabulary")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)

    # Warm-up: imitate demonstrations, until the model knows the format and some of the task.
    while run.step < warmup_steps:
        metrics = warm_up_step(run)
        report(run, 'warm-up', every=20, **metrics)
        if run.step % (50 * eval_interval) == 0 and run.step < warmup_steps:
            log_evaluation(run, f'at step {run.step} of the warm-up', share=8)
        checkpoint_if_due(run)
    if run.reference is None:
        run.base = run.reference = frozen_copy(run.model)
        run.optimizers = make_optimizers(run.model, learning_rate)
        if max_steps:
            run.warmup_accuracy = log_evaluation(run, 'after the warm-up')['accuracy']

    # Stage 1: the frozen reference answers each prompt several times; V* follows from the rewards.
    if max_steps and algorithm == 'apo' and run.values is None:
        estimate_values(run)
        save_checkpoint(run)

    # Stage 2: regress beta2 log(pi / pi_ref) on the optimal advantage r - V*, one fresh response per prompt.
    while run.step < warmup_steps + max_steps:
        problems, values = training_problems(run)
        batch, seconds = rollout(run, problems, TRAIN, temperature)
        metrics = update(run, batch, values, seconds)
        report(run, algorithm, **metrics)
        stage2_step = run.step - warmup_steps
        if stage2_step < max_steps:
            if ref_update_interval and stage2_step % ref_update_interval == 0:
                run.reference = frozen_copy(run.model)
                if algorithm == 'apo' and not fresh_prompts:
                    estimate_values(run)
            if stage2_step % eval_interval == 0:
                log_evaluation(run, f'at step {stage2_step}', share=8)
                save_checkpoint(run)
        checkpoint_if_due(run)
    finish(run)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if world_size > 1 and (rank or tracker == 'none'): # in Python's own end gloo's threads now and then abort
            os._exit(0)


# --------------------------------------------------------------------------------------------------------------------
# The parts of a step

def shrinks(setting, function):
    """Where memory runs out in the function, half as much at a time is tried: `setting` is halved and stays so.
    Not where the model is sharded, for FSDP cannot be interrupted. No optimizer steps in there: it might be half done.
    """
    @functools.wraps(function)
    def attempt(run, *args, **options):
        try:
            return function(run, *args, **options)
        except RuntimeError as error:
            if not out_of_memory(error) or world_size > 1 or cpu_offload or globals()[setting] < 2:
                raise
        globals()[setting] //= 2 # here, where the exception no longer holds what was allocated
        run.model.zero_grad()
        torch.cuda.empty_cache() # does nothing elsewhere
        print0(f"out of memory: going on with --{setting}={globals()[setting]}")
        return attempt(run, *args, **options)
    return attempt


def out_of_memory(error):
    """CUDA, MPS and the CPU each say it in their own words."""
    return re.search("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory", str(error))


def warm_up_step(run):
    """One optimizer step of imitation on fresh demonstrations; returns its metrics, with the mean loss per token."""
    started, sequences = time.time(), []
    for problem, rng in draw(run.task, WARMUP, run.step, warmup_batch_size):
        prompt = run.tokenizer.encode(run.task.prompt(problem))
        for _ in range(100): # a demonstration that the policy could not give within its limit is drawn again
            response = run.tokenizer.encode(run.task.demonstration(problem, rng)) + [run.tokenizer.eos]
            if len(response) <= max_new_tokens:
                break
        else:
            sys.exit(f"error: --max_new_tokens={max_new_tokens} is too short for the demonstrations of {task}")
        sequences.append((prompt, response))
    tokens = pad_sequence([torch.tensor(p + r) for p, r in sequences], True, run.tokenizer.eos).to(device) # (B, T)
    mask = pad_sequence([torch.arange(len(p + r)) >= len(p) for p, r in sequences], True).to(device)

    progress = run.step / warmup_steps
    scale_learning_rates(run, min(1, (run.step + 1) / 20, 0.05 + 0.95 * (1 - progress) / 0.4))
    total_tokens = all_reduce(mask.sum())
    total_loss = imitation_gradient(run, tokens, mask, total_tokens)
    optimizer_step(run)
    run.step += 1
    return dict(loss=all_reduce(total_loss).item(), tokens=int(total_tokens),
                seconds_update=round(time.time() - started, 3))


@functools.partial(shrinks, 'micro_batch_tokens')
def imitation_gradient(run, tokens, mask, total_tokens):
    """Accumulate the gradient of the mean loss per token over all ranks; returns this rank's part of that loss."""
    total_loss = 0.0
    for rows in micro_batches(mask):
        logprobs, _ = token_logprobs(run.model, *trim(tokens[rows], mask[rows]))
        loss = -logprobs.sum() / total_tokens
        (loss * world_size * run.loss_scale).backward() # FSDP averages gradients over the ranks
        total_loss += loss.detach()
    return total_loss


def estimate_values(run):
    """Stage 1: V* of num_train_samples prompts from num_responses_per_prompt responses of the reference each. The
    prompts' own V* is kept in run.values, and the value head learns to predict it."""
    print0(f"stage 1: the reference answers {num_train_samples} prompts, {num_responses_per_prompt} times each ...")
    problems = [p for p, _ in draw(run.task, STAGE1, 0, num_train_samples)]
    batch, _ = rollout(run, problems, STAGE1, temperature, num_responses_per_prompt)
    local_rewards = batch['reward'].view(len(problems), -1) # (prompts of this rank, N)
    rewards = torch.tensor(gather_lists(local_rewards.tolist()), device=device) # (num_train_samples, N)
    run.values = optimal_value(rewards, beta1)
    solved = (rewards > 0).any(1).float().mean().item()
    print0(f"stage 1: mean reward {rewards.mean():.3f}, mean V* {run.values.mean():.3f}, "
           f"{1 - solved:.1%} of the prompts never solved")
    if solved == 0:
        fail(f"every reward of stage 1 is zero ({batch['truncated'].mean():.0%} of the responses were cut off at "
             f"--max_new_tokens={max_new_tokens}), so there is nothing to learn from: give the warm-up more "
             "--warmup_steps, make the task easier (--max_numbers=3), or reward near misses (--partial_credit=0.5)")
    # The head reads one vector of each prompt, at its end. It is taken once and from the reference, here the same as
    # the policy, which would keep the graph of every prompt.
    ends = batch['mask'][::num_responses_per_prompt].int().argmax(1) - 1
    tokens = batch['tokens'][::num_responses_per_prompt, :int(ends.max()) + 1]
    rows = torch.arange(len(tokens), device=device).split(max(1, micro_batch_tokens // tokens.size(1)))
    with torch.no_grad(), on_device(run.reference):
        features = torch.cat([run.reference.trunk(tokens[r])[range(len(r)), ends[r]] for r in rows]).float()
    for _ in range(100):
        head = [unshard(p).detach().requires_grad_() for p in run.model.value_head.parameters()]
        loss = value_loss(F.linear(features, *head).squeeze(1), local_rewards, beta1)
        for p, gradient in zip(run.model.value_head.parameters(), torch.autograd.grad(loss * run.loss_scale, head)):
            p.grad = shard(all_reduce(gradient) / world_size, p)
        optimizer_step(run)


def training_problems(run):
    """This rank's problems of the current step, and their V* from stage 1, or None where the value head gives it."""
    step = run.step - warmup_steps
    if algorithm == 'grpo': # groups: every prompt N times in a row
        groups = draw(run.task, TRAIN, step, batch_size // num_responses_per_prompt)
        return [p for p, _ in groups for _ in range(num_responses_per_prompt)], None
    if fresh_prompts:
        return [p for p, _ in draw(run.task, TRAIN, step, batch_size)], None
    # The prompts of stage 1, each once in an epoch, in an order that depends on the epoch. One that was never solved
    # has a V* of 0, but for rounding.
    pool = np.flatnonzero(run.values.cpu().numpy() > 1e-6) if filter_failed else np.arange(num_train_samples)
    order = functools.cache(lambda epoch: np.random.default_rng((seed, TRAIN, epoch)).permutation(pool))
    local = batch_size // world_size
    first = step * batch_size + rank * local
    chosen = [int(order(i // len(pool))[i % len(pool)]) for i in range(first, first + local)]
    problems = [run.task.draw(np.random.default_rng((seed, STAGE1, 0, i))) for i in chosen]
    return problems, run.values[chosen]


@functools.partial(shrinks, 'rollout_rows')
def rollout(run, problems, stream, at_temperature, repeat=1, watch=None):
    """
    Sample `repeat` responses to each problem and grade them. This is the one place where rewards are decided, for
    stage 1, stage 2 and evaluation alike: a response that did not end within max_new_tokens is truncated, its
    reward 0.

    Returns a dict of tokens, mask (B, T), of GRADES, (B,) each, and of lists of problems and texts;
    and the seconds it took.
    """
    started = time.time()
    problems = [p for p in problems for _ in range(repeat)]
    prompts = [run.tokenizer.encode(run.task.prompt(p)) for p in problems]
    pieces = []
    if run.sampler is not run.model:
        copy_weights(run.model, run.sampler)
    with on_device(run.sampler):
        for first in range(0, len(prompts), rollout_rows):
            key = np.random.SeedSequence((seed, stream, run.step, rank, first)).generate_state(1, np.uint64)[0]
            generator = torch.Generator(device).manual_seed(int(key >> np.uint64(1)))
            pieces.append(generate(run.sampler, prompts[first:first + rollout_rows], max_new_tokens, at_temperature,
                                   run.tokenizer.eos, generator, watch))
            done, spent = min(first + rollout_rows, len(prompts)), time.time() - started
            if spent > 10 and done < len(prompts): # where many long responses take minutes
                print0(f"{('', 'stage 1', 'stage 2', 'evaluation')[stream]}: {done:,} of {len(prompts):,} responses, "
                       f"{spent / 60 * (len(prompts) / done - 1):.1f} min left")
    tokens = pad_sequence([row for piece, _ in pieces for row in piece], True, run.tokenizer.eos) # (B, T)
    mask = pad_sequence([row for _, piece in pieces for row in piece], True)

    sampled, grades, texts = time.time(), [], []
    for problem, row, marked in zip(problems, tokens.cpu().numpy(), mask.cpu().numpy()):
        response = row[marked]
        truncated = bool(response[-1] != run.tokenizer.eos)
        texts.append(run.tokenizer.decode(response.tolist()).removesuffix(EOS))
        grades.append((*(WRONG if truncated else run.task.grade(problem, texts[-1])), truncated, len(response)))
    batch = dict(zip(GRADES, torch.tensor(grades, device=device).T), problems=problems, texts=texts,
                 tokens=tokens, mask=mask)
    return batch, dict(rollout=sampled - started, grading=time.time() - sampled)


@functools.partial(shrinks, 'micro_batch_tokens')
def policy_gradient(run, batch, stored_values, seconds, total_tokens):
    """Accumulate the gradient of A*PO's loss (or GRPO's) on a batch of rollout. Returns the log-probabilities of the
    responses under policy, reference and base, and V*, (B,) each; the time of the reference goes to seconds."""
    tokens, mask, rewards = batch['tokens'], batch['mask'], batch['reward']
    pieces = [(rows, *trim(tokens[rows], mask[rows])) for rows in micro_batches(mask)]
    logprobs, ref_logprobs, base_logprobs, values = (torch.zeros_like(rewards) for _ in range(4))
    started = time.time()
    with torch.no_grad(), on_device(run.reference), on_device(run.base):
        for rows, *piece in pieces:
            ref_logprobs[rows] = sequence_logprobs(token_logprobs(run.reference, *piece)[0], piece[1])
            base_logprobs[rows] = ref_logprobs[rows] if run.base is run.reference else sequence_logprobs(
                token_logprobs(run.base, *piece)[0], piece[1])
    seconds['reference'] = time.time() - started

    advantages = group_advantages(rewards.view(-1, num_responses_per_prompt)).view(-1) if algorithm == 'grpo' else None
    for rows, *piece in pieces:
        by_token, head_values = token_logprobs(run.model, *piece)
        by_sequence = sequence_logprobs(by_token, piece[1])
        logprobs[rows] = by_sequence.detach()
        # The head is clamped to the range of rewards: above 1 it would push even right answers away.
        values[rows] = head_values.detach().clamp(0, 1) if stored_values is None else stored_values[rows]
        if algorithm == 'grpo':
            loss = grpo_loss(by_token, by_token.detach(), advantages[rows], piece[1])
            loss = loss * piece[1].sum() * world_size / total_tokens # its mean is over the tokens of the whole batch
        else:
            loss = apo_loss(by_sequence, ref_logprobs[rows], rewards[rows], values[rows], beta2)
            loss = (loss + value_loss(head_values, rewards[rows, None], beta1)) * len(rows) / len(rewards)
        (loss * run.loss_scale).backward()
    return logprobs, ref_logprobs, base_logprobs, values


def update(run, batch, stored_values, seconds):
    """One optimizer step of A*PO (or GRPO) on a batch of rollout; returns the metrics of the step."""
    started, rewards, total_tokens = time.time(), batch['reward'], all_reduce(batch['mask'].sum())
    logprobs, ref_logprobs, base_logprobs, values = policy_gradient(run, batch, stored_values, seconds, total_tokens)
    scale_learning_rates(run, 1 - (run.step - warmup_steps) / max_steps)
    grad_norm = optimizer_step(run)
    run.step += 1
    seconds['update'] = time.time() - started - seconds['reference']

    residual = beta2 * (logprobs - ref_logprobs) - (rewards - values)
    columns = dict(reward=rewards, accuracy=batch['correct'], formatted=batch['formatted'],
                   truncated=batch['truncated'], length=batch['length'], kl=logprobs - ref_logprobs,
                   base_kl=logprobs - base_logprobs, entropy=-logprobs / batch['length'], value=values,
                   value_zero=(values < 1e-6).float(), residual=residual, residual_std=residual.square())
    metrics = dict(zip(columns, all_reduce(torch.stack(list(columns.values())).mean(1) / world_size).tolist()))
    metrics['residual_std'] = math.sqrt(max(0, metrics['residual_std'] - metrics['residual'] ** 2))
    seconds = {f'seconds_{part}': round(spent, 3) for part, spent in seconds.items()}
    return dict(metrics, grad_norm=grad_norm, tokens=int(total_tokens), **seconds)


def token_logprobs(model, tokens, mask):
    """
    Log-probabilities of the tokens under the mask at the sampling temperature, and the value head at the end of the
    prompt. tokens, mask (B, T) -> (B, T) in float32, zero outside the mask, and (B,).
    """
    targets = mask[:, 1:] # the logits at position t are about the token at t + 1
    with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != 'float32'):
        logits, values = model(tokens[:, :-1], at=targets)
    logprobs = -F.cross_entropy(logits.float() / temperature, tokens[:, 1:][targets], reduction='none')
    prompt_end = mask.int().argmax(1, keepdim=True) - 1
    by_token = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)
    return by_token, values.gather(1, prompt_end).squeeze(1)


def micro_batches(mask):
    """
    Indices of rows of similar length, together at most micro_batch_tokens with their padding. Of all cuts of the rows,
    sorted by length, the one that computes least, where a piece costs some tokens more than its own.
    """
    lengths = (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1).cpu().numpy()
    order = lengths.argsort(kind='stable')
    widths = -(-lengths[order] // 16) * 16 # as trim leaves them
    cost, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1): # the best cut of the first `end` rows, from the best cuts of fewer
        cells = np.arange(end, 0, -1) * widths[end - 1] # of a last piece that starts at 0, 1, ... end - 1
        cells[:-1] = np.where(cells[:-1] > micro_batch_tokens, 2 ** 60, cells[:-1])
        total = cost[:end] + cells + micro_batch_tokens // 16
        starts[end], cost[end] = total.argmin(), total.min()
    pieces, end = [], len(order)
    while end:
        pieces.append(order[starts[end]:end])
        end = starts[end]
    most = all_reduce(len(pieces), dist.ReduceOp.MAX) # every rank must run the model equally often, or FSDP hangs
    while len(pieces) < most:
        pieces.sort(key=len)
        pieces += np.array_split(pieces.pop(), 2)
    return [torch.from_numpy(piece).to(mask.device) for piece in pieces]


def trim(tokens, mask):
    """Cut the padding behind the longest row; lengths are multiples of 16, for each new
    shape costs a CPU a new kernel."""
    end = int(mask.any(0).nonzero().max()) + 1
    end = min(-(-end // 16) * 16, mask.size(1))
    return tokens[:, :end], mask[:, :end]


def evaluate(run, problems, at_temperature, repeat=1):
    """
    Grade `repeat` responses to each problem; ranks share the work. Returns a summary, with accuracy by difficulty and
    its Wilson 95% interval, and a dict for every response.
    """
    batch, _ = rollout(run, problems[rank::world_size] or problems[:1], EVAL, at_temperature, repeat)
    rows = gather_lists([
        dict(zip(GRADES, grades), difficulty=run.task.difficulty(p), prompt=run.task.prompt(p), response=text)
        for p, text, *grades in zip(batch['problems'], batch['texts'], *(batch[k].tolist() for k in GRADES))]
                        if rank < len(problems) else [])
    mean = lambda name, rows: sum(row[name] for row in rows) / len(rows)
    n, p, z = len(rows), mean('correct', rows), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    groups = sorted({row['difficulty'] for row in rows})
    return dict(accuracy=p, interval_95=[(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)], count=n,
                by_difficulty={g: mean('correct', [row for row in rows if row['difficulty'] == g]) for g in groups},
                **{name: mean(name, rows) for name in GRADES if name != 'correct'}), rows


def log_evaluation(run, when, share=1):
    """Evaluate every `share`-th of the held-out problems at eval_temperature, print the result, record it with eight of
    the responses, draw the curves; returns the summary."""
    seconds = round(run.seconds, 1)
    if sys.stdout.isatty():
        print0(f'evaluating {when} on held-out problems ...', end='\r')
    result, rows = evaluate(run, held_out_problems(run.task, num_eval_samples)[::share], eval_temperature)
    low, high = result['interval_95']
    print0(f"held-out {when}: accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {len(rows)}"
           + ''.join(f', {group} {accuracy:.3f}' for group, accuracy in result['by_difficulty'].items())
           + f", formatted {result['formatted']:.3f}, truncated {result['truncated']:.3f}, "
             f"{result['length']:.0f} tokens")
    append('metrics.jsonl', dict(step=run.step, seconds=seconds, phase='evaluation', **result))
    for row in rows[:8]:
        append('samples.jsonl', dict(step=run.step, **row))
    if rank == 0:
        from sample import plot_runs
        try:
            plot_runs([out_dir], os.path.join(out_dir, 'curves.png'))
        except ModuleNotFoundError:
            if when == 'at the end':
                print0("no curves.png: drawing it needs matplotlib: pip install matplotlib")
    return result


def draw(task, stream, step, count):
    """This rank's share of `count` training problems, each with its generator: a function of
    (seed, stream, step, index)."""
    local = range(rank * count // world_size, (rank + 1) * count // world_size)
    rngs = [np.random.default_rng((seed, stream, step, i)) for i in local]
    return [(task.draw(rng), rng) for rng in rngs]


@functools.lru_cache(maxsize=1) # drawing 2,000 takes a second
def held_out_problems(task, count):
    """`count` different problems of the test split, or all there are: the same in every run, whatever its seed."""
    rng, found, since = np.random.default_rng((EVAL, 2025)), {}, 0
    while len(found) < count and since < 5000:
        problem = task.draw(rng, test=True)
        since = 0 if task.canonical(problem) not in found else since + 1
        found.setdefault(task.canonical(problem), problem)
    return list(found.values())


# --------------------------------------------------------------------------------------------------------------------
# Model, optimizer, ranks

def build(checkpoint):
    """The Run to start from: fresh weights, those of a checkpoint, or all of a checkpoint's state when resuming."""
    the_task = make_task()
    tokenizer = checkpoint['tokenizer'] if checkpoint else the_task.tokens
    pretrained = isinstance(tokenizer, dict)
    if not hasattr(the_task, 'demonstration') and (warmup_steps or not pretrained):
        fail(f"--task={task} has no demonstrations to imitate: start from pretrained weights by --init_from, "
             "without --warmup_steps")
    with one_line(init_from):
        tokenizer = (PretrainedTokenizer if pretrained else Tokenizer)(tokenizer)
    the_task.form = tokenizer.form
    if not pretrained and tokenizer.tokens != the_task.tokens:
        fail(f"the checkpoint's vocabulary ({len(tokenizer.tokens)} tokens) does not fit --task={task} with these "
             f"settings ({len(the_task.tokens)} tokens): use the task and the number ranges it was trained with")
    try:
        config = ModelConfig(**checkpoint['config']) if checkpoint else ModelConfig(
            len(tokenizer.tokens), 0, d_model, n_layers, n_heads, n_kv_heads, d_ff)
        if not pretrained:
            config.max_seq_len = max(config.max_seq_len, the_task.longest_prompt + max_new_tokens)
        elif config.max_seq_len < the_task.longest_prompt + max_new_tokens:
            raise ValueError(f"--max_new_tokens={max_new_tokens} and a prompt do not fit the {config.max_seq_len} "
                             "positions of this model")
        for i in range(20 if warmup_steps else 2): # there must be problems of both splits, written in the vocabulary
            rng = np.random.default_rng(i)
            problem = the_task.draw(rng, test=i % 2 == 0)
            tokenizer.encode(the_task.prompt(problem))
            tokenizer.encode(the_task.demonstration(problem, rng) if warmup_steps else '')
    except ValueError as error:
        fail(str(error))
    # Sharded before it has memory and filled tensor by tensor, so that a large model is never whole where it trains.
    model = Transformer.without_memory(config)
    if world_size > 1 or cpu_offload:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        options = dict(mesh=dist.init_device_mesh(torch.device(device).type, (world_size,)),
                       offload_policy=CPUOffloadPolicy(device != 'cpu') if cpu_offload else OffloadPolicy())
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    model.allocate('cpu' if cpu_offload else device, device)
    with torch.no_grad():
        for p, whole in initial_weights(model, checkpoint, tokenizer):
            p.copy_(shard(whole, p))
    model.recompute = activation_checkpointing
    run = Run(the_task, tokenizer, model, sampler=model, loss_scale=2.0 ** 16 if dtype == 'float16' else 1.0)
    # Sampling needs whole weights in the precision that computes; on one rank in float32 the policy's own are that.
    if world_size > 1 or cpu_offload or dtype != 'float32' or compile:
        run.sampler = frozen_copy(model)
    if compile:
        model.compile(dynamic=True)
    run.optimizers = make_optimizers(model, warmup_learning_rate, warmup_muon_learning_rate)
    if init_from == 'resume':
        restore(run, checkpoint)
    return run


def initial_weights(model, checkpoint, tokenizer):
    """Pairs of each parameter and its whole value: pretrained, of a checkpoint, or random."""
    if checkpoint and 'folder' in checkpoint:
        yield model.value_head.weight, torch.zeros(1, model.config.d_model)
        yield model.value_head.bias, torch.zeros(1)
        with one_line(init_from):
            yield from load_pretrained(model, checkpoint['folder'])
        return
    if checkpoint:
        weights = checkpoint['model']
    else:
        torch.manual_seed(seed)
        fresh = Transformer(model.config)
        if tokenizer.whole_numbers:
            embed_numbers(fresh, tokenizer)
        weights = fresh.state_dict()
    for name, p in model.named_parameters():
        yield p, weights[name]


@torch.no_grad()
def embed_numbers(model, tokenizer):
    """Tokens that are numbers start as sines and cosines of their value (after FoNE, arXiv 2502.09741). Adding then
    is turning, which the model learns in minutes; from random vectors it has to discover the order of the numbers
    first."""
    ids = torch.tensor([i for i, token in enumerate(tokenizer.tokens) if token.isdigit()])
    numbers = torch.tensor([float(t) for t in tokenizer.tokens if t.isdigit()])
    angles = numbers[:, None] * 2 * math.pi / torch.tensor([2, 3, 5, 7, 10, 20, 50, 100, 200, 400])
    waves = torch.cat((angles.cos(), angles.sin()), dim=1) # (numbers, 20), each row of length sqrt(10)
    directions = torch.randn(waves.size(1), model.config.d_model) / math.sqrt(10)
    model.embed.weight[ids] = 0.02 * waves @ directions + 0.25 * model.embed.weight[ids]


def shard(whole, p):
    """A whole tensor as the parameter p is held: where the model is sharded, this rank's part of it."""
    if not hasattr(p, 'device_mesh'):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to(p.device)


def unshard(x):
    """A tensor of the model or an optimizer as a whole, on the device; every rank must call it."""
    return x.to(device).full_tensor() if hasattr(x, 'full_tensor') else x


def frozen_copy(model, weights=None):
    """A whole copy of the policy that never trains, in the precision that computes; or with these weights instead."""
    whole = Transformer.without_memory(model.config).to(getattr(torch, dtype)).requires_grad_(False)
    whole.allocate('cpu' if cpu_offload else device)
    if weights:
        whole.load_state_dict(weights)
    else:
        copy_weights(model, whole)
    return whole


@torch.no_grad()
def copy_weights(model, whole):
    """Bring the weights of the policy, sharded or not, to a whole copy."""
    for source, target in zip(model.parameters(), whole.parameters()):
        target.copy_(unshard(source))


@contextlib.contextmanager
def on_device(copy):
    """With cpu_offload the copies that sample or are the reference visit the device only while they are used."""
    if cpu_offload:
        copy.to(device)
    yield
    if cpu_offload:
        copy.to('cpu')


def make_optimizers(model, lr, muon_lr=0.0):
    """AdamW on float32 master weights, and in the warm-up Muon for the matrices of the blocks. The value head
    is a small regression beside the policy, with a learning rate of its own."""
    head, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        in_block = muon_lr and p.dim() == 2 and 'blocks' in name
        (head if name.startswith('value_head') else matrices if in_block else rest).append(p)
    groups = [dict(params=rest, lr=lr), dict(params=head, lr=value_learning_rate)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    return [adamw, Muon([dict(params=matrices, lr=muon_lr)], dict(momentum=0.95))] if matrices else [adamw]


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024), so that every
    direction of a matrix learns equally fast. torch.optim.Muon is the same in bfloat16, which most CPUs compute
    slower than float32.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                average = self.state[p].setdefault('average', torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(average, group['momentum']) # Nesterov
                update = orthogonalize(unshard(update)) * max(1, p.size(0) / p.size(1)) ** 0.5 # a shard is no matrix
                p.add_(shard(update, p), alpha=-group['lr'])


def orthogonalize(x, steps=5):
    """The nearest matrix with singular values of about 1 (0.7 to 1.2 is good enough), by Newton-Schulz."""
    wide = x if x.size(0) <= x.size(1) else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.size(0) <= x.size(1) else wide.T


def scale_learning_rates(run, factor):
    """Learning rates become `factor` of those that the optimizers were made with."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group.setdefault('initial_lr', group['lr']) * factor


def optimizer_step(run):
    """Clip, step, clear; returns the gradient's norm before clipping. A gradient that is not finite changes nothing. In
    float16 such a one says that the loss was scaled by too much: A*PO's gradients are small, for beta2 is, so the scale
    starts large, is halved when they do not fit, and grows again slowly."""
    for p in run.model.parameters() if dtype == 'float16' else ():
        if p.grad is not None:
            p.grad /= run.loss_scale
    # The value head by itself, or its gradient, which is large and noisy, would shrink the policy's.
    head = list(run.model.value_head.parameters())
    policy = [p for name, p in run.model.named_parameters() if not name.startswith('value_head')]
    norm, head_norm = (unshard(torch.nn.utils.clip_grad_norm_(part, grad_clip)).item() for part in (policy, head))
    run.bad_steps = 0 if math.isfinite(norm + head_norm) else run.bad_steps + 1
    if run.bad_steps == 0:
        for optimizer in run.optimizers:
            optimizer.step()
    elif run.bad_steps == (25 if dtype == 'float16' else 5):
        fail(f"the gradient was not finite in {run.bad_steps} steps in a row, up to step {run.step}: lower "
             f"--learning_rate or --value_learning_rate; the checkpoints in {out_dir} are good")
    else:
        print0(f"the gradient of step {run.step + 1} is not finite: nothing is changed")
    if dtype == 'float16':
        run.loss_scale *= 0.5 if run.bad_steps else 1.002
    run.model.zero_grad()
    return norm


def gathered(state):
    """A state dict of tensors, whole and on the CPU; every rank must call it, rank 0 gets it."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    whole = unshard(state)
    return whole.cpu() if rank == 0 else None


def all_reduce(x, operation=dist.ReduceOp.SUM):
    """The sum (or MAX) over the ranks of a tensor or number."""
    x = torch.as_tensor(x, device=device).clone()
    if world_size > 1:
        dist.all_reduce(x, operation)
    return x


def gather_lists(rows):
    """One list of what every rank has, in the order of the ranks."""
    if world_size == 1:
        return rows
    lists = [None] * world_size
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


# --------------------------------------------------------------------------------------------------------------------
# Settings, checkpoints, records

def configure(argv):
    """Settle every setting: defaults, then those stored in a checkpoint that is resumed, then the command line, then
    AUTO. Sets the globals; returns the checkpoint to start from, or None."""
    global rank, world_size, out_dir, init_from
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    given = parse_arguments(argv)
    globals().update(given)
    make_task() # a name that is wrong is said before anything is downloaded
    out_dir = out_dir or os.path.join('out', task.replace(':', '_')) # Windows allows no colon
    there = checkpoints(out_dir)
    checkpoint, stored = None, {}
    if init_from == 'resume':
        if not there:
            fail(f"nothing to resume: there is no checkpoint in {out_dir}")
        checkpoint = newest_whole(there)
        stored = checkpoint['settings']
    elif there or os.path.exists(os.path.join(out_dir, 'metrics.jsonl')):
        fail(f"{out_dir} already holds a run: use --init_from=resume or another --out_dir, or delete it")
    elif init_from != 'scratch':
        init_from = newest_model(glob.escape(init_from)) or init_from # where it is the folder of a run
        # A name of Hugging Face looks like a path; where the first half is a folder here, it is one.
        owner = re.fullmatch(r'([\w.-]+)/[\w.-]+', init_from)
        named = owner and not os.path.isdir(owner[1]) and not init_from.endswith('.pt')
        checkpoint = (open_pretrained if named or os.path.isdir(init_from) else load_checkpoint)(init_from)
        stored = {k: v for k, v in checkpoint['settings'].items() if k in task_settings()}
    given = stored | given | dict(out_dir=out_dir, init_from=init_from)
    globals().update(given)
    choose_device()
    kind = 'gpu' if device.startswith('cuda') else 'cpu' # a Mac's GPU is taken for a laptop's
    sizes = {size: checkpoint['config'][size] for size in SIZES['small']} if checkpoint else {}
    for size, value in sizes.items():
        if given.get(size, value) != value:
            fail(f"--{size}={given[size]} does not fit the checkpoint's model, which has {value}")
    pretrained = AUTO['pretrained'] if checkpoint and isinstance(checkpoint['tokenizer'], dict) else {}
    auto = AUTO[kind] | AUTO.get((task, kind), {}) | sizes | pretrained | (dict(warmup_steps=0) if checkpoint else {})
    chosen = {k: v for k, v in auto.items() if k not in given}
    globals().update(chosen)
    print0(f"task {task}, {out_dir=}, {device=}, {dtype=}, {torch.get_num_threads()} threads, "
           f"{world_size} rank(s), torch {torch.__version__}")
    if chosen:
        print0(f"chosen for {task} on this machine ({kind}{', pretrained weights' if pretrained else ''}): "
               + ', '.join(f'{k}={v}' for k, v in chosen.items()))
    check_settings()
    return checkpoint


def task_settings():
    """The settings that say how difficult the task is: those that its class takes."""
    return [name for name in inspect.signature(find_task(task)).parameters if name in SETTINGS]


def make_task():
    """The task, with its settings. One line and exit when there is none of that name, or its package is missing."""
    with one_line(f'--task={task}'):
        return find_task(task)(**{name: globals()[name] for name in task_settings()})


def parse_arguments(argv):
    """--name=value or --name value for each setting, typed by its default; --help prints them with their comments."""
    def true_or_false(text):
        return ['false', 'true'].index(text.lower()) == 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage='python train.py [--setting=value ...]', allow_abbrev=False)
    parser.error, group = fail, parser.add_argument_group('settings, with their defaults')
    with open(__file__) as file:
        source = file.read().partition('# ---- settings')[2].partition('# ---- end of settings')[0]
    for name, default, comment, heading in re.findall(r'^(\w+) = (.+?) # (.+)$|^# (.+)$', source, re.M):
        if heading:
            group = parser.add_argument_group(heading)
        else:
            kind = type(SETTINGS[name])
            group.add_argument(f'--{name}', type=true_or_false if kind is bool else kind, metavar=default,
                               default=argparse.SUPPRESS, choices=CHOICES.get(name), help=comment)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition('=')[0].removeprefix('--'), SETTINGS, n=1)
        fail(f"unknown setting {unknown[0]!r}{f'; did you mean --{close[0]}?' if close else ''} "
             "(python train.py --help lists all)")
    return vars(given)


def choose_device():
    """Pick device and precision, join the other ranks, share out the cores."""
    global device, dtype
    local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda':
        if 0 < torch.cuda.device_count() < local:
            fail(f"{local} processes on this machine, but {torch.cuda.device_count()} GPU(s): lower --nproc_per_node")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with one_line(f'--device={device}'):
        torch.empty(1, device=device)
    if device == 'cpu' and local > 1: # torchrun gives each of several processes one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // local))
    if device == 'cpu' and platform.libc_ver()[0] == 'glibc':
        # Keep freed memory for the next tensor instead of giving it back: a fifth faster
        # (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
        for parameter, value in ((-3, 2 ** 25), (-1, 2 ** 31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if dtype == 'auto':
        dtype = 'float32' if not device.startswith('cuda') else \
            'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16' # Colab's T4
    if (world_size > 1 or cpu_offload) and not dist.is_initialized():
        alone = {} if world_size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo', **alone)


def check_settings():
    """One line for every combination of settings that cannot work."""
    # The least that a number may be, where it is not just above 0; the value head's gradient overflows below 0.03.
    least = dict.fromkeys(('seed', 'warmup_steps', 'warmup_muon_learning_rate', 'max_steps', 'ref_update_interval',
                           'partial_credit', 'eval_temperature', 'keep_checkpoints'), 0) | dict(beta1=0.03)
    for name, default in SETTINGS.items():
        value, low = globals()[name], least.get(name, 0)
        if type(default) in (int, float) and not (low <= value < 2 ** 63 and (value or name in least)):
            fail(f"--{name} must be {f'at least {low}' if name in least else 'above 0'}, not {value}")
    if not 3 <= min_numbers <= max_numbers <= 6:
        fail(f"countdown takes 3 to 6 numbers, --min_numbers={min_numbers} --max_numbers={max_numbers} does not fit")
    if filter_failed and fresh_prompts:
        fail("--filter_failed=True is about the prompts of stage 1: it needs --fresh_prompts=False")
    if algorithm == 'grpo' and num_responses_per_prompt < 2:
        fail("--algorithm=grpo compares the responses to a prompt: --num_responses_per_prompt must be at least 2")
    if partial_credit >= 1:
        fail(f"--partial_credit must be below 1, not {partial_credit}")
    unit = world_size * (num_responses_per_prompt if algorithm == 'grpo' else 1)
    for name, factor in dict(batch_size=unit, warmup_batch_size=world_size, num_train_samples=world_size).items():
        if globals()[name] % factor:
            fail(f"--{name}={globals()[name]} must be a multiple of {factor} (ranks, with GRPO x responses per prompt)")


def checkpoints(folder):
    """The paths of the checkpoints in a run's folder that can be resumed, oldest first."""
    names = glob.glob('checkpoint_step_*.pt', root_dir=folder)
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: (len(name), name))] # by number


def load_checkpoint(path):
    """Read and verify a checkpoint of ours. One line and exit when it is missing, damaged or something else."""
    with one_line(f'{path} as a checkpoint of this program'):
        with zipfile.ZipFile(path) as archive: # torch.load does not look at the checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or checkpoint.get('format') != FORMAT:
            raise ValueError(f"it does not say {FORMAT!r}")
        return checkpoint


def newest_model(folder):
    """The final model of the newest run in a folder (or pattern of folders), else the newest checkpoint, or None."""
    for name in ('tinyzero_astarpo_final.pt', 'checkpoint_step_*.pt'):
        if found := glob.glob(os.path.join(folder, name)):
            return max(found, key=os.path.getmtime)


def newest_whole(paths):
    """The newest of these checkpoints that can be read."""
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except SystemExit as error:
            if path == paths[0]:
                raise
            print0(f"{error}; passing over it")


def open_pretrained(name):
    """What build needs of pretrained weights, in a folder or by a name that huggingface_hub finds: where they are,
    their config and tokenizer."""
    with one_line(name):
        folder = name
        if not os.path.isdir(name):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(name, allow_patterns=['*.json', '*.jinja', 'model*.safetensors'])
        config = dataclasses.asdict(read_config(folder))
        return dict(folder=folder, config=config, tokenizer=tokenizer_files(folder), settings={})


@contextlib.contextmanager
def one_line(name):
    """Whatever goes wrong in here with pretrained weights or a package becomes one line; the libraries' exceptions have
    no common class, and a damaged file raises any of them."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{name} needs a package that is not installed: pip install {error.name.partition('.')[0]}")
    except Exception as error:
        fail(f"cannot use {name}: {' '.join(str(error).split()).partition('. ')[0][:300]} ({type(error).__name__})")


def save_checkpoint(run, final=False):
    """Write all of the run's state, or for the final model what sampling needs, to a temporary file, flush it, rename
    it: a checkpoint is whole or not there. Every rank takes part, for weights are gathered; rank 0 writes."""
    checkpoint = dict(format=FORMAT, task=task, step=run.step,
                      settings={k: globals()[k] for k in SETTINGS} | dict(device=device.split(':')[0]),
                      config=dataclasses.asdict(run.model.config), tokenizer=run.tokenizer.state,
                      model=gathered(run.model.state_dict()), logged={})
    if not final:
        checkpoint |= dict(optimizers=[gathered(optimizer.state_dict()['state']) for optimizer in run.optimizers],
                           reference=run.reference and run.reference.state_dict(), values=run.values,
                           base=None if run.base is run.reference else run.base.state_dict(), seconds=run.seconds,
                           warmup_accuracy=run.warmup_accuracy, bad_steps=run.bad_steps, loss_scale=run.loss_scale)
    if rank:
        return
    path = os.path.join(out_dir, 'tinyzero_astarpo_final.pt' if final else f'checkpoint_step_{run.step}.pt')
    try:
        for name in LOGS: # flushed as well, for resuming cuts them to the length that they have now
            with open(os.path.join(out_dir, name), 'a') as file:
                os.fsync(file.fileno())
                checkpoint['logged'][name] = file.tell()
        with open(path + '.tmp', 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error: # torch reports a full disk as a RuntimeError
        if os.path.exists(path + '.tmp'):
            os.remove(path + '.tmp')
        fail(f"could not write {path}, earlier ones are whole; is the disk full? ({str(error).splitlines()[0]})")
    there = checkpoints(out_dir)
    for old in [] if final else there[:there.index(path) + 1][:-keep_checkpoints]:
        os.remove(old)


def load_run(path, **changes):
    """The model, task and tokenizer of a checkpoint, with its settings, ready to respond:
    what sample.py needs of a Run."""
    checkpoint = load_checkpoint(path)
    here = dict(dtype='auto', compile=False, cpu_offload=False, init_from=path)
    globals().update(checkpoint['settings'] | here | changes)
    choose_device()
    run = build(checkpoint)
    run.step = checkpoint['step']
    return run


def restore(run, checkpoint):
    """Put a checkpoint's state into a run whose model already has the checkpoint's weights."""
    before = checkpoint['settings']
    settled = ['warmup_steps'] * bool(checkpoint['reference']) + ['dtype'] * ('float16' in (dtype, before['dtype']))
    if checkpoint['values'] is not None and not fresh_prompts: # these prompts are drawn again, their V* is not
        settled += ['seed', 'num_train_samples', *task_settings()]
    for name in settled:
        if globals()[name] != before[name]:
            fail(f"--{name}={globals()[name]} comes too late for this run, which has {name}={before[name]}")
    if len(run.optimizers) != len(checkpoint['optimizers']) and not checkpoint['reference']:
        fail("--warmup_muon_learning_rate cannot be switched on or off within the warm-up")
    if not checkpoint['reference'] and warmup_steps < checkpoint['step']:
        fail(f"--warmup_steps={warmup_steps} comes too late for this run, which has taken {checkpoint['step']} steps")
    run.started -= checkpoint['seconds']
    for name in ('step', 'warmup_accuracy', 'bad_steps', 'loss_scale'):
        setattr(run, name, checkpoint[name])
    run.values = None if checkpoint['values'] is None else checkpoint['values'].to(device, copy=True)
    if checkpoint['reference']:
        run.reference = frozen_copy(run.model, checkpoint['reference'])
        run.base = frozen_copy(run.model, checkpoint['base']) if checkpoint['base'] else run.reference
        run.optimizers = make_optimizers(run.model, learning_rate)
    for optimizer, state in zip(run.optimizers, checkpoint['optimizers']):
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=state)) # learning rates are today's settings
        for p, averages in optimizer.state.items():
            for name, value in averages.items(): # cloned, for the file is mapped and may have to go
                averages[name] = (shard(value, p) if value.shape == p.shape else value).clone()
    for name in LOGS if rank == 0 else (): # what was logged after the checkpoint will be logged again
        with open(os.path.join(out_dir, name), 'a') as file:
            file.truncate(min(checkpoint['logged'][name], file.tell()))
    print0(f"resuming at step {run.step}")


def checkpoint_if_due(run):
    """A checkpoint every checkpoint_interval steps, and before leaving when a signal asked for that."""
    stop = all_reduce(stop_signal).item() # every rank must come to the same decision
    if stop or run.step % checkpoint_interval == 0:
        save_checkpoint(run)
    if stop:
        all_reduce(0).item() # rank 0 has written: torchrun may kill it when the others leave
        fail(f"stopped by a signal at step {run.step}; continue with --init_from=resume --out_dir={out_dir}")


def request_stop(number, frame):
    """Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C leaves at once."""
    global stop_signal
    stop_signal = number
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def report(run, phase, every=1, **metrics):
    """The metrics of a step to metrics.jsonl, and one line to read, with the time left."""
    append('metrics.jsonl', dict(step=run.step, seconds=round(run.seconds, 2), phase=phase, **metrics))
    first, last = (0, warmup_steps) if phase == 'warm-up' else (warmup_steps, warmup_steps + max_steps)
    run.recent = (run.recent + [time.time()])[-20:] if run.step > first + 1 else [time.time()]
    if (run.step - first) % every and run.step not in (first + 1, last):
        return
    pace = (run.recent[-1] - run.recent[0]) / max(1, len(run.recent) - 1)
    left = f", {pace * (last - run.step) / 60:.1f} min left" if len(run.recent) > 1 else ''
    speed = metrics['tokens'] / max(1e-3, sum(v for k, v in metrics.items() if k.startswith('seconds_')))
    text = f"loss {metrics['loss']:.3f}" if phase == 'warm-up' else (
        f"reward {metrics['reward']:.3f}  accuracy {metrics['accuracy']:.3f}  KL {metrics['kl']:.2f}  "
        f"length {metrics['length']:.0f}  truncated {metrics['truncated']:.2f}")
    print0(f"{phase} {run.step - first}/{last - first}  {text}  {speed:,.0f} tokens/s  "
           f"{run.seconds / 60:.1f} min{left}")
    if phase != 'warm-up':
        hint(run, metrics)


def hint(run, metrics):
    """Say once, when the metrics show that something goes wrong, what it is and which setting mends it."""
    run.rewards.append(metrics['reward'])
    start, now = np.mean(run.rewards[:5]), np.mean(run.rewards[-5:])
    signs = {
        "every reward so far is zero, nothing can be learned: give more --warmup_steps, or make the task easier":
            len(run.rewards) >= 5 and not any(run.rewards),
        f"most responses are cut off: raise --max_new_tokens={max_new_tokens}, or lower the learning rate":
            metrics['truncated'] > 0.5,
        f"the reward has fallen since the start and the KL is large: lower --learning_rate={learning_rate}":
            now < start - 0.1 and metrics['base_kl'] > 10,
        "few responses keep the format, and fewer by the step: lower --learning_rate, or give more --warmup_steps":
            metrics['formatted'] < 0.5 and now < start - 0.1,
        f"the reward is flat: raise --learning_rate={learning_rate} or --batch_size={batch_size}, or give more "
        "--warmup_steps": len(run.rewards) == run.step - warmup_steps >= 50 and now < min(0.9, start + 0.02),
    }
    for advice in [advice for advice, sign in signs.items() if sign and advice not in run.hints]:
        run.hints.append(advice)
        print0(f"hint: {advice} (README, Why is my reward flat?)")


def append(name, row):
    """One JSON line to a file in out_dir, and its numbers to the tracker if there is one, by rank 0."""
    if rank == 0:
        if tracker != 'none' and 'phase' in row: # before the file, for the package may be missing
            numbers = {f"{row['phase']}/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
            open_tracker(out_dir)(numbers, row['step'])
        with open(os.path.join(out_dir, name), 'a') as file:
            file.write(json.dumps(row) + '\n')


@functools.lru_cache(maxsize=1) # one for the run
def open_tracker(folder):
    """wandb or TensorBoard, as a function of the numbers and the step that they are of."""
    with one_line(f'--tracker={tracker}'):
        if tracker == 'wandb':
            import wandb
            return wandb.init(project='tinyzero-astarpo', name=folder, config={k: globals()[k] for k in SETTINGS}).log
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        return lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]


def finish(run):
    """The final evaluation, model and summary."""
    seconds = run.seconds
    result = log_evaluation(run, 'at the end')
    if not max_steps:
        run.warmup_accuracy = result['accuracy']
    save_checkpoint(run)
    save_checkpoint(run, final=True)
    if rank:
        return
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=os.path.dirname(os.path.abspath(__file__)),
                         capture_output=True, text=True) # through the shell, for there may be no git
    result['accuracy_by_difficulty'], result['average_reward'] = result.pop('by_difficulty'), result.pop('reward')
    with open(os.path.join(out_dir, 'metrics.jsonl')) as file:
        steps = [row for row in map(json.loads, file) if 'seconds_rollout' in row]
    split = {f'seconds_{part}': round(sum(row[f'seconds_{part}'] for row in steps), 2) for part in PARTS}
    speed = round(sum(row['tokens'] for row in steps) / max(sum(split.values()), 0.01)) if steps else None
    summary = dict(task=task, **result, accuracy_after_warmup=run.warmup_accuracy, parameters=run.model.num_params(),
                   steps=run.step, seconds=round(seconds, 1), **split, tokens_per_second=speed,
                   device=device, ranks=world_size, threads=torch.get_num_threads(),
                   settings={k: globals()[k] for k in SETTINGS}, git_commit=git.stdout.strip() or None,
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    with open(os.path.join(out_dir, 'results_summary.json'), 'w') as file:
        json.dump(summary, file, indent=2)
    print0(f"{seconds / 60:.1f} minutes; accuracy {run.warmup_accuracy:.3f} after the warm-up, "
           f"{result['accuracy']:.3f} at the end. See {out_dir}; now try: python sample.py")


def print0(*words, **options):
    if rank == 0:
        print(*words, flush=True, **options)


def fail(message):
    """End the program with one line and exit status 1; where there are several machines, one line on each."""
    sys.exit(f'error: {message}' if os.environ.get('LOCAL_RANK', '0') == '0' else 1)


if __name__ == '__main__':
    try:
        main()
    except OSError as error: # an out_dir that cannot be written, a full disk, an output that nobody reads any more
        sys.exit(f"error: {error.filename or 'the output'}: {error.strerror}")
    except RuntimeError as error:
        if re.search('closed by peer|reset by peer|Broken pipe|remote process exited|failed to recv', str(error)):
            sys.exit(f"error: rank {rank} lost another rank, which died; go on with --init_from=resume "
                     f"({str(error).splitlines()[0][:120]})")
        if not out_of_memory(error):
            raise
        sys.exit(f"error: rank {rank} is out of memory: lower --micro_batch_tokens={micro_batch_tokens}, "
                 f"--rollout_rows={rollout_rows} or the model's size; what is saved goes on with --init_from=resume")
