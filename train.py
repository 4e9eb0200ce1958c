"""
Train a transformer to solve countdown or multiplication: warm-up by imitation, then A*PO.

    python train.py                                             # countdown, on a CPU or a GPU
    torchrun --nproc_per_node=1 train.py --task=multiplication  # the same through torchrun
    torchrun --nproc_per_node=8 train.py --batch_size=4096      # eight GPUs, FSDP
    python train.py --init_from=resume                          # continue the run in out/countdown
    python train.py --init_from=PATH --out_dir=out/more         # A*PO from a checkpoint
    python train.py --init_from=Qwen/Qwen2.5-0.5B               # A*PO from pretrained weights

Every setting below can be given as --name=value or --name value. --help lists them, and those of
the tasks.
"""
import contextlib
import copy
import ctypes
import dataclasses
import glob
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import timeit

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import (
    CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard)
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils.rnn import pad_sequence

from apo import (
    ALGORITHMS, Algorithm, apo_loss, optimal_value, residual, sequence_logprobs, value_loss)
from model import ModelConfig, Transformer, embed_numbers, micro_batches, packs, token_logprobs, trim
from sample import (
    EVAL, FORMAT, STAGE1, TRAIN, WARMUP, checkpoints, described, evaluate, fail, find_checkpoint, held_out_problems,
    load_checkpoint, make_task, make_tokenizer, one_line, open_model, parameters, pick_device, pick_dtype, plot_runs,
    read_arguments, read_log, refuse, respond, run_script, same_task, summarize, task_class, trusted, weights_of)
from tasks import ANSWER, END_ANSWER, END_THINK, TASKS, Grade, PretrainedTokenizer, run_file

# ---- settings of the default run; a task's `defaults`, a GPU, pretrained weights change some ----
task = 'countdown' # countdown | multiplication | chain | a file such as examples/grid.py
out_dir = 'out/TASK' # where checkpoints, metrics and curves go; by default out/ and the task's name
init_from = 'scratch' # scratch | resume (the newest checkpoint in out_dir) | a checkpoint or pretrained weights
seed = 1337 # training problems, weights and sampling noise all follow from it
device = 'auto' # auto | cpu | cuda | mps
dtype = 'auto' # auto | float32 | bfloat16 | float16: of the matrix multiplies; master weights are always float32
compile = False # torch.compile the training forward
# model
d_model = 128 # width of the residual stream
n_layers = 4 # blocks
n_heads = 4 # attention heads
n_kv_heads = 2 # heads of keys and values, which attention heads share: one samples faster, four learn faster
d_ff = 384 # width of the SwiGLU
# warm-up: imitation of the task's demonstrations
warmup_steps = 5000 # optimizer steps
warmup_batch_size = 16 # demonstrations per step, over all ranks
warmup_learning_rate = 3e-3 # AdamW, for all but the matrices of the blocks; decays to 5% over the last two fifths
warmup_muon_learning_rate = 0.012 # Muon, for the matrices of the blocks; decays with it; 0: AdamW for them too
# A*PO
algorithm = 'apo' # apo | grpo | rloo | reinforce | rejection | cispo | gspo | a file, as benchmarks/my_loss.py
max_steps = 32 # steps after the warm-up, each on a batch of responses
batch_size = 128 # responses per step, over all ranks
updates_per_batch = 1 # optimizer steps on each batch; from the second one on GRPO's ratio is not 1, and its clip acts
learning_rate = 4e-2 # AdamW; decays linearly to 0 over max_steps
adam_eps = 1e-2 # AdamW's epsilon in A*PO, large: a small gradient then makes a small step (apo.py); 1e-8: usual
grad_clip = 1.0 # clip the norms of the policy's and the value head's gradient; A*PO's policy stays below
beta1 = 0.5 # temperature of V* (apo.py, formula 1)
beta2 = 1e-2 # strength of the pull to the reference (apo.py, formula 2); 1e-3: as published
centre = True # shift V* so that r - V* is 0 in the mean of each batch (apo.py); False: as published
max_step_kl = 0.005 # a batch moves the policy by at most so much, in nats a response; 0: no bound
temperature = 1.0 # divides the logits, in sampling and in scoring alike
num_examples = 1 # worked examples in the prompt of pretrained weights
max_new_tokens = 800 # longest response; one that does not end by then has reward 0
num_train_samples = 32 # prompts of stage 1, each answered num_responses_per_prompt times
num_responses_per_prompt = 8 # responses of stage 1 to a prompt, and the group size of GRPO and its kin
fresh_prompts = True # A*PO: new prompts at every step, V* from the value head; False: stage 1's, so take more there
ref_update_interval = 0 # every so many steps the reference becomes the policy; 0: never, as in the paper
value_learning_rate = 1e-3 # AdamW, for the value head
# evaluation and records
eval_temperature = 1.0 # 0 is greedy
fold = 0 # which tenth of the problems is held out, from the warm-up on; choose settings on another than you report
num_eval_samples = 2000 # held-out responses before and after A*PO; an eighth of them in between
eval_interval = 8 # A*PO steps between evaluations; in the warm-up, whose steps are short, 50 times as many
checkpoint_interval = 500 # steps between checkpoints; in A*PO, whose steps are long, each evaluation leaves one too
keep_checkpoints = 3 # newest checkpoints that stay on the disk, beside the best evaluation's; 0: all
tracker = 'none' # none | wandb: where the metrics go beside metrics.jsonl
# memory
micro_batch_tokens = 2048 # tokens in one forward and backward pass
rollout_rows = 1024 # responses sampled side by side
activation_checkpointing = False # compute each block twice in an update, to keep less in memory
cpu_offload = False # master weights, optimizer state and, between uses, the copies stay on the CPU
# ---- end of settings ----------------------------------------------------------------------------
SETTINGS = {name: value for name, value in list(globals().items())
            if isinstance(value, (bool, int, float, str)) and name.islower() and not name.startswith('_')}
CHOICES = dict(fold=range(10), dtype=('float32', 'bfloat16', 'float16'), tracker=('none', 'wandb'))
# The least that a number may be, where it is not just above 0; with a beta1 below 0.03 the value
# head's gradient overflows.
LEAST = dict(seed=0, fold=0, num_examples=0, warmup_steps=0, warmup_muon_learning_rate=0, max_steps=0, max_step_kl=0,
             ref_update_interval=0, eval_temperature=0, keep_checkpoints=0, beta1=0.03, num_responses_per_prompt=2)
MODEL = ('d_model', 'n_layers', 'n_heads', 'n_kv_heads', 'd_ff') # a checkpoint fixes these
# What fits a GPU.
GPU = dict(
    d_model=512, n_layers=12, n_heads=8, n_kv_heads=2, d_ff=2048, warmup_steps=1000, warmup_batch_size=256,
    max_steps=96, batch_size=1024, num_train_samples=256, learning_rate=4e-4, adam_eps=1e-8, eval_interval=20,
    micro_batch_tokens=32768)
# What fits pretrained weights on a GPU: small pieces, which leave room for the 150,000 logits of a
# token. On a laptop a response takes a second.
PRETRAINED = dict(
    warmup_learning_rate=1e-4, warmup_muon_learning_rate=0.0, max_steps=200, batch_size=256, learning_rate=2e-5,
    adam_eps=1e-8, value_learning_rate=1e-4, beta2=1e-3, max_step_kl=0.05, eval_interval=25, num_train_samples=64,
    max_new_tokens=1024, micro_batch_tokens=4096, rollout_rows=256)
LAPTOP = PRETRAINED | dict(
    max_steps=40, batch_size=32, eval_interval=20, num_train_samples=16, num_responses_per_prompt=4,
    num_eval_samples=640, max_new_tokens=64, keep_checkpoints=1)
PATHS = ('task', 'out_dir', 'init_from', 'algorithm') # names or paths
LOGS = ('metrics.jsonl', 'samples.jsonl')
PLAIN = ('last_evaluation', 'best', 'tracker_id', 'step', 'stage1_values') # a checkpoint has these of a Run
PARTS = ('rollout', 'grading', 'reference', 'update') # of a step of A*PO, timed
rank, world_size = 0, 1 # read_cluster sets them


@dataclasses.dataclass
class Run:
    """What a run consists of."""
    settings: dict # all of them, the task's parameters too
    task: object
    tokenizer: object
    model: Transformer # the policy pi, and the value head; sharded when there are several ranks
    rollout_model: Transformer # a whole copy that responds, in the precision that computes
    scaler: torch.amp.GradScaler # in float16 it scales the loss, or small gradients would vanish
    optimizers: list # AdamW, and in the warm-up Muon
    reference: Transformer = None # pi_ref, whole and frozen
    base: Transformer = None # the warmed-up model, for the KL that a refreshed reference would hide
    other: Algorithm = None # what takes the place of A*PO
    stage1_values: list = None # floats, V* of the prompts of stage 1, (num_train_samples,)
    step: int = 0 # steps so far, those of the warm-up included
    last_evaluation: tuple = (-1, 0) # its step and its number of responses
    best: tuple = (0.0, 0) # accuracy and step of the best evaluation, whose checkpoint is kept
    tracker_id: str = None # of the run at wandb
    track: object = None # a function that sends numbers to wandb
    started: float = dataclasses.field(default_factory=time.monotonic) # less earlier sessions
    stopping: bool = False # a signal asked this process to stop
    began: tuple = (-1, 0.0) # step and second at which this session's part of the phase began
    rewards: list = dataclasses.field(default_factory=list) # of this session's steps, for hints
    hints: list = dataclasses.field(default_factory=list) # that were given

    @property
    def seconds(self):
        return time.monotonic() - self.started


def main():
    start = configure(sys.argv[1:])
    lock = claim(out_dir) # no other process writes there while this one lives
    run = build(*start)
    del start # or the file of its checkpoint would take disk space until the run ends
    open_tracker(run)
    catch_signals(run)
    print0(f"{run.model.num_params():,} parameters, a vocabulary of {run.model.config.vocab_size} tokens")
    if isinstance(run.tokenizer, PretrainedTokenizer) and run.step == 0:
        look(run)

    # Warm-up: imitate demonstrations, until the model knows the format and some of the task.
    while run.step < warmup_steps:
        if run.step and run.step % (50 * eval_interval) == 0 and run.last_evaluation[0] < run.step:
            log_evaluation(run, f'at step {run.step} of the warm-up', one_in=8)
        report(run, 'warm-up', warm_up_step(run), every=20)
        checkpoint_if_due(run)
    if run.reference is None:
        run.base = run.reference = frozen_copy(run.model)
        run.optimizers = make_optimizers(run.model, learning_rate, eps=adam_eps)

    while run.step < warmup_steps + max_steps:
        stage2_step = run.step - warmup_steps
        if stage2_step % eval_interval == 0 and run.last_evaluation[0] < run.step:
            when, one_in = (f'at step {stage2_step}', 8) if stage2_step else ('after the warm-up', 1)
            log_evaluation(run, when, one_in)
            save_checkpoint(run)
        # Stage 1: the reference answers each prompt several times, which gives V*.
        if algorithm == 'apo' and run.stage1_values is None:
            estimate_values(run)
            save_checkpoint(run)
        # Stage 2: regress beta2 log(pi / pi_ref) on the optimal advantage r - V*, with one fresh
        # response per prompt, or take a step of another algorithm.
        report(run, algorithm, policy_step(run))
        if ref_update_interval and (stage2_step + 1) % ref_update_interval == 0:
            run.reference = frozen_copy(run.model)
            if not fresh_prompts:
                run.stage1_values = None # they are estimated again
        checkpoint_if_due(run)
    finish(run)
    leave_ranks()


# --------------------------------------------------------------------------------------------------
# The three kinds of step

def warm_up_step(run):
    """Take one step of imitation on fresh demonstrations. Returns its metrics."""
    started = time.monotonic()
    tokens, mask = demonstrations(run) # (B, T)
    total_tokens = all_reduce(mask.sum())
    total_loss = 0.0
    for _, *piece in pieces_of(run.model, tokens, mask):
        logprobs, _ = token_logprobs(run.model, *piece, temperature, dtype)
        loss = -logprobs.sum() / total_tokens # the mean over all tokens of all ranks
        run.scaler.scale(loss * world_size).backward() # FSDP averages gradients over the ranks
        total_loss += loss.detach()
    decay = 0.05 + 0.95 * (1 - run.step / warmup_steps) / 0.4
    set_learning_rates(run, min(1, (run.step + 1) / min(20, 0.2 * warmup_steps), decay))
    grad_norm = optimizer_step(run)
    run.step += 1
    return dict(loss=all_reduce(total_loss).item(), grad_norm=grad_norm, tokens=int(total_tokens),
                seconds_update=round(time.monotonic() - started, 3))


def demonstrations(run):
    """Return this rank's demonstrations of the current step: tokens, and the mask of the responses,
    both (B, T)."""
    rows, masks = [], []
    for problem, rng in run.task.training_problems((seed, WARMUP, run.step), share(warmup_batch_size)):
        prompt = run.tokenizer.encode(run.tokenizer.prompt(run.task, problem))
        text = run.tokenizer.demonstration(run.task, problem, rng)
        response = run.tokenizer.encode(text) + run.tokenizer.ends[:1]
        rows.append(torch.tensor(prompt + response[:max_new_tokens])) # the policy cannot give more
        masks.append(torch.arange(len(rows[-1])) >= len(prompt))
    tokens = pad_sequence(rows, batch_first=True, padding_value=run.tokenizer.ends[0])
    return tokens.to(device), pad_sequence(masks, batch_first=True).to(device)


def estimate_values(run):
    """Take stage 1: the reference answers num_train_samples prompts num_responses_per_prompt times
    each. V* of these prompts is kept in run.stage1_values, and the value head learns it."""
    N = num_responses_per_prompt
    print0(f"stage 1: the reference answers {num_train_samples} prompts, {N} times each ...")
    mine = share(num_train_samples)
    problems = [problem for problem, _ in run.task.training_problems((seed, STAGE1, 0), mine)]
    batch = rollout(run, respond, problems, STAGE1, mine.start * N, temperature, repeat=N)
    local_rewards = batch.reward.view(-1, N) # (prompts of this rank, N)
    rewards = torch.tensor(gather_lists(local_rewards.tolist()), device=device)
    values = optimal_value(rewards, beta1) # (num_train_samples,)
    unsolved = (rewards == 0).all(1).float().mean().item()
    print0(f"stage 1: mean reward {rewards.mean():.3f}, mean V* {values.mean():.3f}, "
           f"{unsolved:.1%} of the prompts never rewarded")
    if unsolved == 1:
        cut_off = all_reduce(batch.truncated.mean()).item() / world_size
        fail(f"every reward of stage 1 is zero, {cut_off:.0%} of the responses were cut off: give more --warmup_steps, "
             f"raise --max_new_tokens above {max_new_tokens} where many were, or make the task easier "
             f"({parameters_of(run)})")
    features = prompt_features(run, batch.tokens[::N], batch.mask[::N])
    set_learning_rates(run, 1 - (run.step - warmup_steps) / max_steps)
    for _ in range(100):
        head = [unshard(p).detach().requires_grad_() for p in run.model.value_head.parameters()]
        predicted = F.linear(features, *head).squeeze(1) # (prompts of this rank,)
        loss = run.scaler.scale(value_loss(predicted, local_rewards, beta1))
        for p, gradient in zip(run.model.value_head.parameters(), torch.autograd.grad(loss, head)):
            p.grad = shard(all_reduce(gradient) / world_size, p)
        optimizer_step(run)
    run.stage1_values = values.tolist()


def prompt_features(run, tokens, mask):
    """Return what the value head reads of each prompt: the policy's last hidden state at its end,
    (B, d_model)."""
    ends = mask.int().argmax(1) - 1 # of the prompts, (B,)
    prompts = tokens[:, :int(ends.max()) + 1]
    count = max(1, micro_batch_tokens // prompts.size(1)) # rows at a time
    with torch.no_grad(), on_device(run.rollout_model): # it has the policy's weights
        return torch.cat([run.rollout_model.trunk(part)[range(len(part)), at]
                          for part, at in zip(prompts.split(count), ends.split(count))]).float()


def predicted_values(run, batch):
    """Let the value head predict V* of each prompt, (B,), clamped to the range of rewards: above 1
    it would push even right answers away."""
    head = [unshard(p.detach()) for p in run.model.value_head.parameters()]
    return F.linear(prompt_features(run, batch.tokens, batch.mask), *head).squeeze(1).clamp(0, 1)


def policy_step(run):
    """
    Take one step of A*PO, or of an algorithm to compare it with: rollout, reference, loss,
    backward, clip, optimizer step. This is all of stage 2. Returns the step's metrics.
    """
    problems, stored_values = stage2_problems(run)
    batch = rollout(run, respond, problems, TRAIN, share(batch_size).start, temperature)
    started = time.monotonic()
    rewards, total_tokens = batch.reward, all_reduce(batch.mask.sum())
    pieces = pieces_of(run.model, batch.tokens, batch.mask) # micro-batches
    mean_length = total_tokens / batch_size # of a response

    # The reference, and the warmed-up base, which is another model once the reference was
    # refreshed.
    with torch.no_grad(), on_device(run.reference), on_device(run.base):
        ref_logprobs = score(run.reference, pieces, rewards) # (B,)
        base_logprobs = ref_logprobs if run.base is run.reference else score(run.base, pieces, rewards)
    batch.seconds['reference'] = time.monotonic() - started

    if run.other: # another algorithm has its advantages in the place of r - V*
        advantages, values = other_advantages(run, rewards), torch.zeros_like(rewards) # (B,)
    else:
        values = predicted_values(run, batch) if stored_values is None else stored_values # V*, (B,)
    shift = all_reduce((rewards - values).mean()) / world_size if centre else 0.0
    old_by_sequence = torch.zeros_like(rewards) # (B,), logprobs by the policy before this batch
    old_by_token = [] # those of every token, (b, T) for each piece
    set_learning_rates(run, 1 - (run.step - warmup_steps) / max_steps)
    before = [p.detach().clone() for p in policy_parameters(run)] if max_step_kl else []
    step_kl = 0.0 # not measured where it has no bound
    for update in range(updates_per_batch):
        for i, (rows, tokens, mask) in enumerate(pieces):
            # forward
            by_token, head_values = token_logprobs(run.model, tokens, mask, temperature, dtype)
            by_sequence = sequence_logprobs(by_token, mask) # (b,)
            if update == 0:
                old_by_token.append(by_token.detach())
                old_by_sequence[rows] = by_sequence.detach()
            # loss: a mean over the tokens of all ranks; GSPO's and the value head's over the responses
            weight = len(rows) / len(rewards)
            if run.other:
                loss = run.other.loss(by_token, old_by_token[i], advantages[rows], mask)
                weight = mask.sum() * world_size / total_tokens if run.other.per_token else weight
            else:
                # Divided by the mean length, so per token too: else most gradients would be clipped.
                loss = apo_loss(
                    by_sequence, ref_logprobs[rows], rewards[rows], values[rows] + shift, beta2) / mean_length
                loss = loss + value_loss(head_values, rewards[rows, None], beta1)
            # backward
            run.scaler.scale(loss * weight).backward()
        grad_norm = optimizer_step(run) # clips, steps, clears
        if max_step_kl:
            step_kl = bound_step(run, before, pieces, old_by_token)
    run.step += 1
    batch.seconds['update'] = time.monotonic() - started - batch.seconds['reference']
    return dict(step_metrics(batch, old_by_sequence, ref_logprobs, base_logprobs, values),
                grad_norm=grad_norm, step_kl=step_kl, tokens=int(total_tokens),
                **{f'seconds_{part}': round(batch.seconds[part], 3) for part in PARTS})


def other_advantages(run, rewards):
    """Return this rank's advantages of another algorithm, which sees the rewards of all ranks,
    (B,)."""
    everyones = torch.tensor(gather_lists(rewards.tolist()), device=device)
    advantages = run.other.advantages(everyones.view(-1, responses_per_prompt(run.other)))
    return advantages.flatten()[list(share(batch_size))]


def bound_step(run, before, pieces, old_by_token):
    """
    Measure how far the policy has moved from the one before this batch, whose weights were
    `before`, and go back part of the way where that is more than max_step_kl. Returns the KL before
    going back, in nats a response.

    For small steps it is half the square of the log-ratio, summed over the tokens, and grows with
    the square of the step. A token that became impossible would count for all others: its square is
    replaced by a line.
    """
    moved = torch.zeros((), device=device)
    with torch.no_grad():
        for (_, tokens, mask), old_logprobs in zip(pieces, old_by_token):
            logprobs, _ = token_logprobs(run.model, tokens, mask, temperature, dtype)
            # x²/2 up to 1, then |x| - 1/2; outside the mask both are 0
            moved += F.smooth_l1_loss(logprobs, old_logprobs, reduction='sum')
        step_kl = all_reduce(moved).item() / batch_size
        if step_kl > max_step_kl:
            for p, old_weight in zip(policy_parameters(run), before):
                p.lerp_(old_weight, 1 - math.sqrt(max_step_kl / step_kl))
    return step_kl


def stage2_problems(run):
    """Return this rank's problems of the current step, and their V* from stage 1, or None where the
    value head gives it."""
    step = run.step - warmup_steps
    if algorithm == 'apo' and not fresh_prompts:
        # The prompts of stage 1, each once in an epoch, in an order that depends on the epoch.
        places = [divmod(step * batch_size + i, num_train_samples) for i in share(batch_size)]
        orders = {epoch: np.random.default_rng((seed, TRAIN, epoch)).permutation(num_train_samples)
                  for epoch, _ in places}
        chosen = [int(orders[epoch][place]) for epoch, place in places]
        drawn = run.task.training_problems((seed, STAGE1, 0), chosen)
        return [problem for problem, _ in drawn], torch.tensor([run.stage1_values[i] for i in chosen], device=device)
    groups = responses_per_prompt(run.other) # every prompt as often in a row
    drawn = run.task.training_problems((seed, TRAIN, step), share(batch_size // groups))
    return [problem for problem, _ in drawn for _ in range(groups)], None


def responses_per_prompt(other):
    """Return how many responses of a batch answer the same prompt."""
    return num_responses_per_prompt if other and other.grouped else 1


def step_metrics(batch, logprobs, ref_logprobs, base_logprobs, values):
    """Average the metrics of a step over the responses of all ranks. logprobs are those of the
    policy that sampled, so kl is an estimate of its KL to the reference, in nats a response."""
    error = residual(logprobs, ref_logprobs, batch.reward, values, beta2) # before V* is shifted
    columns = dict(
        reward=batch.reward, accuracy=batch.correct, formatted=batch.formatted,
        truncated=batch.truncated, length=batch.length, kl=logprobs - ref_logprobs,
        base_kl=logprobs - base_logprobs, entropy=-logprobs / batch.length, value=values,
        value_zero=(values < 1e-6).float(), residual=error)
    means = all_reduce(torch.stack(list(columns.values())).mean(1) / world_size).tolist()
    return dict(zip(columns, means), residual_std=float(np.std(gather_lists(error.tolist()))))


def score(model, pieces, like):
    """Return the log-probabilities of whole responses under a model, (B,) like the tensor given."""
    logprobs = torch.zeros_like(like)
    for rows, tokens, mask in pieces:
        by_token, _ = token_logprobs(model, tokens, mask, temperature, dtype)
        logprobs[rows] = sequence_logprobs(by_token, mask)
    return logprobs


def pieces_of(model, tokens, mask):
    """Cut a batch into micro-batches, (rows, tokens, mask) each. Every rank gets equally many, or
    FSDP would hang."""
    packed = packs(model, tokens)
    pieces = micro_batches(mask, micro_batch_tokens, packed=packed)
    most = max(gather_lists([len(pieces)]))
    if len(pieces) < most:
        pieces = micro_batches(mask, micro_batch_tokens, most, packed)
    return [(rows, *trim(tokens[rows], mask[rows])) for rows in pieces]


def rollout(run, function, problems, stream, first, at_temperature, repeat=1):
    """Let the policy, which in stage 1 is still the reference, answer this rank's problems: call
    sample.respond, or sample.evaluate; `first` is the index of the first response in the batch of
    all ranks. Sampling takes longest, so a signal to stop interrupts it."""
    copy_weights(run.model, run.rollout_model)
    result, name = [], {STAGE1: 'stage 1', TRAIN: 'stage 2', EVAL: 'evaluation'}[stream]
    with contextlib.suppress(KeyboardInterrupt), on_device(run.rollout_model):
        if problems: # there may be more ranks than held-out problems
            result = function(
                run.rollout_model, run.task, run.tokenizer, problems, (seed, stream, run.step), repeat,
                first=first, max_new_tokens=max_new_tokens, temperature=at_temperature, rollout_rows=rollout_rows,
                stop=lambda: run.stopping, progress=lambda line: print0(f'{name}: {line}'))
    leave_if_asked(run)
    return result


def answers(run, problems, at_temperature, repeat=1):
    """Let the ranks share these problems. Returns the graded responses of all of them, as
    sample.evaluate."""
    mine = share(len(problems))
    rows = rollout(run, evaluate, [problems[i] for i in mine], EVAL, mine.start * repeat, at_temperature, repeat)
    return gather_lists(rows)


def look(run):
    """Let pretrained weights answer eight problems before hours are spent on them, show two of
    the responses, and say what the run will need."""
    started = time.monotonic()
    problems = [problem for problem, _ in run.task.training_problems((seed, EVAL, 0), range(8))]
    rows = answers(run, problems, temperature)
    minutes = (time.monotonic() - started) / 60
    result, params = summarize(rows), run.model.num_params()
    for problem, row in zip(problems[:2], rows):
        question, response = run.task.question(problem)[:200], row['response'][:400]
        print0(f"asked {question!r}, the model responds {response!r}")
    print0(f"of 8 responses {result['formatted']:.0%} have the format, {result['accuracy']:.0%} are right, "
           f"{result['truncated']:.0%} are cut off at {max_new_tokens} tokens; they took {minutes:.1f} min, "
           f"and a step samples {batch_size}")
    width = 4 if dtype == 'float32' else 2 # bytes of a number in the copies that compute
    memory = 16 + 4 * (max_step_kl > 0) + 2 * width # weight, gradient, AdamW's two; before the step; two copies
    print0(f"weights, gradients, optimizer and copies need {memory * params / 1e9:.1f} GB of memory, "
           f"each checkpoint {(12 + width) * params / 1e9:.1f} GB of disk")
    if not result['formatted']:
        print0(f"hint: nothing has the format: raise --num_examples={num_examples} (a task without demonstrations "
               "has none) or --max_new_tokens, or change FORMS in tasks.py")
    elif not result['reward']:
        print0(f"hint: nothing is right: make the task easier ({parameters_of(run)}), or give some "
               "--warmup_steps")


def log_evaluation(run, when, one_in=1):
    """Evaluate one in so many of num_eval_samples at eval_temperature: responses to as many
    different held-out problems, or several to each where there are fewer, but to at least 60. Print
    the result, record it with eight of the responses, draw the curves. Returns the summary."""
    seconds = round(run.seconds, 1)
    problems = held_out_problems(run.task, num_eval_samples)
    problems = problems[::min(one_in, max(1, len(problems) // 60))]
    repeat = max(1, num_eval_samples // one_in // len(problems))
    rows = answers(run, problems, eval_temperature, repeat)
    result = summarize(rows)
    print0(f'held-out {when}: {described(result)}')
    if run.last_evaluation != (run.step, len(rows)): # a finished run that is resumed has it in its logs
        record(run, LOGS[0], dict(step=run.step, seconds=seconds, phase='evaluation', **result))
        for row in rows[::repeat][:8]:
            record(run, LOGS[1], dict(step=run.step, **row))
    run.last_evaluation = run.step, len(rows)
    if run.step >= warmup_steps: # each of these evaluations leaves a checkpoint
        run.best = max(run.best, (result['accuracy'], run.step))
    try:
        if rank == 0:
            plot_runs([out_dir], os.path.join(out_dir, 'curves.png'))
    except Exception as error: # a picture must not end a run
        print0(f"no curves.png: {' '.join(str(error).split())[:120]}")
    return result


# --------------------------------------------------------------------------------------------------
# Model, optimizer, ranks

def build(settings, checkpoint):
    """Return the Run to start from: fresh weights, those of a checkpoint, or all of a checkpoint's
    state when resuming."""
    puzzles = make_task(task, settings)
    state = checkpoint['tokenizer'] if checkpoint else puzzles.tokens
    pretrained = isinstance(state, dict)
    if not hasattr(puzzles, 'demonstration') and (warmup_steps or not pretrained):
        fail(f"--task={task} has no demonstrations: it needs pretrained weights and no --warmup_steps")
    if state is None:
        fail(f"--task={task} has no `tokens`: give its class some, or start from pretrained weights by --init_from")
    tokenizer = make_tokenizer(state, puzzles, init_from if checkpoint else f'--task={task}', num_examples)
    with one_line(f'--task={task} with these settings'):
        # Within a thousand positions the slow features of the usual rope_theta, 10,000, would
        # hardly turn.
        config = checkpoint['config'] if checkpoint else ModelConfig(
            len(tokenizer.tokens), **{name: settings[name] for name in MODEL}, rope_theta=1e3, qk_norm=True)
        try_problems(puzzles, tokenizer, config)
    # Sharded before it has memory and filled tensor by tensor, so that a large model is never whole
    # where it trains.
    model = Transformer.without_memory(config)
    if world_size > 1 or cpu_offload:
        shard_blocks(model)
    model.allocate('cpu' if cpu_offload else device, device)
    with torch.no_grad(), one_line(init_from):
        for p, whole in initial_weights(model, checkpoint, tokenizer):
            p.copy_(shard(whole, p))
    model.recompute = activation_checkpointing
    # Where a forward is sharded, recomputed or compiled, all ranks and passes must take one way.
    model.share_prefix = not (world_size > 1 or cpu_offload or activation_checkpointing or compile)
    model.pack = not compile # which would compile anew for each set of lengths
    scaler = torch.amp.GradScaler(device, growth_interval=500, enabled=dtype == 'float16')
    optimizers = make_optimizers(model, warmup_learning_rate, warmup_muon_learning_rate)
    run = Run(settings, puzzles, tokenizer, model, frozen_copy(model), scaler, optimizers,
              other=find_algorithm(algorithm))
    if compile:
        with one_line('--compile=True, which needs a C++ compiler such as g++'):
            torch.compile(torch.sin)(torch.ones(2, device=device))
        model.compile(dynamic=True)
    if init_from == 'resume':
        restore(run, checkpoint)
    return run


def try_problems(puzzles, tokenizer, config):
    """Try whether there are problems of both splits, whether the vocabulary and the model can take
    them, and whether the verifier accepts demonstrations; say how many it does. Raises ValueError
    that says what is wrong."""
    used, longest, right, cut = {*tokenizer.ends}, getattr(puzzles, 'longest_prompt', 0), 0, 0
    for i in range(20):
        rng = np.random.default_rng(i)
        problem = puzzles.draw(rng, test=i % 2 == 0)
        prompt = tokenizer.encode(tokenizer.prompt(puzzles, problem))
        text = tokenizer.demonstration(puzzles, problem, rng) if warmup_steps else ''
        written = tokenizer.encode(text)
        read = tokenizer.decode(written) # as the verifier will read what the model writes
        used.update(prompt + written)
        longest = max(longest, len(prompt))
        cut += len(written) >= max_new_tokens # with its end-of-sequence
        puzzles.difficulty(problem)
        # A verifier that does not take every text fails here, not after the warm-up.
        for response in ('', f'{END_THINK}{ANSWER}?{END_ANSWER}', read):
            grade = puzzles.grade(problem, response)
            if not isinstance(grade, Grade) or not 0 <= grade.reward <= 1:
                raise ValueError("`grade` must return a Grade(reward, correct, formatted) with a reward from 0 to 1, "
                                 f"not {grade!r}")
        right += grade.correct
    if warmup_steps and not right:
        lost = f", or the vocabulary, in which {text!r} becomes {read!r}" if read != text else ''
        raise ValueError(f"not one of 20 demonstrations is right: `grade` and `demonstration` do not agree{lost}")
    if config.max_seq_len < longest + max_new_tokens:
        raise ValueError(f"--max_new_tokens={max_new_tokens} and a prompt of {longest} tokens do not fit the "
                         f"{config.max_seq_len} positions of this model")
    if max(used) >= config.vocab_size:
        raise ValueError(f"the tokenizer uses token {max(used)}, {tokenizer.decode([max(used)])!r}, but the model's "
                         f"embedding has {config.vocab_size} rows")
    if warmup_steps and init_from != 'resume':
        print0(f"of 20 demonstrations {right} are right, {cut} are cut off at --max_new_tokens={max_new_tokens}")


def shard_blocks(model):
    """Shard a model over the ranks, block by block. Master weights and gradients are float32; what
    is gathered to compute is in dtype."""
    options = dict(
        mesh=dist.init_device_mesh(torch.device(device).type, (world_size,)),
        mp_policy=MixedPrecisionPolicy(getattr(torch, dtype), torch.float32),
        offload_policy=CPUOffloadPolicy(device != 'cpu') if cpu_offload else OffloadPolicy(),
        reshard_after_forward=True) # bound_step scores, and no backward pass follows
    for part in (*model.blocks, model):
        fully_shard(part, **options)


def initial_weights(model, checkpoint, tokenizer):
    """Return pairs of each parameter and its whole value: pretrained, of a checkpoint, or
    random."""
    if checkpoint:
        return weights_of(checkpoint, model)
    torch.manual_seed(seed)
    fresh = Transformer(model.config)
    if tokenizer.whole_numbers:
        words = enumerate(tokenizer.tokens)
        embed_numbers(fresh, {i: int(word) for i, word in words if word.isdigit()})
    return zip(model.parameters(), fresh.parameters())


def shard(whole, p):
    """Return a copy of a whole tensor as the parameter p is held: on its device, and where the
    model is sharded this rank's part of it. Whatever does not have its shape stays as it is."""
    if not torch.is_tensor(whole) or whole.shape != p.shape:
        return copy.deepcopy(whole)
    if not hasattr(p, 'device_mesh'):
        return whole.to(p.device, copy=True)
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to(p.device)


def unshard(x):
    """Return a tensor of the model or an optimizer as a whole, on the device; every rank must call
    it."""
    return x.to(device).full_tensor() if hasattr(x, 'full_tensor') else x


def gathered(state):
    """Return a state dict with whole tensors on the CPU. Every rank must call it, rank 0 gets it.
    (What torch.distributed has for this takes a step of a fresh optimizer, and then resuming is not
    exact.)"""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if not torch.is_tensor(state): # an optimizer may keep numbers
        return state
    whole = unshard(state.detach())
    return whole.cpu() if rank == 0 else None


def frozen_copy(model, weights=None):
    """Return a whole copy of the policy that never trains, in the precision that computes; or with
    these weights."""
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
def on_device(model):
    """Let a copy that samples or is the reference visit the device, where cpu_offload keeps it on
    the CPU."""
    if cpu_offload:
        model.to(device)
    yield
    if cpu_offload:
        model.to('cpu')


def make_optimizers(model, rate, muon_rate=0.0, eps=1e-8):
    """Make AdamW on float32 master weights, and in the warm-up Muon for the matrices of the blocks.
    The value head is a small regression beside the policy, with a learning rate of its own."""
    policy, value_head, matrices = [], [], []
    for name, p in model.named_parameters():
        in_block = muon_rate and p.dim() == 2 and 'blocks' in name
        group = value_head if name.startswith('value_head') else matrices if in_block else policy
        group.append(p)
    groups = [dict(params=policy, rate=rate, eps=eps), dict(params=value_head, rate=value_learning_rate)]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]
    if muon_rate:
        optimizers += [Muon([dict(params=matrices, rate=muon_rate)], dict(lr=0.0, momentum=0.9))]
    return optimizers


class Muon(torch.optim.Optimizer):
    """
    Momentum whose update is made orthogonal by five Newton-Schulz iterations (Keller Jordan, 2024),
    so that every direction of a matrix learns equally fast. torch.optim.Muon is the same in
    bfloat16, for which a CPU without AVX-512 takes 12 times as long.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if not self.state[p]:
                    self.state[p]['average'] = torch.zeros_like(p)
                average = self.state[p]['average']
                average.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(average, group['momentum']) # Nesterov
                update = orthogonalize(unshard(update)) # a shard is no matrix
                update = update * max(1, p.size(0) / p.size(1)) ** 0.5
                p.add_(shard(update, p), alpha=-group['lr'])


def orthogonalize(x, steps=5):
    """Return about the nearest matrix with singular values of 1 (0.7 to 1.2 is good enough), by
    Newton-Schulz."""
    wide = x if x.size(0) <= x.size(1) else x.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.size(0) <= x.size(1) else wide.T


def set_learning_rates(run, factor):
    """Set every learning rate to `factor` of its setting."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['rate'] * factor


def optimizer_step(run):
    """Clip, step, clear. Returns the norm of the policy's gradient before clipping. A gradient that
    is not finite changes nothing, and 0 is returned: in float16 the next loss is scaled by less, and
    where that is not the cause the run ends with one line."""
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    # The value head by itself, or its gradient, large and noisy, would shrink the policy's.
    norm, head_norm = (unshard(torch.nn.utils.clip_grad_norm_(part, grad_clip)).item()
                       for part in (policy_parameters(run), run.model.value_head.parameters()))
    finite = math.isfinite(norm + head_norm)
    if not finite and run.scaler.get_scale() <= 1:
        fail(f"the gradient of step {run.step + 1} is not finite: lower --learning_rate or "
             f"--value_learning_rate (in the warm-up --warmup_learning_rate and --warmup_muon_learning_rate); "
             f"what {out_dir} holds is good")
    if finite:
        for optimizer in run.optimizers:
            run.scaler.step(optimizer)
    run.scaler.update()
    run.model.zero_grad()
    return norm if finite else 0.0


def policy_parameters(run):
    """Return all parameters but the value head's."""
    return [p for name, p in run.model.named_parameters() if not name.startswith('value_head')]


def share(count):
    """Return this rank's share of `count` things, as a range of their indices."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def all_reduce(x):
    """Return the sum over the ranks of a tensor or number, as a tensor."""
    x = torch.as_tensor(x, device=device).clone()
    if world_size > 1:
        dist.all_reduce(x)
    return x


def gather_lists(rows):
    """Return one list of what every rank has, in the order of the ranks."""
    if world_size == 1:
        return rows
    lists = [None] * world_size
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


# --------------------------------------------------------------------------------------------------
# Settings

def configure(argv):
    """Settle every setting and write them to this module, once: the block on top < the task's
    defaults < what fits the machine, pretrained weights or the checkpoint to start from < one that
    is resumed < the command line. Returns all of them, those of the task's class included, and the
    checkpoint to start from."""
    read_cluster()
    # Names and paths come first: the task decides which other settings there are.
    given, words = read_arguments(argv, {name: SETTINGS[name] for name in PATHS})
    paths = {name: os.path.expanduser(given.get(name, SETTINGS[name])) for name in PATHS}
    if {'--help', '-h'} & {*words}:
        print_help(paths['task'])
    if '' in paths.values():
        fail(f"{', '.join(f'--{name}' for name in PATHS)} must not be empty")
    if 'out_dir' not in given:
        paths['out_dir'] = f"out/{os.path.basename(paths['task']).removesuffix('.py')}"
    checkpoint = open_start(paths['init_from'], paths['out_dir'])
    resuming = paths['init_from'] == 'resume'
    if resuming:
        for name in ('task', 'algorithm'):
            stored = checkpoint['settings'][name]
            paths[name] = trusted(paths['out_dir'], stored, paths[name] if name in given else '', f'--{name}')
    kind = task_class(paths['task'])
    defaults = SETTINGS | parameters(kind)
    for setting in SETTINGS.keys() & parameters(kind).keys():
        fail(f"--task={paths['task']} takes {setting}, which is a setting of train.py: give its parameter another name")
    given, left_over = read_arguments(argv, defaults)
    if left_over:
        refuse(left_over[0], defaults, paths['task'])
    given |= paths

    stored = checkpoint['settings'] if checkpoint else {}
    pretrained = bool(checkpoint) and isinstance(checkpoint['tokenizer'], dict) # here or for an earlier run
    if 'num_examples' in given and not pretrained:
        fail("--num_examples is for pretrained weights: other models are not asked in words")
    device = pick_device(given.get('device', stored['device'] if resuming else 'auto'))
    fits = stored if resuming else what_fits(kind, device, checkpoint, paths['task'])
    settings = defaults | fits | given | dict(device=device)
    if settings['dtype'] == 'auto':
        settings['dtype'] = pick_dtype(device)
    globals().update({setting: settings[setting] for setting in SETTINGS})
    check_settings(settings, checkpoint, kind)
    if resuming:
        settings['init_from'] = stored['init_from'] # what the run began with
    join_ranks()
    print0(f"task {task}, {out_dir=}, {device=}, {dtype=}, {torch.get_num_threads()} threads, "
           f"{world_size} rank(s), torch {torch.__version__}")
    chosen = [f'{setting}={value}' for setting, value in fits.items() if setting not in given]
    if chosen and not resuming:
        print0('taken from the task, the machine or --init_from:', ', '.join(chosen))
    if not resuming and not same_task(stored.get('task', task), task):
        print0(f"note: {init_from} was trained on {stored['task']}, and this run trains {task}")
    elif not resuming and stored.get('fold', fold) != fold:
        print0(f"note: {init_from} was trained with fold={stored['fold']}: it has seen problems that are held out now")
    return settings, checkpoint


def what_fits(kind, device, checkpoint=None, name=''):
    """Return the settings that suit a task's class on a device, and the checkpoint to start from,
    which gives its task's parameters where that is the task of this name."""
    on_gpu = device.startswith('cuda') # a Mac's GPU is taken for a laptop's
    fits = kind.defaults | (GPU if on_gpu else {})
    if not checkpoint:
        return fits
    if isinstance(checkpoint['tokenizer'], dict): # pretrained weights
        fits |= PRETRAINED if on_gpu else LAPTOP
        if 'num_eval_samples' in kind.defaults: # the task knows how fast it draws problems
            fits['num_eval_samples'] = kind.defaults['num_eval_samples']
    kept = [*(parameters(kind) if same_task(checkpoint['task'], name) else ()), 'fold', 'num_examples']
    fits |= {setting: checkpoint['settings'][setting] for setting in kept if setting in checkpoint['settings']}
    fits |= {setting: getattr(checkpoint['config'], setting) for setting in MODEL}
    return fits | dict(warmup_steps=0)


def print_help(task_name):
    """Print the settings with their comments, as they stand in this file and in the tasks' classes,
    but with the values of this task's default run on this machine, and leave."""
    kind = task_class(task_name)
    values = SETTINGS | dict(task=task_name) | what_fits(kind, pick_device('auto'))
    with open(__file__, encoding='utf-8') as file:
        block = file.read().partition('# ---- settings')[2].partition('\n')[2].partition('# ---- end')[0]
    print(__doc__ + re.sub('(?m)^([a-z].*?) = .+? #', lambda line: f'{line[1]} = {values[line[1]]!r} #', block))
    for its_class in dict.fromkeys([kind, *TASKS.values()]):
        print(f'# {its_class.__name__}', f'# defaults: {its_class.defaults}', sep='\n')
        source = inspect.getsource(its_class.__init__) if parameters(its_class) else ''
        print(*[f'{name} = {value} # {comment}' for name, value, comment in re.findall(r'(\w+)=(.+?), # (.+)', source)],
              sep='\n')
    sys.exit()


def check_settings(settings, checkpoint, kind):
    """End with one line for settings that cannot work."""
    for name in kind.defaults.keys() - SETTINGS.keys():
        refuse(f'--{name}', SETTINGS, settings['task'])
    for name in kind.defaults.keys() & {*PATHS, 'device'}:
        fail(f"the defaults of --task={settings['task']} name {name}, which only the command line can choose")
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            fail(f"--{name} must be {' or '.join(map(str, choices))}, not {settings[name]!r}")
    for name, default in SETTINGS.items():
        if type(default) not in (int, float):
            continue
        value, least = settings[name], LEAST.get(name)
        if not isinstance(value, (int, type(default))): # a task's class may say so
            fail(f"--{name} must be {type(default).__name__}, not {value!r}")
        enough = value > 0 if least is None else value >= least
        if not enough or value >= 2 ** 31:
            bound = 'above 0' if least is None else f'at least {least}'
            fail(f"--{name} must be {bound} and below 2^31, not {value}")
    for name in MODEL if checkpoint else ():
        has = getattr(checkpoint['config'], name)
        if settings[name] != has:
            fail(f"--{name}={settings[name]} does not fit the checkpoint's model, which has {has}")
    other = find_algorithm(settings['algorithm'])
    units = dict(batch_size=world_size * responses_per_prompt(other))
    if settings['warmup_steps']:
        units |= dict(warmup_batch_size=world_size)
    if other is None:
        units |= dict(num_train_samples=world_size)
    for name, unit in units.items():
        if settings[name] % unit:
            fail(f"--{name}={settings[name]} must be a multiple of {unit} (ranks, x responses per prompt in a group)")
    if other:
        with one_line(f"--algorithm={settings['algorithm']}"):
            try_algorithm(other)


def read_cluster():
    """Read which rank this is among how many, as torchrun and clusters say it. One line and exit
    when they say half."""
    global rank, world_size
    names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
    given = {name: os.environ[name] for name in names if os.environ.get(name)} # empty is absent
    with one_line(f"the cluster's variables {given}", ValueError):
        rank, world_size = int(given.get('RANK', 0)), int(given.get('WORLD_SIZE', 1))
    if rank >= world_size or world_size > 1 and len(given) < len(names):
        fail(f"of the variables {', '.join(names)} only {given} are set: start with torchrun, or unset them")


def join_ranks():
    """Join the other ranks, and set the device up for this one."""
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    if device == 'cpu' and platform.libc_ver()[0] == 'glibc':
        # Keep freed memory for the next tensor instead of giving it back: a fifth faster
        # (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
        for parameter, value in ((-3, 2 ** 25), (-1, 2 ** 31 - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
    if world_size > 1 or cpu_offload: # FSDP offloads to the CPU, on one rank too
        alone = {} if world_size > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo', **alone)


def leave_ranks():
    """End in step with the other ranks."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if world_size > 1 and tracker == 'none': # in Python's own end gloo's threads now and then abort
            os._exit(0)


# --------------------------------------------------------------------------------------------------
# Checkpoints

def open_start(start, folder):
    """Return the checkpoint, or what is needed of pretrained weights, that a run in this folder
    starts from; None from scratch. One line and exit when there is none."""
    if start == 'scratch':
        return None
    if start != 'resume':
        return open_model(find_checkpoint(start))
    if not checkpoints(folder):
        fail(f"nothing to resume: {folder} holds no checkpoint; start without --init_from=resume, "
             "with another --out_dir if the folder is there")
    return load_checkpoint(checkpoints(folder)[-1], needed=('optimizers', 'seconds', *PLAIN))


def find_algorithm(name):
    """Return the Algorithm of that name, None for A*PO, or that of a file: its `loss`, and in the
    place of what else it does not define, `advantages`, `grouped` and `per_token`, REINFORCE's."""
    if name == 'apo' or name in ALGORITHMS:
        return ALGORITHMS.get(name)
    if not name.endswith('.py'):
        fail(f"--algorithm must be {', '.join(['apo', *ALGORITHMS])} or a file that ends in .py, not {name!r}")
    with one_line(f'--algorithm={name}'):
        defined = run_file(os.path.expanduser(name), 'algorithm_file')
        if not callable(defined.get('loss')):
            raise ValueError('it defines no function `loss`')
        own = {part: defined[part] for part in Algorithm._fields if part in defined}
        return ALGORITHMS['reinforce']._replace(**own)


def try_algorithm(other):
    """Try another algorithm on a batch, so that a mistake in a file of one's own shows before the
    warm-up. Raises ValueError, or what the file raises."""
    rewards = (torch.arange(batch_size, device=device) % 2).float().view(-1, responses_per_prompt(other))
    logprobs = torch.zeros(batch_size, 3, device=device, requires_grad=True)
    advantages = torch.as_tensor(other.advantages(rewards))
    loss = other.loss(logprobs, logprobs.detach(), advantages.flatten(), torch.ones_like(logprobs, dtype=torch.bool))
    if advantages.shape != rewards.shape or not torch.is_tensor(loss) or loss.dim() or not loss.requires_grad:
        raise ValueError('`advantages` must return as many numbers as rewards, and `loss` one, with a gradient')


def claim(folder):
    """Lock a run's folder until this process ends, however it ends. Returns the lock. One line and
    exit when another process has it, or when it holds a run that would be overwritten."""
    lock = None
    if rank == 0:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, '.lock'), 'w')
        try:
            import fcntl # Windows has none
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is writing into {folder}: wait until it ends, or use another --out_dir")
        except (ModuleNotFoundError, OSError): # some file systems have no locks
            pass
    # Every rank looks, so that none waits for one that has left.
    if init_from != 'resume' and (glob.glob('*.pt', root_dir=folder) or os.path.exists(os.path.join(folder, LOGS[0]))):
        fail(f"{folder} already holds a run: use another --out_dir, or --init_from=resume where a checkpoint was saved")
    return lock


def save_checkpoint(run, final=False):
    """Write all of the run's state, or for the final model what sampling needs, to a temporary
    file, flush it, rename it: a checkpoint is whole or not there. Every rank takes part, because
    weights are gathered; rank 0 writes."""
    checkpoint = dict(format=FORMAT, task=task, step=run.step, tokenizer=run.tokenizer.state,
                      settings=run.settings | dict(device=device.partition(':')[0]),
                      config=dataclasses.asdict(run.model.config), model=gathered(dict(run.model.named_parameters())))
    if not final:
        checkpoint |= {name: getattr(run, name) for name in PLAIN} | dict(
            optimizers=[gathered(optimizer.state_dict()['state']) for optimizer in run.optimizers],
            scaler=run.scaler.state_dict(), seconds=run.seconds,
            reference=None if run.reference is None else run.reference.state_dict(),
            base=None if run.base is run.reference else run.base.state_dict())
    if rank:
        return
    path = os.path.join(out_dir, 'tinyzero_astarpo_final.pt' if final else f'checkpoint_step_{run.step}.pt')
    logs = [os.path.join(out_dir, name) for name in LOGS]
    checkpoint['logged'] = [os.path.getsize(log) if os.path.exists(log) else 0 for log in logs]
    temporary = os.path.join(out_dir, '.checkpoint.tmp') # one that was killed here is overwritten
    with open(temporary, 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    saved = checkpoints(out_dir)
    if keep_checkpoints and not final:
        for old in saved[:saved.index(path) + 1][:-keep_checkpoints]:
            if not old.endswith(f'_{run.best[1]}.pt'):
                os.remove(old)


def restore(run, checkpoint):
    """Put a checkpoint's state into a run whose model already has the checkpoint's weights."""
    warm = checkpoint['reference'] is None # still in the warm-up
    # These settings have taken effect already.
    settled = ['task', 'dtype', 'seed', 'fold', 'num_examples', *parameters(type(run.task))]
    if not warm:
        settled += ['algorithm', *(name for name in SETTINGS if name.startswith('warmup_'))]
    elif (warmup_muon_learning_rate > 0) != (len(checkpoint['optimizers']) == 2): # whether there is Muon
        settled += ['warmup_muon_learning_rate']
    if checkpoint['stage1_values'] is not None:
        settled += ['num_train_samples', 'num_responses_per_prompt', 'beta1']
    for name in settled:
        now, before = run.settings[name], checkpoint['settings'].get(name, run.settings[name])
        same = os.path.basename if name in PATHS else str # the file of a task may have moved
        if same(now) != same(before):
            fail(f"--{name}={now} comes too late: this run has {name}={before}")
    name, taken = ('warmup_steps', checkpoint['step']) if warm else ('max_steps', checkpoint['step'] - warmup_steps)
    if run.settings[name] < taken:
        fail(f"--{name}={run.settings[name]} comes too late: this run has taken {taken} steps")
    for name in PLAIN:
        setattr(run, name, checkpoint[name])
    run.started -= checkpoint['seconds']
    if not warm:
        run.reference = frozen_copy(run.model, checkpoint['reference'])
        run.base = frozen_copy(run.model, checkpoint['base']) if checkpoint['base'] else run.reference
        run.optimizers = make_optimizers(run.model, learning_rate, eps=adam_eps)
    for optimizer, state in zip(run.optimizers, checkpoint['optimizers']):
        params = [p for group in optimizer.param_groups for p in group['params']]
        for i, entries in state.items(): # set one by one, so that no rank holds them whole
            optimizer.state[params[i]] = {name: shard(value, params[i]) for name, value in entries.items()}
    run.scaler.load_state_dict(checkpoint['scaler'])
    for name, size in zip(LOGS, checkpoint['logged'] if rank == 0 else []):
        with open(os.path.join(out_dir, name), 'a') as log:
            if log.tell() < size: # its end was lost: what is left of a line is no row
                log.write('\n')
            log.truncate(min(size, log.tell())) # what came later is logged again
    print0(f"resuming at step {run.step}")


def checkpoint_if_due(run):
    """Save every checkpoint_interval steps, and save and leave when a signal asked for that."""
    leave_if_asked(run)
    if run.step % checkpoint_interval == 0:
        save_checkpoint(run)


# --------------------------------------------------------------------------------------------------
# Signals and records

def catch_signals(run):
    """Let Ctrl-C, a terminal that closes, and what clusters send before they end a job save the run
    and leave. A signal that is ignored, as under nohup, stays ignored; the same one a second time
    ends the run at once."""
    def request_stop(number, frame):
        run.stopping = True
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError): # print is not safe here
            os.write(1, b'stopping after this step ...\n' if rank == 0 else b'')
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'):
        number = getattr(signal, name, None) # Windows has two of them
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request_stop)


def leave_if_asked(run):
    """Save the finished steps and end when a signal asked any rank to stop."""
    if not all_reduce(int(run.stopping)): # every rank must come to the same decision
        return
    save_checkpoint(run)
    all_reduce(0).item() # rank 0 has written: torchrun may kill it when the others leave
    fail(f"stopped by a signal at step {run.step}; continue with --init_from=resume "
         f"--out_dir={shlex.quote(out_dir)}{files_of_code(task=task, algorithm=algorithm)}")


def files_of_code(**files):
    """Return the arguments by which a command finds this run's task or algorithm, where that is a
    file."""
    return ''.join(f' --{name}={shlex.quote(file)}' for name, file in files.items() if file.endswith('.py'))


def report(run, phase, metrics, every=1):
    """Record the metrics of a step, and print one line to read, with the time left."""
    record(run, LOGS[0], dict(step=run.step, seconds=round(run.seconds, 2), phase=phase, **metrics))
    first, last = (0, warmup_steps) if phase == 'warm-up' else (warmup_steps, warmup_steps + max_steps)
    seconds = sum(value for name, value in metrics.items() if name.startswith('seconds_'))
    if run.began[0] < first: # a new phase: what came before, stage 1 too, counts for nothing
        run.began = run.step - 1, run.seconds - seconds
    pace = (run.seconds - run.began[1]) / (run.step - run.began[0]) # with the evaluations in between
    if (run.step - first) % every == 0 or run.step in (first + 1, last):
        shown = dict(loss=3) if phase == 'warm-up' else dict(reward=3, accuracy=3, kl=2, length=0, truncated=2)
        print0(f"{phase} {run.step - first}/{last - first}",
               *[f'{name} {metrics[name]:.{digits}f}' for name, digits in shown.items()],
               f"{metrics['tokens'] / max(seconds, 1e-3):,.0f} tokens/s  {run.seconds / 60:.1f} min, "
               f"{pace * (last - run.step) / 60:.1f} min left", sep='  ')
    if phase != 'warm-up':
        hint(run, metrics)


def hint(run, metrics):
    """Say once, when the metrics show that something goes wrong, what it is and which setting mends
    it."""
    run.rewards.append(metrics['reward'])
    steps, of_ten = len(run.rewards), np.convolve(run.rewards, np.full(10, 0.1), 'valid') # running means
    start, now = np.mean(run.rewards[:5]), np.mean(run.rewards[-5:])
    prompts = batch_size / responses_per_prompt(run.other)
    fall = max(0.05, prompts ** -0.5) # chance alone makes a mean of ten fall by less
    if steps >= 5 and not any(run.rewards):
        advise(run, "every reward so far is zero: give more --warmup_steps, or make the task easier "
                    f"({parameters_of(run)})")
    if metrics['truncated'] > 0.5:
        advise(run, f"most responses are cut off: raise --max_new_tokens above {max_new_tokens}, or lower the "
                    "learning rate")
    if metrics['base_kl'] > 5 or steps >= 10 and of_ten[-1] < max(of_ten) - fall:
        advise(run, f"the policy has left its bounds, 5 nats of KL to the base or a fall of the reward by {fall:.2f}: "
                    f"give --max_step_kl={max_step_kl / 4 or 0.005:g}; the checkpoint of the best evaluation is kept")
    elif run.began[0] == warmup_steps and steps >= 25 and 0 < now < min(0.9, start + 0.02): # no resumed run
        bounded = 0 < max_step_kl < metrics['step_kl']
        advise(run, f"the reward is flat: raise --batch_size above {batch_size}, or " + (
            f"--max_step_kl above {max_step_kl}" if bounded else f"--learning_rate above {learning_rate}"))


def advise(run, advice):
    """Print a hint, unless it was given before."""
    if advice not in run.hints:
        run.hints.append(advice)
        print0(f"hint: {advice} (README, Why is my reward flat?)")


def parameters_of(run):
    """Return, for a message, the settings of this run's task."""
    own = ', '.join(f'--{name}={run.settings[name]}' for name in parameters(type(run.task)))
    return f'now {own}' if own else 'it has no settings'


def record(run, name, row):
    """Append one JSON line to a file in out_dir, and send its numbers to the tracker if there is
    one, by rank 0."""
    if rank:
        return
    if run.track and 'phase' in row:
        numbers = {f"{row['phase']}/{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        run.track(numbers, row['step'])
    with open(os.path.join(out_dir, name), 'a') as file:
        file.write(json.dumps(row) + '\n')


def open_tracker(run):
    """Give the run a function that sends numbers, with their step, to wandb, where a run that is
    resumed keeps its id."""
    if rank or tracker == 'none':
        return
    with one_line(f'--tracker={tracker}'):
        import wandb
        session = wandb.init(
            project='tinyzero-astarpo', name=out_dir, config=run.settings, id=run.tracker_id, resume='allow')
        run.track, run.tracker_id = session.log, session.id


def finish(run):
    """Leave the final evaluation, model and summary."""
    minutes = run.seconds / 60
    result = log_evaluation(run, 'at the end')
    save_checkpoint(run)
    save_checkpoint(run, final=True)
    if rank:
        return
    result['accuracy_by_difficulty'], result['average_reward'] = result.pop('by_difficulty'), result.pop('reward')
    rows = read_log(os.path.join(out_dir, LOGS[0]))
    steps = [row for row in rows if 'seconds_rollout' in row]
    evaluations = [[row['step'], row['seconds'], row['accuracy']] for row in rows if row['phase'] == 'evaluation']
    after_warmup = next((accuracy for step, _, accuracy in evaluations if step >= warmup_steps), result['accuracy'])
    git = subprocess.run('git rev-parse HEAD', shell=True, cwd=os.path.dirname(os.path.abspath(__file__)),
                         capture_output=True, text=True) # through the shell, because there may be no git
    summary = dict(
        task=task, **result, accuracy_after_warmup=after_warmup, parameters=run.model.num_params(),
        steps=run.step, seconds=round(60 * minutes, 1), device=device, ranks=world_size, settings=run.settings,
        **{f'seconds_{part}': round(sum(row[f'seconds_{part}'] for row in steps), 1) for part in PARTS},
        evaluations=evaluations, threads=torch.get_num_threads(), **machine(), git_commit=git.stdout.strip() or None,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
    with open(os.path.join(out_dir, 'results_summary.json'), 'w') as file:
        json.dump(summary, file, indent=2)
    if run.best[0] > result['accuracy'] + 0.03:
        print0(f"the best evaluation was {run.best[0]:.3f}: checkpoint_step_{run.best[1]}.pt is kept")
    print0(f"{minutes:.1f} minutes; accuracy {after_warmup:.3f} after the warm-up, "
           f"{result['accuracy']:.3f} at the end. See {out_dir}; now try: python sample.py "
           f"--checkpoint={shlex.quote(out_dir)}{files_of_code(task=task)}")


def machine():
    """Name the machine, and measure how many GFLOP/s it computes in a matrix multiply, of float32 on
    a CPU and of TF32 on a GPU."""
    x = torch.randn(1024, 1024, device=device)
    seconds = min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=4)) # item waits for a GPU
    cpu = f'{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}'
    name = torch.cuda.get_device_name() if device.startswith('cuda') else cpu
    return dict(machine=name, gflops=round(2 * 1024 ** 3 / seconds / 1e9))


def print0(*words, **options):
    """Print by rank 0; when nobody reads any more, as behind `head` or in a closed terminal, the run
    continues in silence."""
    if rank == 0:
        try:
            print(*words, flush=True, **options)
        except OSError:
            sys.stdout = open(os.devnull, 'w')


if __name__ == '__main__':
    run_script(main, '--micro_batch_tokens, --rollout_rows or the size of the model')
