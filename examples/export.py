"""
Write a model in the Hugging Face layout, which transformers loads: a Qwen3 where queries and keys are normalised, as in
our own models, a Qwen2 where they have a bias, else a Llama.

    python examples/export.py FOLDER                                       # of the newest run, as sample.py finds it
    python examples/export.py FOLDER --checkpoint=out/countdown            # a checkpoint, or the folder of a run

The tokenizer of pretrained weights goes with the model; our own vocabularies have no place in that layout.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import ARCHITECTURES, HF_CONFIG, counterparts
from sample import fail, find_checkpoint, load, load_checkpoint, one_line, run_script
from tasks import PretrainedTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=os.path.expanduser)
    parser.add_argument('--checkpoint')
    parser.add_argument('--task', default='', help="the file of the model's task, where it is not one of tasks.py")
    args = parser.parse_args()
    if os.path.exists(args.folder):
        fail(f"{args.folder} is there already: choose a new folder")
    path = find_checkpoint(args.checkpoint, args.task)
    model, _, tokenizer = load(load_checkpoint(path), path, device='cpu', task_name=args.task)
    with one_line(args.folder):
        save_pretrained(model, args.folder, tokenizer.ends)
        files = tokenizer.state if isinstance(tokenizer, PretrainedTokenizer) else {}
        for name in files.keys() - {'config.json'}: # which save_pretrained wrote
            with open(os.path.join(args.folder, name), 'w', encoding='utf-8') as file:
                file.write(files[name])
    print(f"wrote {', '.join(sorted(os.listdir(args.folder)))} to {args.folder}")


def save_pretrained(model, folder, ends):
    """Write a model, without its value head, as config.json and model.safetensors. Raises ValueError when no
    architecture has all of its options, FileExistsError when the folder is there."""
    from safetensors.torch import save_file
    options = {name: True for name in ('qkv_bias', 'qk_norm') if getattr(model.config, name)}
    if options not in ARCHITECTURES.values():
        raise ValueError(f"no architecture has {' and '.join(options)}")
    kind = next(kind for kind, added in ARCHITECTURES.items() if added == options)
    os.makedirs(folder)
    theirs = {name: getattr(model.config, ours) for ours, name in HF_CONFIG.items()}
    theirs |= dict(model_type=kind, architectures=[kind.capitalize() + 'ForCausalLM'], hidden_act='silu',
                   eos_token_id=ends[0] if len(ends) == 1 else ends,
                   torch_dtype=str(model.embed.weight.dtype).removeprefix('torch.'))
    with open(os.path.join(folder, 'config.json'), 'w') as file:
        json.dump(theirs, file, indent=2)
    weights = {name: view.detach().to('cpu', copy=True) for p, parts in counterparts(model)
               for name, view in zip(parts, p.split(list(parts.values())))}
    save_file(weights, os.path.join(folder, 'model.safetensors'), metadata=dict(format='pt'))


if __name__ == '__main__':
    run_script(main, 'the size of the model')
