"""
Seconds of one whole A*PO step (sample, log-probabilities of the reference, update), ours against
TRL's `trl.experimental.a2po` on the same weights, prompts, batch and limit of length, float32, on
this machine's CPU.

    pip install trl==1.16.0                   # brings transformers, datasets, accelerate and safetensors
    python benchmarks/steps.py                # rows 1 to 4 of the table, 5 minutes on two cores; --rows=1 the first
    python benchmarks/steps.py --rows=5       # from smollm2, the folder that examples/smollm2.py makes, 12 minutes

In rows 1 and 2 no response ends before the limit, so that both do the same work: while sampling,
the logit of end-of-sequence is -inf, ours by a hook (see growth.py), theirs by generate's
suppress_tokens. In rows 3 to 5 responses end by themselves. First both must give the same
log-probabilities, rewards and gradient on the same responses.

Included on both sides: sampling, grading, the reference, forward and backward, clipping, AdamW; on
ours also drawing the problems, the value head and all metrics. Not included: stage 1 (TRL is given
some V*), TRL's data loader, logging, saving. Under the table: how many floating-point operations
the matrix multiplies of one of our steps make, and the seconds these take at the rate of a large
one, which no step in float32 can go below, and the share of these and of attention in a profile.
TRL gets the batch in one piece, in row 4 in four (faster than two or eight), no gradient
checkpointing, top_k=0 (None becomes transformers' 50), and the allocator settings of train.py.
Learning rates are 1e-6, so that responses keep their length. The steps come in pairs, theirs and
then ours on the same problems, in one process; the ratio is the median over the pairs, with the
least and the greatest.
"""
import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, top)
import train
from apo import apo_loss, sequence_logprobs
from examples.export import save_pretrained
from growth import never_end
from model import token_logprobs
from sample import TRAIN, respond

os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
try:
    import transformers
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl.experimental.a2po import A2POConfig, A2POTrainer
except ImportError:
    sys.exit('error: this comparison needs a package: pip install trl==1.16.0')

RANDOM_5M = ['--warmup_steps=0', '--d_model=256', '--n_layers=6', '--n_heads=8', '--n_kv_heads=8', '--d_ff=768']
# Task, where the weights come from, prompts, limit of length, whether responses end by themselves,
# and in how many pieces TRL takes the batch.
ROWS = [
    ('countdown', [f'--init_from={top}/assets/countdown_base.pt'], 256, 48, False, 1),
    ('countdown', RANDOM_5M, 256, 64, False, 1),
    ('multiplication', [f'--init_from={top}/assets/multiplication_base.pt'], 256, 96, True, 1),
    ('countdown', [f'--init_from={top}/assets/countdown_base.pt'], 128, 800, True, 4),
    ('multiplication', ['--init_from=smollm2', '--max_factor=40'], 32, 64, True, 1)]


def our_run(task, weights, prompts, limit, ends, folder):
    """Return what train.main has when stage 2 begins."""
    with contextlib.redirect_stdout(sys.stderr): # out of the table
        run = train.build(*train.configure([
            f'--task={task}', *weights, f'--batch_size={prompts}', f'--max_new_tokens={limit}', '--max_steps=1000',
            '--learning_rate=1e-6', '--device=cpu', f'--out_dir={folder}/ours']))
    run.base = run.reference = train.frozen_copy(run.model)
    run.optimizers = train.make_optimizers(run.model, train.learning_rate, eps=train.adam_eps)
    if not ends:
        never_end(run)
    return run


def their_trainer(run, ends, pieces, steps, folder):
    """Return TRL's trainer with our weights and problems. The text that it sees is our token ids
    with spaces between them."""
    settings = run.settings
    save_pretrained(run.model, f'{folder}/model', run.tokenizer.ends)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(f'{folder}/model', dtype=torch.float32)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(run.model.config.vocab_size)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without single_word it would be found within longer numbers, and the prompts would be others.
    eos = transformers.AddedToken(str(run.tokenizer.ends[0]), single_word=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, pad_token=eos,
                                                     padding_side='left')
    problems = [p for step in range(steps) # those that ours will draw
                for p, _ in run.task.training_problems((settings['seed'], TRAIN, step), range(settings['batch_size']))]
    prompt_ids = [run.tokenizer.encode(run.tokenizer.prompt(run.task, p)) for p in problems]
    prompts = [' '.join(map(str, ids)) for ids in prompt_ids]
    if tokenizer(prompts)['input_ids'] != prompt_ids:
        sys.exit('error: the two do not read the same prompts')

    def reward(completions, puzzle, **others): # the text lacks the end-of-sequence: at the limit, there was none
        responses = [list(map(int, text.split())) for text in completions]
        return [0.0 if len(ids) == settings['max_new_tokens'] else
                run.task.grade(problems[i], run.tokenizer.decode(ids)).reward for i, ids in zip(puzzle, responses)]

    config = A2POConfig(
        f'{folder}/theirs', per_device_train_batch_size=settings['batch_size'] // pieces,
        gradient_accumulation_steps=pieces, max_steps=steps, max_completion_length=settings['max_new_tokens'], top_k=0,
        beta1=settings['beta1'], beta2=settings['beta2'], learning_rate=settings['learning_rate'],
        max_grad_norm=settings['grad_clip'], use_cpu=True, bf16=False, gradient_checkpointing=False,
        train_sampling_strategy='sequential', logging_strategy='no', save_strategy='no', report_to='none',
        disable_tqdm=True)
    trainer = A2POTrainer(theirs, reward, config, processing_class=tokenizer, train_dataset=Dataset.from_dict(
        dict(prompt=prompts, puzzle=list(range(len(prompts))))))
    trainer._optimal_values = dict.fromkeys(prompts, 0.5) # in place of stage 1
    trainer.generation_config.suppress_tokens = None if ends else run.tokenizer.ends
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Pairs(transformers.TrainerCallback):
    """Takes the time of TRL's steps, and makes one of ours after each."""

    def __init__(self, run):
        self.run, self.seconds, self.lengths = run, [], []

    def on_step_begin(self, *_, **__):
        self.started = time.time()

    def on_step_end(self, *_, **__):
        middle = time.time()
        self.lengths.append(train.policy_step(self.run)['length'])
        self.seconds.append((middle - self.started, time.time() - middle))


def print_bound(run):
    """Print the least that a step could take: its matrix multiplies at the rate of a large one."""
    x = torch.randn(2048, 2048)
    seconds = []
    for _ in range(10):
        started = time.time()
        x @ x
        seconds.append(time.time() - started)
    rate = 2 * 2048 ** 3 / statistics.median(seconds)
    with FlopCounterMode(display=False) as counter:
        train.policy_step(run)
    with torch.profiler.profile() as profiler:
        train.policy_step(run)
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    share = lambda words: sum(t for name, t in spent.items() if re.search(words, name)) / sum(spent.values())
    flops = counter.get_total_flops()
    print(f'{flops / 1e9:,.0f} GFLOP, {flops / rate:.2f} s at {rate / 1e9:.0f} GFLOP/s; in a profile, '
          f"{share('aten::(add)?mm$'):.0%} matrix multiplies, {share('attention|bmm'):.0%} attention", file=sys.stderr)


def check(run, trainer, rows=32):
    """Compare log-probabilities, rewards and the embedding's gradient on the same responses."""
    settings, key = run.settings, (run.settings['seed'], TRAIN, 0)
    problems = [p for p, _ in run.task.training_problems(key, range(rows))]
    batch = respond(run.rollout_model, run.task, run.tokenizer, problems, key,
                    max_new_tokens=settings['max_new_tokens'], temperature=settings['temperature'])
    tokens, mask = batch.tokens, batch.mask
    ours = sequence_logprobs(token_logprobs(run.model, tokens, mask)[0], mask)
    rewards, values = torch.arange(rows) % 2.0, torch.full((rows,), 0.3)
    apo_loss(ours, ours.detach(), rewards, values, settings['beta2']).backward()

    # Theirs is padded on the left of the prompts and on the right of the responses.
    starts, lengths = mask.int().argmax(1).tolist(), mask.sum(1).tolist()
    left, right = max(starts), max(lengths)
    ids, seen = torch.full((rows, left + right), run.tokenizer.ends[0]), torch.zeros(rows, left + right).long()
    for i, (start, length) in enumerate(zip(starts, lengths)):
        ids[i, left - start:left + length], seen[i, left - start:left + length] = tokens[i, :start + length], 1
    theirs = trainer._get_sequence_logps(trainer.ref_model, ids, seen, right).detach()
    loss = trainer.compute_loss(trainer.model, dict(input_ids=ids, attention_mask=seen, logits_to_keep=right,
                                                    ref_logps=theirs, rewards=rewards, v_star=values))
    (loss / (2 * settings['beta2'])).backward() # the scale of apo_loss
    texts = trainer.processing_class.batch_decode(ids[:, left:], skip_special_tokens=True)
    same = (torch.tensor(trainer.reward_funcs[0](texts, range(rows))) == batch.reward).sum()
    gradient, their_gradient = run.model.embed.weight.grad, trainer.model.get_input_embeddings().weight.grad
    apart = (theirs - ours).abs().max().item(), ((gradient - their_gradient).norm() / gradient.norm()).item()
    print(f'{rows} responses: log-probabilities, {ours.mean():.1f} on average, at most {apart[0]:.1e} apart; gradients '
          f'{apart[1]:.1e} of their norm apart; {same} rewards the same', file=sys.stderr)
    if max(apart) > 1e-3 or same < rows:
        sys.exit('error: the two do not compute the same thing')
    run.model.zero_grad()
    trainer.model.zero_grad()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--rows', default='1,2,3,4', help='of the table')
parser.add_argument('--pairs', type=int, default=5)
args = parser.parse_args()

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
print(f'trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, '
      f'{torch.get_num_threads()} threads')
print('\n| one step of A*PO | parameters | tokens a response | ours, s | TRL, s | ratio: median (least to greatest) |\n'
      '|---|---|---|---|---|---|', flush=True)
for row in args.rows.split(','):
    task, weights, prompts, limit, ends, pieces = ROWS[int(row) - 1]
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(task, weights, prompts, limit, ends, folder)
        trainer, pairs = their_trainer(run, ends, pieces, args.pairs + 1, folder), Pairs(run)
        check(run, trainer)
        trainer.add_callback(pairs)
        trainer.train()
    seconds = pairs.seconds[1:] # the first warms up
    ratios = sorted(theirs / ours for theirs, ours in seconds)
    theirs, ours = (statistics.median(column) for column in zip(*seconds))
    print(f'| {task}, {prompts} prompts, {"at most " if ends else ""}{limit} tokens | '
          f'{run.model.num_params() / 1e6:.1f} M | {statistics.mean(pairs.lengths):.0f} | {ours:.2f} | {theirs:.2f} | '
          f'{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) |', flush=True)
    print_bound(run)
