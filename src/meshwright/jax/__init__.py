"""Record a JAX training loop into a run folder that `meshwright explain` reads. Loads no torch.

Beside `trace`, which does this for PyTorch, and not in it: that part's front loads torch, which a JAX program need not
have.
"""

from meshwright.jax.recording import Recording
from meshwright.jax.start import record

__all__ = ["Recording", "record"]
