"""
Train on a GPU of Modal. Untested: the authors had no account.

    pip install modal
    modal run examples/modal_app.py --task=countdown   # again: it continues a run that was cut short after an hour
    modal volume get tinyzero countdown                # brings the run back
"""
import glob
import os
import subprocess

import modal

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
image = modal.Image.debian_slim(python_version='3.12')
image = image.pip_install_from_requirements(f'{TOP}/requirements.txt')
image = image.add_local_dir(TOP, '/root/tinyzero', ignore=['.venv', 'out', '.git', 'smollm2*'])
volume = modal.Volume.from_name('tinyzero', create_if_missing=True)
app = modal.App('tinyzero-astarpo', image=image)


@app.function(gpu='H100', timeout=3600, volumes={'/out': volume})
def train(task):
    """Run train.py on the machine with the GPU; the run's folder lies on the volume."""
    command = ['python', 'train.py', f'--task={task}', f'--out_dir=/out/{task}']
    if glob.glob(f'/out/{task}/checkpoint_step_*.pt'):
        command += ['--init_from=resume']
    subprocess.run(command, cwd='/root/tinyzero', check=True)


@app.local_entrypoint()
def main(task: str = 'countdown'):
    train.remote(task)
