"""
The tasks of the reasoning-gym package (pip install reasoning-gym), for pretrained weights: there are no demonstrations.

    python train.py --task=examples/reasoning_gym.py --dataset=chain_sum --init_from=Qwen/Qwen2.5-0.5B

Some of the package's scorers run an answer as Python code, and some compute for ever over a few characters (1e99999999
as a fraction). So none of them ever sees a model's answer in the trainer. They run in a second process, `serve` below,
and there in a fork for each request, which may only compute: `confine` takes the rest from it. A request takes some 5
ms. This needs Linux; macOS, which is untested, does not limit the memory.
"""
import contextlib
import copy
import difflib
import functools
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import threading

from tasks import ANSWER, END_ANSWER, END_THINK, WRONG, Grade, Task, extract_answer

NONSENSE = ['...', 'nan'] # the example in the question, and what slips through comparisons
# What a fork may use. CPU_SECONDS stop a scorer that computes for long, however busy the machine is. WALL_SECONDS are
# for one that waits.
CPU_SECONDS, WALL_SECONDS, BYTES = 1, 5, 2 ** 31


class ReasoningGym(Task):
    """A task of the reasoning-gym package. A problem is an entry of the package: a dict with question and answer."""
    defaults = dict(num_eval_samples=200) # some tasks draw only a few problems a second

    def __init__(self,
                 dataset='chain_sum', # a task of the reasoning-gym package, by its name there
                 partial_credit=0.0, # what a score of nearly 1 earns, below 1; a lower score earns its part of it
                 longest_prompt=4096, # tokens; longer questions are left out
                 ):
        from reasoning_gym.factory import DATASETS, create_dataset
        if dataset not in DATASETS:
            close = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0)[0]
            raise ValueError(f"the reasoning-gym package has no task {dataset!r}; did you mean --dataset={close}?")
        if not 0 <= partial_credit < 1:
            raise ValueError(f"{partial_credit=} must be at least 0 and below 1")
        self.dataset, self.partial_credit, self.longest_prompt = dataset, partial_credit, longest_prompt
        self.create = functools.partial(create_dataset, dataset, size=1)
        try:
            self.create(seed=0)
        except AssertionError as error: # of a task that takes more than a name
            raise ValueError(f"--dataset={dataset}: {error}")
        self.scorer = Scorer(dataset)
        self.proven = False # it has scored a problem

    def problem(self, rng):
        """Draw a problem whose scorer tells its own answer from nonsense. Raises ValueError when there is none."""
        for _ in range(100):
            seed = int(rng.integers(2 ** 31))
            random.seed(seed) # some tasks draw from this too, besides the seed that they are given
            entry = self.create(seed=seed)[0]
            answer = read_answer(f"{END_THINK}{ANSWER}{entry['answer']}{END_ANSWER}")
            short = len(entry['question'].encode()) <= self.longest_prompt - 600 # there are no more tokens than bytes
            if not answer or not short:
                continue
            scores = self.scorer.scores(entry, [answer, *NONSENSE])
            if not scores and not self.proven: # one that takes long in the middle of a run is left out
                raise ValueError(f"--dataset={self.dataset} is refused: its scorer runs text as code, or takes long")
            if [score == 1 for score in scores] == [True, False, False]:
                self.proven = True
                return entry
        raise ValueError(f"--dataset={self.dataset} is refused: its scorer does not tell its own answers from "
                         "nonsense, or these or the questions are too long")

    def question(self, problem):
        return problem['question']

    def parse(self, text):
        raise ValueError("the problems of reasoning-gym cannot be typed: sample.py without --prompt draws some")

    def canonical(self, problem):
        return problem['question']

    def grade(self, problem, response):
        """Grade by the package's scorer: what it gives 1 is right. What it gives between 0 and 1 is paid by
        partial_credit only, because some scorers give a little to any text."""
        answer = read_answer(response)
        if not answer:
            return WRONG
        score, = self.scorer.scores(problem, [answer]) or [0.0]
        near = self.partial_credit * score if 0 < score < 1 else 0.0 # some err to above 1
        return Grade(1.0 if score == 1 else near, score == 1, True)


def read_answer(response):
    """Return the answer in a response without the white space around it, '' when there is none."""
    return (extract_answer(response) or '').strip()


# --------------------------------------------------------------------------------------------------------------------
# In the trainer

class Scorer:
    """Ask a second process for scores. It is started when first asked, and ends with this one."""

    def __init__(self, dataset):
        self.dataset, self.process = dataset, None

    def scores(self, entry, answers):
        """Return the score of each answer to an entry. Returns [] when the scorer had to be stopped at one of them."""
        if not self.process:
            self.start()
        return [float(score) for score in self.ask(pickle.dumps((entry, answers)), 2 * WALL_SECONDS).split()]

    def start(self):
        # The process runs this same file, and looks for modules where the trainer does. Run in the usual way, it would
        # look into its own folder first, and take itself for the package of the same name.
        code = f'import runpy, sys; sys.path = {sys.path}; runpy.run_path({__file__!r}, run_name="__main__")'
        self.process = subprocess.Popen(
            [sys.executable, '-c', code, self.dataset], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True, # Ctrl-C is for the trainer only
            env=dict(os.environ, OMP_NUM_THREADS='1')) # numpy starts no threads, which a fork would not have
        if not self.ask(b'', 120): # its imports take seconds
            raise RuntimeError("the process that runs the scorers of reasoning-gym does not start")

    def ask(self, request, seconds):
        """Return the line that the process replies, b'' when there is none in time: then the process is ended, and the
        next request starts a new one."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.daemon = True # an exit does not wait for it
        timer.start()
        with contextlib.suppress(BrokenPipeError): # of a process that is gone
            self.process.stdin.write(request)
            self.process.stdin.flush()
        reply = self.process.stdout.readline()
        timer.cancel()
        if not reply:
            self.stop()
        return reply

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __del__(self):
        self.stop() # Popen keeps a process that still runs, even when nothing else refers to it


# --------------------------------------------------------------------------------------------------------------------
# In the second process. It unpickles what the trainer sends. What it sends back is text, which the trainer reads as
# numbers and never unpickles.

def serve(dataset):
    """Score the requests that come through standard input, until the trainer ends."""
    from reasoning_gym.factory import create_dataset
    scorer = create_dataset(dataset, size=1, seed=0)
    sys.stdout = None # what a scorer prints must not get among the scores
    os.write(1, b'ready\n')
    with contextlib.suppress(EOFError, BrokenPipeError): # the trainer has ended
        while True:
            entry, answers = pickle.load(sys.stdin.buffer)
            os.write(1, score(scorer, entry, answers) + b'\n')


def score(scorer, entry, answers):
    """Score answers in a fork of this process. Returns the scores as text, b'' when the fork did not get so far."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            pairs = [(answer, copy.deepcopy(entry)) for answer in answers] # one scorer writes into its entry
            confine()
            scores = [score_one(scorer, *pair) for pair in pairs]
            os.write(write, ' '.join(map(str, scores)).encode())
        finally: # whatever happens, the fork goes no further than here
            os._exit(0)
    os.close(write)
    with open(read, 'rb') as pipe:
        scores = pipe.read()
    os.wait()
    return scores


def score_one(scorer, answer, entry):
    """Return the score of an answer, 0 when the scorer raises."""
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception: # whatever a text may make a scorer raise
        return 0.0


def confine():
    """Leave this process nothing but to compute, and little of that."""
    signal.alarm(WALL_SECONDS)
    for limit, most in [(resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, BYTES),
                        (resource.RLIMIT_FSIZE, 0), # no file grows
                        (resource.RLIMIT_NOFILE, 0), # no file and no socket is opened
                        (resource.RLIMIT_NPROC, 0)]: # no process is started, except by root
        with contextlib.suppress(ValueError): # a stricter limit is set already
            resource.setrlimit(limit, (most, most))
    # Python announces to a hook that it compiles or runs code, imports a module, opens a file or starts a process,
    # before it does. The process ends right there: a scorer could catch an exception, and some do catch all.
    sys.addaudithook(lambda *event: os._exit(1))


if __name__ == '__main__':
    serve(sys.argv[1])
