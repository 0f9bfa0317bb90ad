"""Text from a run's newest checkpoint."""

from pathlib import Path

import torch

from meshwright.checkpoint import read_model_weights
from meshwright.data import open_reader
from meshwright.models import build_model, generate
from meshwright.record import open_run
from meshwright.spec import SettingError
from meshwright.spec.decode import read_job
from meshwright.train.worker import no_machine


def sample_text(run: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what the model makes of it. One process, whatever layout trained it."""
    folder = open_run(run)
    job = read_job(folder.job, local=no_machine)
    saved = folder.saved_steps()
    if not saved:
        raise SettingError(f"run folder {run}", "has no checkpoint yet", "a run with checkpoint.every_steps set")
    tokenizer = open_reader(job.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(job.model, device=device)
    read_model_weights(folder.checkpoint(saved[-1]), model)
    # A text begins after the end of another one, as in training.
    start = torch.tensor([[tokenizer.end, *tokenizer.encode([prompt])[0].tolist()]], device=device)
    made = generate(model, start, tokens, temperature, seed, window=job.data.sequence)[0, 1:].tolist()
    end = made.index(tokenizer.end) if tokenizer.end in made else len(made)
    return tokenizer.decode(made[:end])
