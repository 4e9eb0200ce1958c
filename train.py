"""
Train a transformer to solve countdown or multiplication: warm-up by imitation, then A*PO.

    python train.py                                               # countdown on this machine, CPU or GPU
    torchrun --nproc_per_node=1 train.py --task=multiplication    # the same through torchrun
    torchrun --nproc_per_node=8 train.py --batch_size=4096        # eight GPUs, FSDP
    python train.py --init_from=resume                            # go on with the run in out/countdown
    python train.py --init_from=PATH --out_dir=out/more           # A*PO from the model of a checkpoint
    python train.py --init_from=Qwen/Qwen2.5-0.5B --max_number=99 # A*PO from pretrained weights, TinyZero's experiment

Every setting below can be given as --name=value or --name value; --help lists them, those of the tasks too.
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
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence

from apo import apo_loss, group_advantages, grpo_loss, optimal_value, residual, sequence_logprobs, value_loss
from model import (SIZES, ModelConfig, Transformer, embed_numbers, load_pretrained, micro_batches, read_config,
                   token_logprobs, trim)
from sample import (EVAL, FORMAT, PARTS, STAGE1, TRAIN, WARMUP, evaluate, fail, held_out_problems, load_checkpoint,
                    make_task, make_tokenizer, newest_model, one_line, out_of_memory, pick_device, pick_dtype,
                    plot_runs, respond, summarize)
from tasks import TASKS, Tokenizer, find_task, tokenizer_files

# ---- settings: what the default run uses, countdown on a CPU; a task's `defaults`, GPU and PRETRAINED change some ---
task = 'countdown' # countdown | multiplication | chain | a file such as examples/grid.py
out_dir = 'out/TASK' # where checkpoints, metrics and curves go; TASK becomes the task's name
init_from = 'scratch' # scratch | resume (the newest checkpoint in out_dir) | a checkpoint or pretrained weights
seed = 1337 # problems, weights and sampling noise all follow from it
device = 'auto' # auto | cpu | cuda | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16: of the matrix multiplies; master weights are always float32
compile = False # torch.compile the training forward
# model
d_model = 128 # width of the residual stream
n_layers = 4 # blocks
n_heads = 4 # attention heads
n_kv_heads = 2 # heads of keys and values, shared by groups of attention heads: one samples faster, four learn faster
d_ff = 384 # width of the SwiGLU
# warm-up: imitation of the task's demonstrations
warmup_steps = 6000 # optimizer steps
warmup_batch_size = 16 # demonstrations per step, over all ranks
warmup_learning_rate = 3e-3 # AdamW, for all but the matrices of the blocks; decays linearly over the last two fifths
warmup_muon_learning_rate = 0.006 # Muon, for the matrices of the blocks; decays with it; 0: AdamW for them too
# A*PO
algorithm = 'apo' # apo | grpo
max_steps = 80 # steps after the warm-up, each on a batch of fresh responses
batch_size = 128 # responses per step, over all ranks
updates_per_batch = 1 # optimizer steps on each batch; from the second one on GRPO's ratio is not 1, and its clip acts
learning_rate = 2e-4 # AdamW; decays linearly to 0 over max_steps
grad_clip = 1.0 # clip the gradient's norm here
beta1 = 0.5 # temperature of V* (apo.py, formula 1)
beta2 = 1e-3 # strength of the pull to the reference (apo.py, formula 2)
temperature = 1.0 # divides the logits, in sampling and in scoring alike
max_new_tokens = 800 # longest response; one that does not end by then has reward 0
num_train_samples = 256 # prompts of stage 1, where the reference answers each num_responses_per_prompt times
num_responses_per_prompt = 8 # responses of the reference in stage 1, and the group size of GRPO
fresh_prompts = True # new prompts at every step with V* from the value head; False: those of stage 1 with their own V*
filter_failed = False # with fresh_prompts=False: leave out the prompts that the reference never solved
ref_update_interval = 0 # every so many steps the reference becomes the current policy; 0: never, as in the paper
value_learning_rate = 1e-2 # AdamW, for the value head
# evaluation and records
eval_temperature = 1.0 # 0 is greedy
num_eval_samples = 2000 # held-out problems of the final evaluation; those on the way use an eighth of them
eval_interval = 20 # A*PO steps between evaluations; in the warm-up, whose steps are short, 50 times as many
checkpoint_interval = 500 # steps between checkpoints; in A*PO, whose steps are long, each evaluation leaves one too
keep_checkpoints = 3 # the newest checkpoints that stay on the disk; 0: all
tracker = 'none' # none | wandb | tensorboard: where the metrics go beside metrics.jsonl
# memory
micro_batch_tokens = 2048 # tokens in one forward and backward pass
rollout_rows = 1024 # responses sampled side by side
activation_checkpointing = False # compute each block twice in an update, to keep less in memory
cpu_offload = False # keep master weights, optimizer state and, between uses, the copies of the policy on the CPU
# ---- end of settings -----------------------------------------------------------------------------------------------
SETTINGS = {name: value for name, value in list(globals().items())
            if isinstance(value, (bool, int, float, str)) and name.islower() and not name.startswith('_')}
CHOICES = dict(algorithm=('apo', 'grpo'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
               tracker=('none', 'wandb', 'tensorboard'))
# What fits a GPU, and what fits pretrained weights: small steps, pieces that leave room for 150,000 logits a token.
GPU = dict(**SIZES['50m'], warmup_steps=3000, warmup_batch_size=256, max_steps=400, batch_size=1024,
           num_train_samples=2048, eval_interval=100, micro_batch_tokens=131072, rollout_rows=4096)
PRETRAINED = dict(max_steps=200, batch_size=256, learning_rate=1e-6, value_learning_rate=1e-4, max_new_tokens=1024,
                  num_train_samples=512, eval_interval=25, micro_batch_tokens=4096, rollout_rows=256)
LOGS = ('metrics.jsonl', 'samples.jsonl')
PLAIN = ('step', 'evaluated', 'warmup_accuracy', 'bad_steps', 'tracker_id') # of a Run, plain numbers in a checkpoint
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True) # state dicts of sharded models, gathered on rank 0
rank, world_size = 0, 1 # read_cluster sets them
stop = threading.Event() # a signal asked this process to stop


class Stopped(Exception):
    """The signal to stop arrived while responses were being sampled."""


@dataclasses.dataclass
class Run:
    """What a run consists of."""
    settings: dict # all of them, the task's parameters too
    task: object
    tokenizer: object
    model: Transformer # the policy pi, and the value head; sharded when there are several ranks
    rollout_model: Transformer # a whole copy of the policy that responds; the policy itself on one rank in float32
    scaler: torch.amp.GradScaler # in float16 it multiplies the loss, or small gradients would vanish
    reference: Transformer = None # pi_ref, whole and frozen
    base: Transformer = None # the warmed-up model, for the KL that a refreshed reference would hide
    optimizers: list = None # AdamW, and Muon where it is on
    stage1_values: torch.Tensor = None # V* of the prompts of stage 1, (num_train_samples,)
    step: int = 0 # steps so far, those of the warm-up included
    evaluated: int = 0 # the step of the last evaluation
    warmup_accuracy: float = None
    bad_steps: int = 0 # steps in a row whose gradient was not finite
    track: object = None # a function that sends numbers to wandb or TensorBoard
    tracker_id: str = None # of the run at wandb
    started: float = dataclasses.field(default_factory=time.monotonic) # this run, less the time between its sessions
    recent: list = dataclasses.field(default_factory=list) # when the last steps ended, for the time left
    rewards: list = dataclasses.field(default_factory=list) # of this session's steps, for the hints
    hints: list = dataclasses.field(default_factory=list) # that were given

    @property
    def seconds(self):
        return time.monotonic() - self.started


def main():
    run = build(*configure(sys.argv[1:]))
    lock = claim(out_dir) # no other process writes into it while this one lives
    open_tracker(run)
    print0(f"{run.model.num_params():,} parameters, {run.model.config.vocab_size} tokens in the vocabulary")
    catch_signals()

    # Warm-up: imitate demonstrations, until the model knows the format and some of the task.
    while run.step < warmup_steps:
        if run.step % (50 * eval_interval) == 0 and run.evaluated < run.step:
            log_evaluation(run, f'at step {run.step} of the warm-up', share=8)
        metrics = warm_up_step(run)
        report(run, 'warm-up', metrics, every=20)
        checkpoint_if_due(run)
    if run.reference is None:
        run.base = run.reference = frozen_copy(run.model)
        run.optimizers = make_optimizers(run.model)
    if max_steps and run.warmup_accuracy is None:
        run.warmup_accuracy = log_evaluation(run, 'after the warm-up')['accuracy']

    while run.step < warmup_steps + max_steps:
        stage2_step = run.step - warmup_steps
        if stage2_step % eval_interval == 0 and run.evaluated < run.step:
            log_evaluation(run, f'at step {stage2_step}', share=8)
            save_checkpoint(run)
        # Stage 1: the frozen reference answers each prompt several times; V* follows from the rewards.
        if algorithm == 'apo' and run.stage1_values is None:
            estimate_values(run)
            save_checkpoint(run)
        # Stage 2: regress beta2 log(pi / pi_ref) on the optimal advantage r - V*, one fresh response per prompt.
        metrics = policy_step(run)
        report(run, algorithm, metrics)
        if ref_update_interval and (stage2_step + 1) % ref_update_interval == 0:
            run.reference = frozen_copy(run.model)
            run.stage1_values = run.stage1_values if fresh_prompts else None
        checkpoint_if_due(run)
    finish(run)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if world_size > 1 and (rank or tracker == 'none'): # in Python's own end gloo's threads now and then abort
            os._exit(0)


# --------------------------------------------------------------------------------------------------------------------
# The three kinds of step

def warm_up_step(run):
    """Take one optimizer step of imitation on fresh demonstrations. Returns its metrics, with the mean loss per
    token."""
    started = time.monotonic()
    tokens, mask = demonstrations(run) # (B, T)
    total_tokens = all_reduce(mask.sum())
    total_loss = 0.0
    for rows, tokens, mask in pieces_of(tokens, mask):
        logprobs, _ = token_logprobs(run.model, tokens, mask, temperature, dtype)
        loss = -logprobs.sum() / total_tokens
        run.scaler.scale(loss * world_size).backward() # FSDP averages gradients over the ranks
        total_loss += loss.detach()
    left = 1 - run.step / warmup_steps
    scale_learning_rates(run, min(1, (run.step + 1) / 20, 0.05 + 0.95 * left / 0.4), policy=warmup_learning_rate,
                         matrices=warmup_muon_learning_rate)
    optimizer_step(run)
    run.step += 1
    return dict(loss=all_reduce(total_loss).item(), tokens=int(total_tokens),
                seconds_update=round(time.monotonic() - started, 3))


def demonstrations(run):
    """Return this rank's demonstrations of the current step, tokens and the mask of their responses, both (B, T)."""
    sequences = []
    for problem, rng in run.task.training_problems((seed, WARMUP, run.step), share(warmup_batch_size)):
        prompt = run.tokenizer.encode(run.tokenizer.prompt(run.task, problem))
        for _ in range(100): # a demonstration that the policy could not give within its limit is drawn again
            response = run.tokenizer.encode(run.task.demonstration(problem, rng)) + run.tokenizer.ends[:1]
            if len(response) <= max_new_tokens:
                break
        else:
            fail(f"--max_new_tokens={max_new_tokens} is too short for the demonstrations of {task}")
        sequences.append((prompt, response))
    tokens = pad_sequence([torch.tensor(p + r) for p, r in sequences], True, run.tokenizer.ends[0])
    mask = pad_sequence([torch.arange(len(p + r)) >= len(p) for p, r in sequences], True)
    return tokens.to(device), mask.to(device)


def estimate_values(run):
    """Take stage 1: estimate V* of num_train_samples prompts from num_responses_per_prompt responses of the reference
    each. It is kept in run.stage1_values, and the value head learns to predict it."""
    print0(f"stage 1: the reference answers {num_train_samples} prompts, {num_responses_per_prompt} times each ...")
    problems = [p for p, _ in run.task.training_problems((seed, STAGE1, 0), share(num_train_samples))]
    batch = rollout(run, respond, problems, STAGE1, temperature, num_responses_per_prompt)
    local_rewards = batch.reward.view(len(problems), -1) # (prompts of this rank, N)
    rewards = torch.tensor(gather_lists(local_rewards.tolist()), device=device) # (num_train_samples, N)
    values = optimal_value(rewards, beta1)
    unsolved = (rewards == 0).all(1).float().mean().item()
    print0(f"stage 1: mean reward {rewards.mean():.3f}, mean V* {values.mean():.3f}, "
           f"{unsolved:.1%} of the prompts never solved")
    if unsolved == 1:
        fail(f"every reward of stage 1 is zero ({batch.truncated.mean():.0%} of the responses were cut off at "
             f"--max_new_tokens={max_new_tokens}), so there is nothing to learn from: give the warm-up more "
             f"--warmup_steps, or make the task easier{parameters_of(run)}")
    # The head reads one vector of each prompt, at its end. It is taken once and from the reference, here the same as
    # the policy, which would keep the graph of every prompt.
    ends = batch.mask[::num_responses_per_prompt].int().argmax(1) - 1
    tokens = batch.tokens[::num_responses_per_prompt, :int(ends.max()) + 1]
    rows = torch.arange(len(tokens), device=device).split(max(1, micro_batch_tokens // tokens.size(1)))
    with torch.no_grad(), on_device(run.reference):
        features = torch.cat([run.reference.trunk(tokens[r])[range(len(r)), ends[r]] for r in rows]).float()
    scale_learning_rates(run, 1 - (run.step - warmup_steps) / max_steps)
    for _ in range(100):
        head = [unshard(p).detach().requires_grad_() for p in run.model.value_head.parameters()]
        loss = value_loss(F.linear(features, *head).squeeze(1), local_rewards, beta1)
        gradients = torch.autograd.grad(run.scaler.scale(loss), head)
        for p, gradient in zip(run.model.value_head.parameters(), gradients):
            p.grad = shard(all_reduce(gradient) / world_size, p)
        optimizer_step(run)
    run.stage1_values = values


def policy_step(run):
    """
    Take one step of A*PO (or GRPO): sample a batch of responses and regress on it. Returns the step's metrics.

    This is the whole of stage 2: rollout, reference, loss, backward, clip, optimizer step.
    """
    problems, stored_values = stage2_problems(run)
    batch = rollout(run, respond, problems, TRAIN, temperature)
    started = time.monotonic()
    rewards, total_tokens = batch.reward, all_reduce(batch.mask.sum())
    pieces = pieces_of(batch.tokens, batch.mask) # micro-batches

    # The reference, and the warmed-up base, which is another model once the reference was refreshed.
    with torch.no_grad(), on_device(run.reference), on_device(run.base):
        ref_logprobs = score(run.reference, pieces, rewards) # (B,)
        base_logprobs = ref_logprobs if run.base is run.reference else score(run.base, pieces, rewards)
    batch.seconds['reference'] = time.monotonic() - started

    logprobs, values = torch.zeros_like(rewards), torch.zeros_like(rewards) # (B,)
    advantages = group_advantages(rewards.view(-1, num_responses_per_prompt)).view(-1) if algorithm == 'grpo' else None
    old_logprobs = [] # of every token, by the policy that sampled
    scale_learning_rates(run, 1 - (run.step - warmup_steps) / max_steps)
    for update in range(updates_per_batch):
        for i, (rows, tokens, mask) in enumerate(pieces):
            # forward
            by_token, head_values = token_logprobs(run.model, tokens, mask, temperature, dtype) # (b, T), (b,)
            by_sequence = sequence_logprobs(by_token, mask) # (b,)
            if update == 0:
                old_logprobs.append(by_token.detach())
                logprobs[rows] = by_sequence.detach()
                # The head is clamped to the range of rewards: above 1 it would push even right answers away.
                values[rows] = head_values.detach().clamp(0, 1) if stored_values is None else stored_values[rows]
            # loss, as a mean over the sequences of all ranks, or over their tokens
            if algorithm == 'grpo':
                loss = grpo_loss(by_token, old_logprobs[i], advantages[rows], mask)
                loss = loss * mask.sum() * world_size / total_tokens
            else:
                loss = apo_loss(by_sequence, ref_logprobs[rows], rewards[rows], values[rows], beta2)
                loss = (loss + value_loss(head_values, rewards[rows, None], beta1)) * len(rows) / len(rewards)
            # backward
            run.scaler.scale(loss).backward()
        grad_norm = optimizer_step(run) # clips
    run.step += 1
    batch.seconds['update'] = time.monotonic() - started - batch.seconds['reference']
    return dict(step_metrics(batch, logprobs, ref_logprobs, base_logprobs, values), grad_norm=grad_norm,
                tokens=int(total_tokens), **{f'seconds_{part}': round(batch.seconds[part], 3) for part in PARTS})


def stage2_problems(run):
    """Return this rank's problems of the current step, and their V* from stage 1, or None where the value head gives
    it."""
    step = run.step - warmup_steps
    if algorithm == 'grpo': # groups: every prompt N times in a row
        groups = run.task.training_problems((seed, TRAIN, step), share(batch_size // num_responses_per_prompt))
        return [p for p, _ in groups for _ in range(num_responses_per_prompt)], None
    if fresh_prompts:
        return [p for p, _ in run.task.training_problems((seed, TRAIN, step), share(batch_size))], None
    # The prompts of stage 1, each once in an epoch, in an order that depends on the epoch. One that was never solved
    # has a V* of 0, but for rounding.
    values = run.stage1_values.cpu().numpy()
    pool = np.flatnonzero(values > 1e-6) if filter_failed else np.arange(num_train_samples)
    order = functools.cache(lambda epoch: np.random.default_rng((seed, TRAIN, epoch)).permutation(pool))
    positions = [step * batch_size + i for i in share(batch_size)]
    chosen = [int(order(i // len(pool))[i % len(pool)]) for i in positions]
    problems = run.task.training_problems((seed, STAGE1, 0), chosen)
    return [p for p, _ in problems], run.stage1_values[chosen]


def step_metrics(batch, logprobs, ref_logprobs, base_logprobs, values):
    """Average what is worth a look over the responses of all ranks."""
    error = residual(logprobs, ref_logprobs, batch.reward, values, beta2)
    columns = dict(reward=batch.reward, accuracy=batch.correct, formatted=batch.formatted, truncated=batch.truncated,
                   length=batch.length, kl=logprobs - ref_logprobs, base_kl=logprobs - base_logprobs,
                   entropy=-logprobs / batch.length, value=values, value_zero=(values < 1e-6).float(), residual=error,
                   residual_std=error.square())
    metrics = dict(zip(columns, all_reduce(torch.stack(list(columns.values())).mean(1) / world_size).tolist()))
    metrics['residual_std'] = math.sqrt(max(0, metrics['residual_std'] - metrics['residual'] ** 2))
    return metrics


def score(model, pieces, like):
    """Return the log-probabilities of whole responses under a model, (B,) like the tensor given."""
    logprobs = torch.zeros_like(like)
    for rows, tokens, mask in pieces:
        logprobs[rows] = sequence_logprobs(token_logprobs(model, tokens, mask, temperature, dtype)[0], mask)
    return logprobs


def pieces_of(tokens, mask):
    """Cut a batch into micro-batches, (rows, tokens, mask) each. Every rank gets equally many, or FSDP would hang."""
    most = all_reduce(len(micro_batches(mask, micro_batch_tokens)), dist.ReduceOp.MAX)
    return [(rows, *trim(tokens[rows], mask[rows])) for rows in micro_batches(mask, micro_batch_tokens, most)]


def rollout(run, function, problems, stream, at_temperature, repeat=1):
    """Let the policy answer this rank's problems: call sample.respond, or sample.evaluate, with the current weights.
    This is where a signal to stop arrives in time, because sampling is what takes long."""
    if run.rollout_model is not run.model:
        copy_weights(run.model, run.rollout_model)
    result, names = None, ('warm-up', 'stage 1', 'stage 2', 'evaluation')
    with contextlib.suppress(Stopped), on_device(run.rollout_model):
        result = function(
            run.rollout_model, run.task, run.tokenizer, problems, (seed, stream, run.step, rank), repeat,
            max_new_tokens=max_new_tokens, temperature=at_temperature, rollout_rows=rollout_rows, watch=watch_signals,
            progress=names[stream] if rank == 0 else '')
    leave_if_asked(run)
    return result


def log_evaluation(run, when, share=1):
    """Evaluate every `share`-th of the held-out problems at eval_temperature, print the result, record it with eight of
    the responses, draw the curves. Returns the summary."""
    seconds = round(run.seconds, 1)
    if sys.stdout.isatty():
        print0(f'evaluating {when} on held-out problems ...', end='\r')
    problems = held_out_problems(run.task, num_eval_samples)[::share]
    rows = rollout(run, evaluate, problems[rank::world_size] or problems[:1], EVAL, eval_temperature)
    rows = gather_lists(rows if rank < len(problems) else [])
    result = summarize(rows)
    low, high = result['interval_95']
    print0(f"held-out {when}: accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {len(rows)}"
           + ''.join(f', {group} {accuracy:.3f}' for group, accuracy in result['by_difficulty'].items())
           + f", formatted {result['formatted']:.3f}, truncated {result['truncated']:.3f}, "
             f"{result['length']:.0f} tokens")
    run.evaluated = run.step
    record(run, 'metrics.jsonl', dict(step=run.step, seconds=seconds, phase='evaluation', **result))
    for row in rows[:8]:
        record(run, 'samples.jsonl', dict(step=run.step, **row))
    if rank == 0:
        try:
            plot_runs([out_dir], os.path.join(out_dir, 'curves.png'))
        except ModuleNotFoundError:
            if when == 'at the end':
                print0("no curves.png: drawing it needs matplotlib: pip install matplotlib")
    return result


# --------------------------------------------------------------------------------------------------------------------
# Model, optimizer, ranks

def build(settings, checkpoint):
    """Return the Run to start from: fresh weights, those of a checkpoint, or all of a checkpoint's state when
    resuming."""
    the_task = make_task(task, settings)
    pretrained = checkpoint is not None and isinstance(checkpoint['tokenizer'], dict)
    if not hasattr(the_task, 'demonstration') and (warmup_steps or not pretrained):
        fail(f"--task={task} has no demonstrations to imitate: start from pretrained weights by --init_from, "
             "without --warmup_steps")
    tokenizer = make_tokenizer(checkpoint['tokenizer'], the_task, init_from) if checkpoint else \
        Tokenizer(the_task.tokens)
    try:
        config = ModelConfig(**checkpoint['config']) if checkpoint else ModelConfig(
            len(tokenizer.tokens), 0, d_model, n_layers, n_heads, n_kv_heads, d_ff)
        if not pretrained:
            config.max_seq_len = max(config.max_seq_len, the_task.longest_prompt + max_new_tokens)
        try_problems(the_task, tokenizer, config)
    except ValueError as error:
        fail(str(error))
    # Sharded before it has memory and filled tensor by tensor, so that a large model is never whole where it trains.
    model = Transformer.without_memory(config)
    if world_size > 1 or cpu_offload:
        fully_shard_blocks(model)
    model.allocate('cpu' if cpu_offload else device, device)
    with torch.no_grad():
        for p, whole in initial_weights(model, checkpoint, tokenizer):
            p.copy_(shard(whole, p))
    model.recompute = activation_checkpointing
    scaler = torch.amp.GradScaler(device.partition(':')[0], growth_interval=500, enabled=dtype == 'float16')
    run = Run(settings, the_task, tokenizer, model, rollout_model=model, scaler=scaler)
    # Sampling needs whole weights in the precision that computes; on one rank in float32 the policy's own are that.
    if world_size > 1 or cpu_offload or dtype != 'float32' or compile:
        run.rollout_model = frozen_copy(model)
    if compile:
        with one_line('--compile=True, which needs a C++ compiler such as g++'):
            torch.compile(torch.sin)(torch.ones(2, device=device))
        model.compile(dynamic=True)
    run.optimizers = make_optimizers(model, muon=warmup_muon_learning_rate > 0)
    if init_from == 'resume':
        restore(run, checkpoint)
    return run


def try_problems(the_task, tokenizer, config):
    """Try whether there are problems of both splits that the vocabulary can write and the model can take. Raises
    ValueError that says what is wrong."""
    if config.max_seq_len < the_task.longest_prompt + max_new_tokens:
        raise ValueError(f"--max_new_tokens={max_new_tokens} and a prompt do not fit the {config.max_seq_len} "
                         "positions of this model")
    used = {*tokenizer.ends}
    for i in range(20 if warmup_steps else 2):
        rng = np.random.default_rng(i)
        problem = the_task.draw(rng, test=i % 2 == 0)
        used.update(tokenizer.encode(tokenizer.prompt(the_task, problem)))
        used.update(tokenizer.encode(the_task.demonstration(problem, rng)) if warmup_steps else [])
    if max(used) >= config.vocab_size:
        raise ValueError(f"the tokenizer uses token {max(used)}, {tokenizer.library.id_to_token(max(used))!r}, but the "
                         f"model's embedding has {config.vocab_size} rows")


def fully_shard_blocks(model):
    """Shard a model over the ranks, block by block. What is gathered for computing is in dtype, master weights and
    gradients stay in float32."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    options = dict(mesh=dist.init_device_mesh(torch.device(device).type, (world_size,)),
                   mp_policy=MixedPrecisionPolicy(getattr(torch, dtype), torch.float32),
                   offload_policy=CPUOffloadPolicy(device != 'cpu') if cpu_offload else OffloadPolicy())
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def initial_weights(model, checkpoint, tokenizer):
    """Yield pairs of each parameter and its whole value: pretrained, of a checkpoint, or random."""
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
            embed_numbers(fresh, {i: int(token) for i, token in enumerate(tokenizer.tokens) if token.isdigit()})
        weights = fresh.state_dict()
    for name, p in model.named_parameters():
        yield p, weights[name]


def shard(whole, p):
    """Return a whole tensor as the parameter p is held: where the model is sharded, this rank's part of it."""
    if not hasattr(p, 'device_mesh'):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to(p.device)


def unshard(x):
    """Return a tensor of the model or an optimizer as a whole, on the device; every rank must call it."""
    return x.to(device).full_tensor() if hasattr(x, 'full_tensor') else x


def frozen_copy(model, weights=None):
    """Return a whole copy of the policy that never trains, in the precision that computes; or with these weights."""
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
    """Let a copy that samples or is the reference visit the device, where cpu_offload keeps it on the CPU."""
    if cpu_offload:
        copy.to(device)
    yield
    if cpu_offload:
        copy.to('cpu')


def make_optimizers(model, muon=False):
    """Make AdamW on float32 master weights, and in the warm-up Muon for the matrices of the blocks. The value head is a
    small regression beside the policy, with a learning rate of its own. scale_learning_rates sets the rates."""
    head, matrices, rest = [], [], []
    for name, p in model.named_parameters():
        in_block = muon and p.dim() == 2 and 'blocks' in name
        (head if name.startswith('value_head') else matrices if in_block else rest).append(p)
    groups = [dict(params=rest, name='policy'), dict(params=head, name='value_head')]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    return [adamw, Muon([dict(params=matrices, name='matrices')])] if muon else [adamw]


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024), so that every
    direction of a matrix learns equally fast. torch.optim.Muon is the same in bfloat16, which most CPUs compute
    slower than float32.
    """

    def __init__(self, groups):
        super().__init__(groups, dict(lr=0.0, momentum=0.95))

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
    """Return about the nearest matrix with singular values of 1 (0.7 to 1.2 is good enough), by Newton-Schulz."""
    wide = x if x.size(0) <= x.size(1) else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.size(0) <= x.size(1) else wide.T


def scale_learning_rates(run, factor, policy=None, matrices=None):
    """Set every learning rate to `factor` of its setting."""
    rates = dict(policy=learning_rate if policy is None else policy, matrices=matrices, value_head=value_learning_rate)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = rates[group['name']] * factor


def optimizer_step(run):
    """Clip, step, clear. Returns the norm of the policy's gradient before clipping. A gradient that is not finite
    changes nothing; in float16 it says that the loss was scaled by too much, which the scaler mends."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    # The value head by itself, or its gradient, which is large and noisy, would shrink the policy's.
    head = list(run.model.value_head.parameters())
    policy = [p for name, p in run.model.named_parameters() if not name.startswith('value_head')]
    norm, head_norm = (unshard(torch.nn.utils.clip_grad_norm_(part, grad_clip)).item() for part in (policy, head))
    run.bad_steps = 0 if math.isfinite(norm + head_norm) else run.bad_steps + 1
    if run.bad_steps == 0:
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    elif run.bad_steps == (25 if dtype == 'float16' else 5):
        fail(f"the gradient was not finite in {run.bad_steps} steps in a row, up to step {run.step}: lower "
             f"--learning_rate or --value_learning_rate; the checkpoints in {out_dir} are good")
    else:
        print0(f"the gradient of step {run.step + 1} is not finite: nothing is changed")
    run.scaler.update()
    run.model.zero_grad()
    return norm


def share(count):
    """Return this rank's share of `count` things, as a range of their indices."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def all_reduce(x, operation=dist.ReduceOp.SUM):
    """Return the sum (or MAX) over the ranks of a tensor or number, as a tensor."""
    x = torch.as_tensor(x, device=device).clone()
    if world_size > 1:
        dist.all_reduce(x, operation)
    return x


def gather_lists(rows):
    """Return one list of what every rank has, in the order of the ranks."""
    if world_size == 1:
        return rows
    lists = [None] * world_size
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


# --------------------------------------------------------------------------------------------------------------------
# Settings

def configure(argv):
    """
    Settle every setting and write them to this module, once: the block on top < the task's defaults < what fits the
    machine and pretrained weights < a checkpoint that is resumed < the command line.

    Returns all settings, those that the task's class takes included, and the checkpoint to start from, or None.
    """
    read_cluster()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = fail
    for name in ('task', 'out_dir', 'init_from'):
        first.add_argument(f'--{name}', type=os.path.expanduser)
    start = {name: value for name, value in vars(first.parse_known_args(argv)[0]).items() if value is not None}
    chosen = SETTINGS | start
    folder = chosen['out_dir'].replace('TASK', os.path.basename(chosen['task']).removesuffix('.py'))
    checkpoint = open_start(chosen['init_from'], folder)
    resumed = checkpoint['settings'] if chosen['init_from'] == 'resume' else {}
    if resumed and 'task' not in start:
        chosen['task'] = resumed['task']
        if chosen['task'].endswith('.py'):
            fail(f"the task of this run is a file, and a checkpoint must not choose what runs: add --task={chosen['task']}")
    with one_line(f"--task={chosen['task']}", ValueError, OSError):
        kind = find_task(chosen['task'])
    given = parse_arguments(argv, kind, chosen['task']) | start | dict(task=chosen['task'], out_dir=folder)

    device = join_ranks(given.get('device', resumed.get('device', 'auto')), given.get('cpu_offload', False))
    fits = dict(GPU) if device.startswith('cuda') else {} # a Mac's GPU is taken for a laptop's
    if checkpoint:
        pretrained = isinstance(checkpoint['tokenizer'], dict)
        fits |= (PRETRAINED if pretrained else {}) | dict(warmup_steps=0)
        fits |= {name: checkpoint['config'][name] for name in SIZES['50m']}
        fits |= {name: checkpoint['settings'][name] for name in parameters(kind) if name in checkpoint['settings']}
        for name in SIZES['50m']:
            if name in given and given[name] != fits[name]:
                fail(f"--{name}={given[name]} does not fit the checkpoint's model, which has {fits[name]}")
    settings = SETTINGS | parameters(kind) | kind.defaults | fits | resumed | given | dict(device=device)
    if settings['dtype'] == 'auto':
        settings['dtype'] = pick_dtype(device)
    check_settings(settings)
    globals().update({name: settings[name] for name in SETTINGS})
    print0(f"task {task}, {out_dir=}, {device=}, {dtype=}, {torch.get_num_threads()} threads, "
           f"{world_size} rank(s), torch {torch.__version__}")
    changed = {name: value for name, value in settings.items() if name not in given and value != SETTINGS.get(name, value)
               and name not in ('device', 'dtype')}
    if changed and not resumed:
        print0('chosen for this task, machine or start: ' + ', '.join(f'{k}={v}' for k, v in changed.items()))
    return settings, checkpoint


def parameters(kind):
    """Return the parameters of a task's class with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def parameters_of(run):
    """Return, for a message, the settings by which this run's task is made easier, if it has any."""
    names = [f'--{name}' for name in parameters(type(run.task))]
    return f" ({', '.join(names)})" if names else ''


def parse_arguments(argv, kind, name):
    """Return the settings given as --name=value or --name value, typed by their defaults; --help prints all of them with
    their comments. One line and exit for one that neither this file nor the task's class takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage='python train.py [--setting=value ...]', allow_abbrev=False)
    parser.error, group = fail, parser.add_argument_group('settings, with their defaults')
    with open(__file__, encoding='utf-8') as file:
        block = file.read().partition('# ---- settings')[2].partition('# ---- end of settings')[0]
    for setting, default, comment, heading in re.findall(r'^(\w+) = (.+?) # (.+)$|^# (.+)$', block, re.M):
        if heading:
            group = parser.add_argument_group(heading)
        else:
            add_setting(group, setting, SETTINGS[setting], kind.defaults.get(setting, default), comment)
    for other, its_class in (TASKS | {name: kind}).items():
        group = parser.add_argument_group(f'with --task={other}')
        comments = dict(re.findall(r'^ +(\w+)=.+?, # (.+)$', inspect.getsource(its_class), re.M))
        for parameter, default in parameters(its_class).items():
            if its_class is kind:
                add_setting(group, parameter, default, default, comments.get(parameter, ''))
            else: # only to be listed
                group.description = f"{group.description or ''}\n  --{parameter} {default}: {comments[parameter]}".strip('\n')
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [*SETTINGS, *parameters(kind)]
        close = difflib.get_close_matches(unknown[0].partition('=')[0].removeprefix('--'), names, n=1)
        own = ', '.join(f'--{parameter}' for parameter in parameters(kind))
        fail(f"unknown setting {unknown[0]!r}{f'; did you mean --{close[0]}?' if close else ''} (--task={name} takes "
             f"{own or 'none of its own'}; python train.py --help lists all)")
    return vars(given)


def add_setting(group, name, default, shown, comment):
    """Add one setting to the command line; its default says its type."""
    def true_or_false(text):
        return ['false', 'true'].index(text.lower()) == 1
    kind = true_or_false if isinstance(default, bool) else type(default)
    group.add_argument(f'--{name}', type=kind, metavar=shown, default=argparse.SUPPRESS, choices=CHOICES.get(name),
                       help=comment.replace('%', '%%'))


def check_settings(settings):
    """End with one line for every combination of settings that cannot work."""
    # The least that a number may be, where it is not just above 0; the value head's gradient overflows below 0.03.
    least = dict.fromkeys(('seed', 'warmup_steps', 'warmup_muon_learning_rate', 'max_steps', 'ref_update_interval',
                           'eval_temperature', 'keep_checkpoints'), 0) | dict(beta1=0.03)
    for name, default in SETTINGS.items():
        value, low = settings[name], least.get(name, 0)
        if type(default) in (int, float) and not (low <= value < 2 ** 63 and (value or name in least)):
            fail(f"--{name} must be {f'at least {low}' if name in least else 'above 0'}, not {value}")
    if settings['filter_failed'] and settings['fresh_prompts']:
        fail("--filter_failed=True is about the prompts of stage 1: it needs --fresh_prompts=False")
    grpo = settings['algorithm'] == 'grpo'
    if grpo and settings['num_responses_per_prompt'] < 2:
        fail("--algorithm=grpo compares the responses to a prompt: --num_responses_per_prompt must be at least 2")
    unit = world_size * (settings['num_responses_per_prompt'] if grpo else 1)
    for name, factor in dict(batch_size=unit, warmup_batch_size=world_size, num_train_samples=world_size).items():
        if settings[name] % factor:
            fail(f"--{name}={settings[name]} must be a multiple of {factor} (ranks, with GRPO x responses per prompt)")


def read_cluster():
    """Read which rank this is among how many, as torchrun and clusters say it. One line and exit when they say half."""
    global rank, world_size
    names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    given = {name: os.environ[name] for name in names if os.environ.get(name)} # empty is absent
    with one_line(f"the cluster's variables {given}", ValueError):
        rank, world_size = int(given.get('RANK', 0)), int(given.get('WORLD_SIZE', 1))
    if rank >= world_size or world_size > 1 and len(given) < len(names):
        absent = ', '.join(name for name in names if name not in given)
        fail(f"{', '.join(given)} set, but {absent or 'they contradict each other'}: start with torchrun, or unset them")


def join_ranks(name, cpu_offload):
    """Pick this rank's device, share out the cores, join the other ranks. Returns the device."""
    local_ranks = int(os.environ.get('LOCAL_WORLD_SIZE') or 1)
    device = pick_device(name)
    if device == 'cuda':
        if torch.cuda.device_count() < local_ranks:
            fail(f"{local_ranks} processes on this machine, but {torch.cuda.device_count()} GPU(s): lower "
                 "--nproc_per_node")
        device = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    if device == 'cpu' and local_ranks > 1: # torchrun gives each of several processes one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_ranks))
    if device == 'cpu' and platform.libc_ver()[0] == 'glibc':
        # Keep freed memory for the next tensor instead of giving it back: a fifth faster
        # (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
        for parameter, value in ((-3, 2 ** 25), (-1, 2 ** 31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if (world_size > 1 or cpu_offload) and not dist.is_initialized():
        alone = {} if world_size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo', **alone)
    return device


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints

def open_start(start, folder):
    """Return the checkpoint, or what is needed of pretrained weights, that a run starts from; None from scratch. One
    line and exit when there is none, or when the run would overwrite another."""
    saved = checkpoints(folder)
    if start == 'resume':
        return load_checkpoint(saved[-1]) if saved else fail(
            f"nothing to resume: there is no checkpoint in {folder}" + (
                "; a run was started there and saved none: delete it and start again" if holds_run(folder) else ''))
    refuse_to_overwrite(folder)
    if start == 'scratch':
        return None
    start = newest_model(glob.escape(start)) or start # where it is the folder of a run
    named = re.fullmatch(r'[\w.-]+/[\w.-]+', start) and not start.endswith('.pt') # as models at Hugging Face are
    return open_pretrained(start) if os.path.isdir(start) or named and not os.path.exists(start) else \
        load_checkpoint(start)


def open_pretrained(name):
    """Return what build needs of pretrained weights, in a folder or by a name that huggingface_hub finds: where they
    are, their config and tokenizer."""
    folder = name
    if not os.path.isdir(name):
        with one_line(f"{name}, which is no file or folder here, as a model of Hugging Face"):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(name, allow_patterns=['*.json', '*.jinja', 'model*.safetensors'])
    with one_line(name):
        config = dataclasses.asdict(read_config(folder))
        return dict(folder=folder, config=config, tokenizer=tokenizer_files(folder), settings={})


def checkpoints(folder):
    """Return the paths of the checkpoints in a run's folder that can be resumed, oldest first."""
    names = glob.glob('checkpoint_step_*.pt', root_dir=folder)
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: (len(name), name))] # by number


def holds_run(folder):
    """Say whether a run has been started in a folder."""
    return bool(checkpoints(folder)) or os.path.exists(os.path.join(folder, 'metrics.jsonl'))


def refuse_to_overwrite(folder):
    """End with one line that says what works when a folder holds a run."""
    if checkpoints(folder):
        fail(f"{folder} already holds a run: use --init_from=resume or another --out_dir, or delete it")
    if holds_run(folder):
        fail(f"{folder} holds a run that ended before it saved anything: delete it, or use another --out_dir")


def claim(folder):
    """Lock a run's folder, which the system undoes when this process ends, however it ends. Returns the lock. One line
    and exit when another process has it."""
    if rank:
        return None
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, '.lock'), 'w')
    try:
        import fcntl # Windows has none
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:
        pass
    except BlockingIOError:
        fail(f"another process is writing into {folder}: wait until it ends, or use another --out_dir")
    if init_from != 'resume':
        refuse_to_overwrite(folder) # it may have been filled a moment ago
    for path in glob.glob(os.path.join(glob.escape(folder), '*.tmp')): # of a process that was killed while it saved
        os.remove(path)
    return lock


def save_checkpoint(run, final=False):
    """Write all of the run's state, or for the final model what sampling needs, to a temporary file, flush it, rename
    it: a checkpoint is whole or not there. Every rank takes part, because weights are gathered; rank 0 writes."""
    checkpoint = dict(format=FORMAT, task=task, step=run.step, settings=run.settings | dict(device=device.split(':')[0]),
                      config=dataclasses.asdict(run.model.config), tokenizer=run.tokenizer.state,
                      model=get_model_state_dict(run.model, options=WHOLE))
    if not final:
        checkpoint |= dict(optimizers=get_optimizer_state_dict(run.model, run.optimizers, options=WHOLE),
                           reference=run.reference and run.reference.state_dict(), stage1_values=run.stage1_values,
                           base=None if run.base is run.reference else run.base.state_dict(),
                           scaler=run.scaler.state_dict(), seconds=run.seconds, logged={},
                           **{name: getattr(run, name) for name in PLAIN})
    if rank:
        return
    path = os.path.join(out_dir, 'tinyzero_astarpo_final.pt' if final else f'checkpoint_step_{run.step}.pt')
    try:
        for name in () if final else LOGS: # flushed as well, because resuming cuts them to the length that they have now
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
    saved = checkpoints(out_dir)
    for old in [] if final else saved[:saved.index(path) + 1][:-keep_checkpoints]:
        os.remove(old)


def restore(run, checkpoint):
    """Put a checkpoint's state into a run whose model already has the checkpoint's weights."""
    before = checkpoint['settings']
    settled = ['warmup_steps'] * bool(checkpoint['reference']) + ['dtype'] * ('float16' in (dtype, before['dtype']))
    if checkpoint['stage1_values'] is not None and not fresh_prompts: # these prompts are drawn again, their V* is not
        settled += ['seed', 'num_train_samples', *parameters(type(run.task))]
    if not checkpoint['reference'] and (warmup_muon_learning_rate > 0) != (before['warmup_muon_learning_rate'] > 0):
        settled += ['warmup_muon_learning_rate']
    for name in settled:
        if run.settings[name] != before[name]:
            fail(f"--{name}={run.settings[name]} comes too late for this run, which has {name}={before[name]}")
    if not checkpoint['reference'] and warmup_steps < checkpoint['step']:
        fail(f"--warmup_steps={warmup_steps} comes too late for this run, which has taken {checkpoint['step']} steps")
    for name in PLAIN:
        setattr(run, name, checkpoint[name])
    run.started -= checkpoint['seconds']
    run.scaler.load_state_dict(checkpoint['scaler'])
    if checkpoint['stage1_values'] is not None:
        run.stage1_values = checkpoint['stage1_values'].to(device, copy=True)
    if checkpoint['reference']:
        run.reference = frozen_copy(run.model, checkpoint['reference'])
        run.base = frozen_copy(run.model, checkpoint['base']) if checkpoint['base'] else run.reference
        run.optimizers = make_optimizers(run.model)
    set_optimizer_state_dict(run.model, run.optimizers, checkpoint['optimizers'], options=WHOLE)
    for name in LOGS if rank == 0 else (): # what was logged after the checkpoint will be logged again
        with open(os.path.join(out_dir, name), 'a') as file:
            file.truncate(min(checkpoint['logged'][name], file.tell()))
    print0(f"resuming at step {run.step}")


def checkpoint_if_due(run):
    """Save every checkpoint_interval steps, and leave when a signal asked for that."""
    leave_if_asked(run)
    if run.step % checkpoint_interval == 0:
        save_checkpoint(run)


# --------------------------------------------------------------------------------------------------------------------
# Signals and records

def catch_signals():
    """Let Ctrl-C, a terminal that closes, and what clusters send before they end a job save the run and leave; one that
    is ignored, as under nohup, stays ignored."""
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):
        number = getattr(signal, name, None) # Windows has not all of them
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request_stop)


def request_stop(number, frame):
    """Ask the run to save and leave; a second Ctrl-C leaves at once."""
    stop.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def watch_signals(tokens):
    """Leave the sampling when a signal asked for that: generate calls it after each token."""
    if stop.is_set():
        raise Stopped


def leave_if_asked(run):
    """Save the finished steps and end when a signal asked any rank to stop."""
    if all_reduce(int(stop.is_set())).item() == 0: # every rank must come to the same decision
        return
    save_checkpoint(run)
    all_reduce(0).item() # rank 0 has written: torchrun may kill it when the others leave
    fail(f"stopped by a signal at step {run.step}; continue with --init_from=resume --out_dir={out_dir}")


def report(run, phase, metrics, every=1):
    """Record the metrics of a step, and print one line to read, with the time left."""
    record(run, 'metrics.jsonl', dict(step=run.step, seconds=round(run.seconds, 2), phase=phase, **metrics))
    first, last = (0, warmup_steps) if phase == 'warm-up' else (warmup_steps, warmup_steps + max_steps)
    run.recent = (run.recent + [time.monotonic()])[-20:] if run.step > first + 1 else [time.monotonic()]
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
        "every reward so far is zero, nothing can be learned: give more --warmup_steps, or make the task easier"
        f"{parameters_of(run)}": len(run.rewards) >= 5 and not any(run.rewards),
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


def record(run, name, row):
    """Append one JSON line to a file in out_dir, and send its numbers to the tracker if there is one, by rank 0."""
    if rank:
        return
    if run.track and 'phase' in row:
        numbers = {f"{row['phase']}/{k}": v for k, v in row.items() if isinstance(v, (int, float))}
        run.track(numbers, row['step'])
    with open(os.path.join(out_dir, name), 'a') as file:
        file.write(json.dumps(row) + '\n')


def open_tracker(run):
    """Give the run a function of numbers and their step that sends them to wandb or TensorBoard. A run that is resumed
    goes on under its id at wandb."""
    if rank or tracker == 'none':
        return
    with one_line(f'--tracker={tracker}'):
        if tracker == 'wandb':
            import wandb
            session = wandb.init(project='tinyzero-astarpo', name=out_dir, config=run.settings, id=run.tracker_id,
                                 resume='allow')
            run.track, run.tracker_id = session.log, session.id
        else:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out_dir)
            run.track = lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]


def finish(run):
    """Leave the final evaluation, model and summary."""
    seconds = run.seconds
    result = log_evaluation(run, 'at the end')
    if not max_steps:
        run.warmup_accuracy = result['accuracy']
    save_checkpoint(run)
    save_checkpoint(run, final=True)
    if rank:
        return
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=os.path.dirname(os.path.abspath(__file__)),
                         capture_output=True, text=True) # through the shell, because there may be no git
    result['accuracy_by_difficulty'], result['average_reward'] = result.pop('by_difficulty'), result.pop('reward')
    with open(os.path.join(out_dir, 'metrics.jsonl')) as file:
        steps = [row for row in map(json.loads, file) if 'seconds_rollout' in row]
    split = {f'seconds_{part}': round(sum(row[f'seconds_{part}'] for row in steps), 2) for part in PARTS}
    speed = round(sum(row['tokens'] for row in steps) / max(sum(split.values()), 0.01)) if steps else None
    summary = dict(task=task, **result, accuracy_after_warmup=run.warmup_accuracy, parameters=run.model.num_params(),
                   steps=run.step, seconds=round(seconds, 1), **split, tokens_per_second=speed,
                   device=device, ranks=world_size, threads=torch.get_num_threads(), settings=run.settings,
                   git_commit=git.stdout.strip() or None,
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    with open(os.path.join(out_dir, 'results_summary.json'), 'w') as file:
        json.dump(summary, file, indent=2)
    print0(f"{seconds / 60:.1f} minutes; accuracy {run.warmup_accuracy:.3f} after the warm-up, "
           f"{result['accuracy']:.3f} at the end. See {out_dir}; now try: python sample.py")


def print0(*words, **options):
    if rank == 0:
        print(*words, flush=True, **options)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace') # what a terminal cannot show
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
