"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

# A target that adds nothing to the loss.
NOT_COUNTED = -100


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy in nats, fp32. logits: [B, S, V]; targets: [B, S] int64, or NOT_COUNTED.

    A sum, because only the caller knows the global batch: divided by its tokens, microbatches and ranks add up to
    the same gradient in every layout.
    """
    # fp32 whatever the model's precision: log-softmax in bf16 would round each token's loss to 3 digits.
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NOT_COUNTED, reduction="sum")
