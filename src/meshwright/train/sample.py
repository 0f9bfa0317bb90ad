"""Text from a run's newest checkpoint."""

from pathlib import Path

import torch

from meshwright.checkpoint import read_model_weights
from meshwright.data import VOCABULARY, is_prepared, open_folder, open_tokenizer
from meshwright.models import build_model, generate
from meshwright.record import open_run
from meshwright.spec import Job, SettingError
from meshwright.spec.decode import read_job
from meshwright.spec.job import TOKEN_FILES
from meshwright.train.worker import no_machine


def sample_text(run: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and what the model makes of it. One process, whatever layout trained it."""
    folder = open_run(run)
    job = read_job(folder.job, local=no_machine)
    saved = folder.saved_steps()
    if not saved:
        raise SettingError(f"run folder {run}", "has no checkpoint yet", "a run with checkpoint.every_steps set")
    refuse_unknown_tokens(job)
    tokenizer = open_tokenizer(job.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(job.model, device=device)
    read_model_weights(folder.checkpoint(saved[-1]), model)
    # A text begins after the end of another one, as in training.
    start = torch.tensor([[tokenizer.end, *tokenizer.encode([prompt])[0].tolist()]], device=device)
    made = generate(model, start, tokens, temperature, seed, window=job.data.sequence)[0, 1:].tolist()
    end = made.index(tokenizer.end) if tokenizer.end in made else len(made)
    return tokenizer.decode(made[:end])


def refuse_unknown_tokens(job: Job) -> None:
    """Refuse tokens that somebody else made of text, where the job does not say with which tokenizer."""
    if job.data.tokenizer != "bytes":
        return
    for setting, source in job.data.named_sources():
        path = Path(source.path).expanduser()
        foreign = is_prepared(path) and open_folder(path).manifest.vocabulary != VOCABULARY
        if foreign or path.suffix in TOKEN_FILES:
            nearest = "a run with data.tokenizer, or on text"
            raise SettingError(f'{setting} = "{source.path}"', "its tokens are not bytes", nearest)
